"""Encoder: x W_enc^T + b_enc, then the exact TopK of every row.

The product comes from a library, whose result is read once more for the group maxima, or from a Triton kernel that
takes them from its accumulator. Rows are processed in chunks, which bounds the memory of pre-activations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clt.kernels.gpu import configs
from clt.kernels.gpu.configs import GemmConfig, SelectConfig
from clt.kernels.gpu.language import ACCUMULATOR, INTERPRETED, round_to
from clt.kernels.gpu.select import KEY_DTYPE, group_keys, select_topk

#: Bytes of pre-activations that exist at a time.
_CHUNK_BYTES = 512 * 2**20

_INTERPRET = tl.constexpr(INTERPRETED)


@triton.jit
def _gemm_group_max_kernel(
    X,
    W,
    BIAS,
    PRE,
    KEYS,
    n_rows,
    n_features,
    d_model,
    n_groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_D: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program makes one tile of pre-activations; grid: bands of GROUP_M row tiles, in each column slow, row fast."""
    pid = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_features, BLOCK_N)
    first_row_tile = pid // (GROUP_M * column_tiles) * GROUP_M
    height = min(row_tiles - first_row_tile, GROUP_M)
    row_tile = first_row_tile + pid % (GROUP_M * column_tiles) % height
    column_tile = pid % (GROUP_M * column_tiles) // height
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_K)

    # Beyond the last row or feature the last one is read again: no mask in the loop, and nothing of it is stored.
    x_at = X + tl.minimum(row, n_rows - 1).to(tl.int64)[:, None] * d_model + channel[None, :]
    w_at = W + tl.minimum(column, n_features - 1).to(tl.int64)[None, :] * d_model + channel[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for start in range(0, d_model, BLOCK_K):
        if EVEN_D:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(start + channel < d_model)[None, :], other=0.0)
            w = tl.load(w_at, mask=(start + channel < d_model)[:, None], other=0.0)
        if _INTERPRET:
            # The interpreter would multiply the bits of bfloat16.
            x, w = x.to(ACC), w.to(ACC)
        acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=ACC)
        x_at += BLOCK_K
        w_at += BLOCK_K
    acc += tl.load(BIAS + tl.minimum(column, n_features - 1)).to(ACC)[None, :]

    at = PRE + row.to(tl.int64)[:, None] * n_features + column[None, :]
    tl.store(at, round_to(acc, PRE.dtype.element_ty), mask=(row < n_rows)[:, None] & (column < n_features)[None, :])
    if RAGGED:
        # The last group reaches beyond the last feature.
        acc = tl.where((column < n_features)[None, :], acc, 0.0)
    # Rounding keeps the order: the rounded maximum is the maximum of what was stored.
    keys = group_keys(acc, GROUP, PRE.dtype.element_ty)
    group = column_tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    at = KEYS + row.to(tl.int64)[:, None] * n_groups + group[None, :]
    tl.store(at, keys.to(KEYS.dtype.element_ty), mask=(row < n_rows)[:, None] & (group < n_groups)[None, :])


def gemm_group_max(
    x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, group: int, config: GemmConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Pre-activations and the largest key of each group of neighbouring features, in one kernel.

    Args:
        x_BD: [B,D] encoder inputs.
        W_enc_FD: [F,D] encoder weights, same dtype.
        b_enc_F: [F] bias, added before the one rounding.
        group: features per group, a power of two.
        config: launch settings; None for those of the table.

    Returns:
        pre [B,F] in the dtype of x, and keys [B,G] as `select.group_max` gives for pre, G = ceil(F / group).
    """
    n_rows, d_model = x_BD.shape
    n_features = len(W_enc_FD)
    config = config or configs.gemm_config(x_BD.dtype, d_model, n_features, n_rows)
    n_groups = triton.cdiv(n_features, group)
    pre_BF = torch.empty(n_rows, n_features, dtype=x_BD.dtype, device=x_BD.device)
    keys_BG = torch.empty(n_rows, n_groups, dtype=KEY_DTYPE[x_BD.dtype], device=x_BD.device)
    block_n = max(config.block_n, group)
    _gemm_group_max_kernel[(triton.cdiv(n_rows, config.block_m) * triton.cdiv(n_features, block_n),)](
        x_BD.contiguous(),
        W_enc_FD.contiguous(),
        b_enc_F.contiguous(),
        pre_BF,
        keys_BG,
        n_rows,
        n_features,
        d_model,
        n_groups,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        GROUP=group,
        GROUP_M=config.group_m,
        EVEN_D=d_model % config.block_k == 0,
        RAGGED=n_features % group != 0,
        ACC=ACCUMULATOR[x_BD.dtype],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return pre_BF, keys_BG


def encode_topk(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    k: int,
    config: SelectConfig | None = None,
    gemm: GemmConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """TopK(ReLU(x W_enc^T + b_enc)) with at most 512 MB of pre-activations at a time.

    Args:
        x_BD: [B,D] encoder inputs.
        W_enc_FD: [F,D] encoder weights, same dtype.
        b_enc_F: [F] bias.
        k: slots per token.
        config: launch settings of the selection; None for those of the table.
        gemm: launch settings of the fused product, which is then used; None for the choice and settings of the table.

    Returns:
        values [B,K] and indices [B,K] int32, ascending, empty slots last as (0, 0).
    """
    n_rows, d_model = x_BD.shape
    n_features = len(W_enc_FD)
    config = config or configs.select_config(x_BD.dtype, n_features, k)
    fused = gemm is not None or configs.producer(x_BD.dtype, d_model, n_features, k, n_rows) == "fused"
    most_rows = max(1, _CHUNK_BYTES // (n_features * x_BD.element_size()))
    chunk = triton.cdiv(n_rows, triton.cdiv(n_rows, most_rows))
    parts = [_encode_rows(x_CD, W_enc_FD, b_enc_F, k, config, gemm, fused) for x_CD in x_BD.split(chunk)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])


def _encode_rows(
    x_CD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, config: SelectConfig, gemm: GemmConfig | None, fused: bool
) -> tuple[Tensor, Tensor]:
    """Codes of one chunk; its pre-activations are free when this returns."""
    if fused:
        pre_CF, keys_CG = gemm_group_max(x_CD, W_enc_FD, b_enc_F, config.group, gemm)
        return select_topk(pre_CF, k, keys_CG, config)
    return select_topk(torch.addmm(b_enc_F, x_CD, W_enc_FD.T), k, config=config)
