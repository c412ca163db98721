"""What the machine can do at most, measured before anything else: memory, the shared cache, and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from clt.launch.bench.kernels.data import Size
from clt.launch.bench.kernels.measure import time_runs
from clt.launch.bench.kernels.work import Ceilings

#: A working set that stays in the L2 cache of the GPUs we know; it is read this often in one run.
_CACHED_BYTES, _CACHED_READS = 40 * 2**20, 256


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """One ceiling.

    Attributes:
        name: what was done.
        amount: bytes or operations of one run.
        unit: "B/s" or "FLOP/s".
        best_s: seconds of the shortest run.
        median_s: seconds of the median run.
    """

    name: str
    amount: float
    unit: str
    best_s: float
    median_s: float

    @property
    def rate(self) -> float:
        """Units per second of the shortest run."""
        return self.amount / self.best_s


def memory_anchors(device: torch.device, n_bytes: int, rounds: int) -> tuple[Anchor, ...]:
    """Reading and copying memory and, on a GPU, reading its L2 cache.

    Args:
        device: whose memory.
        n_bytes: of the tensor that is read, and of each of the two that are copied.
        rounds: runs of each.
    """
    source = torch.randn(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    anchors = [
        _anchor("memory read", n_bytes, "B/s", source.sum, device, rounds),
        _anchor("memory copy, read + written", 2 * n_bytes, "B/s", lambda: target.copy_(source), device, rounds),
    ]
    if device.type == "cuda":
        cached = source[: _CACHED_BYTES // 4]
        # Rows that are one and the same memory: all but the first read come from the cache.
        rows = cached.expand(_CACHED_READS, -1)
        amount = _CACHED_BYTES * _CACHED_READS
        anchors.append(_anchor("L2 read, 40 MiB", amount, "B/s", lambda: rows.sum(dim=1), device, rounds))
    return tuple(anchors)


def product_anchor(size: Size, device: torch.device, dtype: torch.dtype, rounds: int) -> Anchor:
    """The encoder's product [N,D] x [D,F] by the library."""
    x_BD = torch.randn(size.n_tokens, size.d_model, device=device).to(dtype)
    W_FD = torch.randn(size.n_features, size.d_model, device=device).to(dtype)
    out_BF = torch.empty(size.n_tokens, size.n_features, device=device, dtype=dtype)
    flops = 2.0 * size.n_tokens * size.d_model * size.n_features
    name = f"product {size.n_tokens} x {size.d_model} x {size.n_features}, {str(dtype).removeprefix('torch.')}"
    return _anchor(name, flops, "FLOP/s", lambda: torch.mm(x_BD, W_FD.T, out=out_BF), device, rounds)


def ceilings(memory: tuple[Anchor, ...], product: Anchor) -> Ceilings:
    """What the roofline of one size is made of."""
    read, copy, *cache = memory
    return Ceilings(
        memory_bytes_per_s=max(read.rate, copy.rate),
        cache_bytes_per_s=cache[0].rate if cache else None,
        cache_bytes=_CACHED_BYTES,
        flops_per_s=product.rate,
    )


def _anchor(name: str, amount: float, unit: str, run: Callable[[], Any], device: torch.device, rounds: int) -> Anchor:
    for _ in range(2):
        run()
    timing = time_runs(run, device, rounds)
    return Anchor(name=name, amount=amount, unit=unit, best_s=timing.best_s, median_s=timing.median_s)
