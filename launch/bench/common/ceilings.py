"""Ceilings of the machine, measured before anything else: memory, L2 cache, matrix products, gathered rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clt.launch.bench.common.report import markdown_table
from clt.launch.bench.common.timing import time_runs

#: Working set that stays in the L2 cache of known GPUs, and how often one run reads it.
CACHED_BYTES, _CACHED_READS = 40 * 2**20, 256


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Highest measured rate of one kind of work.

    Attributes:
        name: the work.
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


def memory_ceilings(device: torch.device, n_bytes: int, rounds: int) -> tuple[Ceiling, ...]:
    """Reads and copies memory and, on a GPU, reads its L2 cache.

    Args:
        device: whose memory.
        n_bytes: of the tensor that is read, and of each of the two that are copied.
        rounds: runs of each.

    Returns:
        Read, copy and, on a GPU, cache.
    """
    source = torch.randn(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    found = [
        _ceiling("memory read", n_bytes, "B/s", source.sum, device, rounds),
        _ceiling("memory copy, read + written", 2 * n_bytes, "B/s", lambda: target.copy_(source), device, rounds),
    ]
    if device.type == "cuda":
        cached = source[: CACHED_BYTES // 4]
        # All rows are the same memory: all but the first read come from the cache.
        rows = cached.expand(_CACHED_READS, -1)
        amount = CACHED_BYTES * _CACHED_READS
        found.append(_ceiling("L2 read, 40 MiB", amount, "B/s", lambda: rows.sum(dim=1), device, rounds))
    return tuple(found)


def product_ceiling(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, rounds: int) -> Ceiling:
    """The encoder's product [N,D] x [D,F] by the library.

    Args:
        shape: N tokens, D d_model, F features.
        device: where.
        dtype: of operands and result.
        rounds: runs.
    """
    n, d, f = shape
    x_BD = torch.randn(n, d, device=device).to(dtype)
    W_FD = torch.randn(f, d, device=device).to(dtype)
    out_BF = torch.empty(n, f, device=device, dtype=dtype)
    name = f"product {n} x {d} x {f}, {str(dtype).removeprefix('torch.')}"
    return _ceiling(name, 2.0 * n * d * f, "FLOP/s", lambda: torch.mm(x_BD, W_FD.T, out=out_BF), device, rounds)


def gather_ceiling(shape: tuple[int, int, int], k: int, device: torch.device, rounds: int) -> Ceiling:
    """Reads k random rows of a float32 table [F,D] per token and writes their sum.

    Args:
        shape: N tokens, D d_model, F features.
        k: rows per token.
        device: where.
        rounds: runs.
    """
    n, d, f = shape
    draw = torch.Generator(device).manual_seed(2)
    rows_NK = torch.randint(f, (n, k), generator=draw, device=device)
    table_FD = torch.randn(f, d, generator=draw, device=device)

    def run() -> object:
        return torch.nn.functional.embedding_bag(rows_NK, table_FD, mode="sum")

    amount = n * (k + 1) * d * table_FD.element_size()
    return _ceiling(f"gather {n} x {k} rows of {d}, float32", amount, "B/s", run, device, rounds)


def ceilings_text(ceilings: Sequence[Ceiling], *more: Sequence[str]) -> str:
    """Ceilings, and more rows of name, milliseconds and rate, as a Markdown table."""
    rows: list[Sequence[str]] = []
    for ceiling in ceilings:
        scale, unit = (1e12, "TFLOP/s") if ceiling.unit == "FLOP/s" else (1e9, "GB/s")
        rows.append((ceiling.name, f"{ceiling.best_s * 1e3:.3f}", f"{ceiling.rate / scale:.4g} {unit}"))
    return f"**Ceilings of the machine**\n\n{markdown_table(('', 'ms best', 'rate'), [*rows, *more])}"


def _ceiling(name: str, amount: float, unit: str, run: Callable[[], Any], device: torch.device, rounds: int) -> Ceiling:
    for _ in range(2):
        run()
    timing = time_runs(run, device, rounds)
    return Ceiling(name=name, amount=amount, unit=unit, best_s=timing.best_s, median_s=timing.median_s)
