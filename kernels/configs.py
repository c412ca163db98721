"""Launch settings of the kernels: what a frozen table says for this device and shape, else a rule.

Nothing is tuned while a program runs: a setting fixes the order of some sums, and a run must be able to name its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Path = Literal["sparse", "dense"]
Producer = Literal["gemm", "fused"]


@dataclass(frozen=True, kw_only=True)
class GatherConfig:
    """Launch of a kernel that gathers rows: decode, decoder_grad, encoder_grad, row_adam.

    Attributes:
        block_d: columns per program, a power of two.
        unroll: rows in flight per loop step, a power of two.
        num_warps: warps per program; block_d * itemsize / 512 makes every load 16 bytes a lane.
    """

    block_d: int
    unroll: int
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Launch of the exact TopK selection.

    Attributes:
        group: columns whose maximum bounds the selection, a power of two.
        num_warps: warps per row.
    """

    group: int
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """Launch of the encoder product with group maxima in its epilogue.

    Attributes:
        block_m: tokens per tile.
        block_n: features per tile.
        block_k: channels per step.
        group_m: row tiles that share a column tile in L2.
        num_warps: warps per program.
        num_stages: depth of the load pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


def gather_config(op: str, dtype: torch.dtype, d_model: int) -> GatherConfig:
    """Settings of a gathering kernel: "decode", "decoder_grad", "encoder_grad" or "row_adam"."""
    lanes = 512 // dtype.itemsize
    block_d = max(16, min(lanes if op == "decode" else 2 * lanes, 1 << (d_model - 1).bit_length()))
    return GatherConfig(block_d=block_d, unroll=8, num_warps=max(1, block_d // (2 * lanes)))


def select_config(dtype: torch.dtype, n_features: int, k: int) -> SelectConfig:
    """Settings of the selection: the largest group of at most 32 columns that leaves at least k groups."""
    group = 32
    while group > 1 and n_features < group * k:
        group //= 2
    return SelectConfig(group=group, num_warps=1)


def gemm_config(dtype: torch.dtype, d_model: int) -> GemmConfig:
    """Settings of the fused encoder product."""
    return GemmConfig(block_m=128, block_n=256, block_k=64, group_m=8, num_warps=8, num_stages=3)


def producer(dtype: torch.dtype, d_model: int) -> Producer:
    """Who makes pre-activations and their group maxima: a library product and one more read, or one fused kernel."""
    return "fused" if d_model <= 1024 else "gemm"


def path(op: str, n_features: int, k: int) -> Path:
    """Whether gathering k of F rows beats a dense product for "decode", "decoder_grad" or "encoder_grad"."""
    return "sparse"
