"""Launch settings of the kernels: measured ones for this device and shape where the table has them, else a rule.

Nothing is tuned while a program runs, because a setting fixes the order of some sums. The table is `configs.json`
beside this file; `benchmarks/tune_kernels.py` measures and writes it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

import torch

from clt.kernels.gpu.config_table import (
    OPS,
    CodePath,
    ConfigTable,
    GatherConfig,
    GemmConfig,
    Producer,
    SelectConfig,
    Settings,
    key_of,
    read_table,
)

__all__ = ["GatherConfig", "GemmConfig", "SelectConfig"]

TABLE = Path(__file__).with_name("configs.json")

#: Bytes of gathered rows, one column chunk wide, that all programs read at a time: they must stay in L2 (of 50 MB,
#: some 44 MB serve one working set) while programs of the next chunk begin.
LIVE_SLAB = 20 * 2**20

#: F/k up to which a dense bfloat16 product beats the gather; see `path`.
DENSE_FORWARD, DENSE_BACKWARD = 64, 54


def gather_config(
    op: str,
    dtype: torch.dtype,
    d_model: int,
    n_features: int | None = None,
    k: int | None = None,
    tokens: int | None = None,
) -> GatherConfig:
    """Settings of a gathering kernel.

    By rule every load is 16 bytes a lane: block_d * itemsize = 512 per warp for "decode", whose accumulator is all it
    keeps, and twice that per warp for the others, which spreads their sum over a row across more columns.

    Args:
        op: "decode", "decoder_grad", "encoder_grad" or "row_adam".
        dtype: dtype of the gathered rows.
        d_model: D.
        n_features: F; where known, decode's blocks narrow until F rows of one fit in L2.
        k: slots per token.
        tokens: B; where known, blocks of the gradients narrow until B rows of one fit in L2.

    Returns:
        The table's entry for exactly this shape, where all of it is given and there is one, else the rule.
    """
    if found := _table().gather.get(_key(op, dtype, d_model=d_model, n_features=n_features, k=k, tokens=tokens)):
        return found.settings
    lanes = 512 // dtype.itemsize
    block_d = lanes if op == "decode" else 2 * lanes
    if d_model % block_d and d_model % lanes == 0:
        block_d = lanes  # no masked columns
    rows = {"decode": n_features, "decoder_grad": tokens, "encoder_grad": tokens}.get(op) or 0
    # Less than a cache line of 128 bytes per row would fetch bytes that are not used.
    while rows * block_d * dtype.itemsize > LIVE_SLAB and block_d * dtype.itemsize > 128:
        block_d //= 2
    block_d = max(16, min(block_d, _power_of_two(d_model)))
    return GatherConfig(block_d=block_d, unroll=8, num_warps=max(1, block_d // (2 * lanes)))


def select_config(dtype: torch.dtype, n_features: int, k: int) -> SelectConfig:
    """Settings of the selection; by rule the largest group of at most 32 columns that leaves at least k groups.

    Args:
        dtype: dtype of the pre-activations.
        n_features: F.
        k: slots per token.
    """
    if found := _table().select.get(_key("select", dtype, n_features=n_features, k=k)):
        return found.settings
    group = 32
    while group > 1 and n_features < group * k:
        group //= 2
    return SelectConfig(group=group, num_warps=1)


def gemm_config(
    dtype: torch.dtype, d_model: int, n_features: int | None = None, tokens: int | None = None
) -> GemmConfig:
    """Settings of the fused encoder product; wide dtypes get a tile whose operands fit in shared memory.

    Args:
        dtype: dtype of the weights.
        d_model: D.
        n_features: F; with tokens needed to find an entry of the table.
        tokens: B.
    """
    if found := _table().gemm.get(_key("gemm", dtype, d_model=d_model, n_features=n_features, tokens=tokens)):
        return found.settings
    if dtype.itemsize > 2:
        return GemmConfig(block_m=64, block_n=64, block_k=32, group_m=8, num_warps=4, num_stages=3)
    return GemmConfig(block_m=128, block_n=256, block_k=64, group_m=8, num_warps=8, num_stages=3)


def producer(
    dtype: torch.dtype,
    d_model: int,
    n_features: int | None = None,
    k: int | None = None,
    tokens: int | None = None,
) -> Producer:
    """Source of pre-activations and group maxima: "gemm" (library product and one more read) or "fused" (one kernel).

    The further read costs 367/D of the product's time, so the fused kernel must reach about 95 % of the library's rate
    to win at D = 4096 and 80 % at D = 768: fused for D <= 1024 by rule. Its float32 product runs without tensor cores
    and is never the rule.

    Args:
        dtype: dtype of the weights.
        d_model: D.
        n_features: F; with k and tokens needed to find an entry of the table.
        k: slots per token.
        tokens: B.
    """
    key = _key("producer", dtype, d_model=d_model, n_features=n_features, k=k, tokens=tokens)
    if found := _table().producer.get(key):
        return found.settings
    return "fused" if d_model <= 1024 and dtype == torch.bfloat16 else "gemm"


def path(
    op: str,
    n_features: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    d_model: int | None = None,
    tokens: int | None = None,
) -> CodePath:
    """Faster of gathering k of F rows and a dense product.

    A gather of N tokens takes itemsize*N*k*D / BW seconds, a dense product 2*N*F*D / R, so gathering wins where
    F/k > itemsize*R / (2*BW). In bfloat16 on an H200 (R = 790 TFLOP/s) that is 81 at the full rate of L2 (BW = 9.7
    TB/s), 108 at three quarters of it and 203 from memory. By rule the forward is dense up to 64 and sparse above:
    between 64 and 128 only a measured entry decides. "encoder_grad" is one product too. The fused "decoder_grad"
    replaces two products by one gather, which halves the 108. float32 products run at about a sixteenth of the rate
    on rows twice as long: an eighth of all thresholds.

    Args:
        op: "decode", "decoder_grad" or "encoder_grad".
        n_features: F.
        k: slots per token.
        dtype: dtype of the weights.
        d_model: D; with tokens needed to find an entry of the table.
        tokens: B.

    Returns:
        "sparse" or "dense".
    """
    key = _key(f"{op}_path", dtype, d_model=d_model, n_features=n_features, k=k, tokens=tokens)
    if found := _table().path.get(key):
        return found.settings
    threshold = DENSE_BACKWARD if op == "decoder_grad" else DENSE_FORWARD
    return "dense" if n_features * (1 if dtype.itemsize <= 2 else 8) <= threshold * k else "sparse"


def settings_of(op: str, dtype: torch.dtype, d_model: int, n_features: int, k: int, tokens: int) -> Settings:
    """Settings of one operation on this machine, from the table or by rule.

    Args:
        op: key of `OPS`.
        dtype: dtype of the weights.
        d_model: D.
        n_features: F.
        k: slots per token.
        tokens: B.
    """
    match OPS[op].section:
        case "gather":
            return gather_config(op, dtype, d_model, n_features, k, tokens)
        case "select":
            return select_config(dtype, n_features, k)
        case "gemm":
            return gemm_config(dtype, d_model, n_features, tokens)
        case "producer":
            return producer(dtype, d_model, n_features, k, tokens)
        case _:
            return path(op.removesuffix("_path"), n_features, k, dtype, d_model, tokens)


def fingerprint() -> str:
    """Source of the settings in one line: hash of the table, Triton version, architecture."""
    digest = hashlib.sha256(TABLE.read_bytes()).hexdigest()
    return f"configs.json sha256:{digest}, triton {triton_version() or 'absent'}, {architecture() or 'no cuda'}"


@functools.cache
def architecture() -> str | None:
    """The current CUDA device's architecture, for example "sm_90"; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@functools.cache
def triton_version() -> str | None:
    """Version of the installed Triton, None without one."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


@functools.cache
def _table() -> ConfigTable:
    return read_table(TABLE)


def _key(op: str, dtype: torch.dtype, **sizes: int | None) -> str:
    """The table's key of a call on this device; "" where a size that counts, the device or Triton is missing."""
    known = {name: size for name, size in sizes.items() if size is not None}
    arch, triton = architecture(), triton_version()
    if arch is None or triton is None or not known.keys() >= set(OPS[op].sizes):
        return ""
    return key_of(op, arch, str(dtype).removeprefix("torch."), triton, known)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()
