"""Sparse decode of one target layer: gathers the decoder vectors of the filled slots of all its source layers.

Target-major: a program holds one token's columns in registers, starts from bias and skip, adds every source's slots in
order and finishes there, so no partial sum and, when a loss is asked for, no reconstruction is ever stored. The grid
runs all tokens of one column chunk before the next: the chunk of W_dec that tokens share stays in the L2 cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from clt.kernels.common.dtypes import accumulator
from clt.kernels.common.interface import DecodeInputs
from clt.kernels.gpu.configs import GatherConfig, gather_config
from clt.kernels.gpu.language import ACCUMULATOR, load_columns, round_to, widen


@triton.jit
def _add_slots(acc, VALUES, INDICES, W, columns, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """acc + value * decoder vector of COUNT slots, one after the other; all their loads come first."""
    values = ()
    rows = ()
    for i in tl.static_range(COUNT):
        row = W + tl.load(INDICES + i).to(tl.int64) * D
        values = values + (tl.load(VALUES + i).to(acc.dtype),)
        rows = rows + (load_columns(row, columns, D, BLOCK_D),)
    for i in tl.static_range(COUNT):
        acc = tl.fma(values[i], widen(rows[i], acc.dtype), acc)
    return acc


@triton.jit(do_not_specialize=["n_sources", "n_tokens", "k"])
def _decode_kernel(
    VALUES,
    INDICES,
    W,
    BIAS,
    SKIP,
    Y,
    WEIGHTS,
    OUT,
    LOSS,
    n_sources,
    n_tokens,
    k,
    n_features,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: BLOCK_D columns of one token. Grid: column chunk slow, token fast.

    Without Y, OUT [B,D] is the reconstruction; with Y it is reconstruction - Y, and LOSS [chunks,B] its weighted sum of
    squares. The order of additions does not depend on BLOCK_D, UNROLL or the number of warps.
    """
    pid = tl.program_id(0)
    token = (pid % n_tokens).to(tl.int64)
    columns = pid // n_tokens * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = load_columns(BIAS, columns, D, BLOCK_D).to(ACC)
    if SKIP is not None:
        acc += load_columns(SKIP + token * D, columns, D, BLOCK_D).to(ACC)
    # Pointers that advance: a product of source and stride would be merged into the address of every row.
    VALUES += token * k
    INDICES += token * k
    codes_stride = tl.cast(n_tokens, tl.int64) * k
    decoder_stride = tl.cast(n_features, tl.int64) * D
    whole = k // UNROLL * UNROLL
    for _ in range(n_sources):
        for slot in range(0, whole, UNROLL):
            acc = _add_slots(acc, VALUES + slot, INDICES + slot, W, columns, UNROLL, D, BLOCK_D)
        for slot in range(whole, k):
            acc = _add_slots(acc, VALUES + slot, INDICES + slot, W, columns, 1, D, BLOCK_D)
        VALUES += codes_stride
        INDICES += codes_stride
        W += decoder_stride
    if Y is not None:
        acc -= load_columns(Y + token * D, columns, D, BLOCK_D).to(ACC)
        squares = tl.sum(acc * acc, 0)
        if WEIGHTS is not None:
            squares *= tl.load(WEIGHTS + token).to(ACC)
        tl.store(LOSS + pid, squares)
    tl.store(OUT + token * D + columns, round_to(acc, OUT.dtype.element_ty), mask=columns < D)


def decode(inputs: DecodeInputs, config: GatherConfig | None = None) -> Tensor:
    """See `KernelBackend.decode`.

    `config` does not change a bit of the result; default: the launch settings of the table.
    """
    return _launch(inputs, None, None, config)[0]


def decode_loss(
    inputs: DecodeInputs, y_BD: Tensor, weights_B: Tensor | None, config: GatherConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted squared error of a reconstruction that is never stored, and its residual.

    Args:
        inputs: of the reconstruction.
        y_BD: [B,D] target.
        weights_B: [B] weight of each token, or None for 1/B.
        config: launch settings, None for those of the table.

    Returns:
        error [], the sum over tokens of weight times mean square of the residual, in float32 (float64 for float64),
        and residual [B,D], reconstruction minus target, in the dtype of W_dec.
    """
    residual_BD, partials = _launch(inputs, y_BD, weights_B, config)
    return partials.sum() / (residual_BD.numel() if weights_B is None else residual_BD.shape[1]), residual_BD


def _launch(
    inputs: DecodeInputs, y_BD: Tensor | None, weights_B: Tensor | None, config: GatherConfig | None
) -> tuple[Tensor, Tensor]:
    """Output [B,D] and, with a target, partial errors [chunks,B]."""
    values_SBK, W_dec_SFD, skip_BD = inputs.values_SBK, inputs.W_dec_SFD, inputs.skip_BD
    sources, tokens, k = values_SBK.shape
    n_features, d_model = W_dec_SFD.shape[1:]
    config = config or gather_config("decode", W_dec_SFD.dtype, d_model, n_features, k, tokens)
    chunks = triton.cdiv(d_model, config.block_d)
    out_BD = W_dec_SFD.new_empty(tokens, d_model)
    partials = W_dec_SFD.new_empty(chunks, tokens, dtype=accumulator(W_dec_SFD.dtype))
    _decode_kernel[(tokens * chunks,)](
        values_SBK.contiguous(),
        inputs.indices_SBK.contiguous(),
        W_dec_SFD.contiguous(),
        inputs.b_dec_D.contiguous(),
        None if skip_BD is None else skip_BD.contiguous(),
        None if y_BD is None else y_BD.contiguous(),
        None if weights_B is None else weights_B.contiguous(),
        out_BD,
        None if y_BD is None else partials,
        sources,
        tokens,
        k,
        n_features,
        D=d_model,
        BLOCK_D=config.block_d,
        UNROLL=config.unroll,
        ACC=ACCUMULATOR[W_dec_SFD.dtype],
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return out_BD, partials
