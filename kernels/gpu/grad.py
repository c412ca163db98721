"""Gradients of decode and encode with respect to weights, and of decode with respect to activations.

Feature-major: a program sums what the slots of one feature (entries of a `FeatureCSR`) add to its weight row, reading
each token's gradient once for both the row and the activations. The sum of a feature ends in registers and is stored,
or moves the weights by an Adam step at once, so that no weight gradient is stored. A feature with more than SPLIT slots
is cut into parts that lie in scratch memory until a second kernel adds them in order. No atomics: same bits every time.
"""

import triton
from torch import Tensor

from clt.kernels.common import csr as grouping
from clt.kernels.common.adam import RowAdamState
from clt.kernels.common.csr import FeatureCSR
from clt.kernels.common.dtypes import accumulator
from clt.kernels.gpu.configs import GatherConfig, gather_config
from clt.kernels.gpu.grad_kernels import feature_kernel, join_kernel, slot_grad_kernel
from clt.kernels.gpu.language import ACCUMULATOR
from clt.kernels.gpu.optim import moment_tensors, whole_groups

#: Scratch memory of one launch; sources are launched in groups that stay below it.
SCRATCH_BYTES = 1 << 29

#: Slots that one program of the last kernel finishes.
_SLOT_BLOCK = 1024


def _sum_features(
    rows_BD: Tensor,
    coefficients_SN: Tensor,
    csr: FeatureCSR,
    n_features: int,
    config: GatherConfig,
    *,
    weights_B: Tensor | None = None,
    scale: Tensor | None = None,
    W_SFD: Tensor | None = None,
    grad_W_SFD: Tensor | None = None,
    grad_bias_SF: Tensor | None = None,
    grad_values_SN: Tensor | None = None,
    state: RowAdamState | None = None,
    hyper: Tensor | None = None,
) -> None:
    """Launches the kernels; outputs that are None are not computed, a state says that W is moved."""
    sources, slots = coefficients_SN.shape
    tokens, d_model = rows_BD.shape
    spills = csr.spill_feature.shape[1]
    config = whole_groups(config, state)
    chunks = triton.cdiv(d_model, config.block_d)
    wide, acc = accumulator(rows_BD.dtype), ACCUMULATOR[rows_BD.dtype]
    weights_B = None if weights_B is None else weights_B.contiguous()
    outputs = (scale, W_SFD, grad_W_SFD, grad_bias_SF)
    last_step, seed = (state.last_step_R, state.seed) if state else (None, 0)
    adam = (*moment_tensors(state), last_step, hyper, seed)
    shape = {"D": d_model, "BLOCK_D": config.block_d, "UNROLL": config.unroll, "ACC": acc}
    launch = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    group = max(1, SCRATCH_BYTES // (wide.itemsize * max(1, 2 * spills * d_model, chunks * slots)))
    for first in range(0, sources, group):
        count = min(group, sources - first)
        dots = parts = totals = None
        if grad_values_SN is not None:
            dots = rows_BD.new_empty(chunks, count, slots, dtype=wide)
        if grad_W_SFD is not None or state is not None:
            parts = rows_BD.new_empty(count, 2 * spills, d_model, dtype=wide)
        if grad_bias_SF is not None:
            totals = rows_BD.new_empty(count, 2 * spills, dtype=wide)
        feature_kernel[(spills + n_features, count, chunks)](
            *(rows_BD, coefficients_SN, weights_B, *outputs, dots, parts, totals, *csr.tensors(), *adam),
            *(first, slots, n_features, spills, grouping.SPLIT),
            **shape,
            **launch,
        )
        if parts is not None and spills > 0:
            join_kernel[(spills, count, chunks)](
                *(parts, totals, csr.spill_bounds, csr.spill_feature, *outputs, *adam, first, n_features, spills),
                **shape,
                **launch,
            )
        if grad_values_SN is not None:
            own = slice(first, first + count)
            slot_grad_kernel[(triton.cdiv(count * slots, _SLOT_BLOCK),)](
                *(dots, coefficients_SN[own], weights_B, scale, grad_values_SN[own]),
                *(count * slots, tokens, slots // tokens, chunks, _SLOT_BLOCK, acc),
            )


def _config(op: str, rows_BD: Tensor, values: Tensor, n_features: int) -> GatherConfig:
    return gather_config(op, rows_BD.dtype, rows_BD.shape[1], n_features, values.shape[-1], len(rows_BD))


def decoder_grad(
    grad_BD: Tensor,
    values_SBK: Tensor,
    indices_SBK: Tensor,
    W_dec_SFD: Tensor,
    csr: FeatureCSR,
    weights_B: Tensor | None,
    scale: Tensor | None,
    need_W: bool = True,
    config: GatherConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `decode` from one read of the rows of grad, as in `clt.kernels.pytorch.reference.decoder_grad`.

    Args:
        grad_BD: [B,D] gradient of the reconstruction, up to the two factors below.
        values_SBK: [S,B,K] activations.
        indices_SBK: [S,B,K] int32 feature numbers; the grouping holds all that is needed of them.
        W_dec_SFD: [S,F,D] decoders.
        csr: grouping of the S layers' slots.
        weights_B: [B] factor per token, or None for 1.
        scale: [] factor, or None for 1.
        need_W: whether the second gradient is wanted.
        config: launch settings, None for those of the table.

    Returns:
        grad_values [S,B,K] in the accumulator's dtype, 0 in empty slots, and grad_W [S,F,D] in the dtype of W_dec, or
        None.
    """
    grad_W = W_dec_SFD.new_empty(W_dec_SFD.shape) if need_W else None
    grad_values = grad_BD.new_empty(values_SBK.shape, dtype=accumulator(W_dec_SFD.dtype))
    _sum_features(
        grad_BD.contiguous(),
        values_SBK.flatten(1).contiguous(),
        csr,
        W_dec_SFD.shape[1],
        config or _config("decoder_grad", grad_BD, values_SBK, W_dec_SFD.shape[1]),
        weights_B=weights_B,
        scale=scale,
        W_SFD=W_dec_SFD.contiguous(),
        grad_W_SFD=grad_W,
        grad_values_SN=grad_values.flatten(1),
    )
    return grad_values, grad_W


def decoder_step_(
    grad_BD: Tensor,
    values_SBK: Tensor,
    indices_SBK: Tensor,
    W_dec_SFD: Tensor,
    csr: FeatureCSR,
    weights_B: Tensor | None,
    scale: Tensor | None,
    state: RowAdamState,
    hyper: Tensor,
    config: GatherConfig | None = None,
) -> Tensor:
    """`decoder_grad`, and an Adam step of the decoders by a gradient that is never stored.

    Args:
        W_dec_SFD: [S,F,D] decoders, contiguous; rows of features with a slot are moved.
        state: moments of the decoders; moved to this step for features with a slot.
        hyper: [9] from `RowAdam.hyper`.
        grad_BD, values_SBK, indices_SBK, csr, weights_B, scale, config: as there.

    Returns:
        grad_values [S,B,K] at the old decoders, in the accumulator's dtype, 0 in empty slots.
    """
    assert W_dec_SFD.is_contiguous()
    grad_values = grad_BD.new_empty(values_SBK.shape, dtype=accumulator(W_dec_SFD.dtype))
    _sum_features(
        grad_BD.contiguous(),
        values_SBK.flatten(1).contiguous(),
        csr,
        W_dec_SFD.shape[1],
        config or _config("decoder_grad", grad_BD, values_SBK, W_dec_SFD.shape[1]),
        weights_B=weights_B,
        scale=scale,
        W_SFD=W_dec_SFD,
        grad_values_SN=grad_values.flatten(1),
        state=state,
        hyper=hyper,
    )
    state.touch(csr.touched(), hyper)
    return grad_values


def encoder_grad(
    grad_values_BK: Tensor,
    values_BK: Tensor,
    indices_BK: Tensor,
    x_BD: Tensor,
    n_features: int,
    csr: FeatureCSR,
    config: GatherConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `encode_topk` with respect to weights and bias, as in `clt.kernels.pytorch.reference.encoder_grad`.

    Args:
        grad_values_BK: [B,K] gradient of the activations; ignored in empty slots.
        values_BK: [B,K] activations; the grouping holds all that is needed of them.
        indices_BK: [B,K] int32 feature numbers; likewise.
        x_BD: [B,D] encoder inputs.
        n_features: F.
        csr: grouping of this one layer's slots.
        config: launch settings, None for those of the table.

    Returns:
        grad_W [F,D] and grad_b [F] in the dtype of x.
    """
    grad_W, grad_b = x_BD.new_empty(n_features, x_BD.shape[1]), x_BD.new_empty(n_features)
    config = config or _config("encoder_grad", x_BD, grad_values_BK, n_features)
    coefficients_SN = grad_values_BK.reshape(1, -1).contiguous()
    _sum_features(x_BD.contiguous(), coefficients_SN, csr, n_features, config, grad_W_SFD=grad_W, grad_bias_SF=grad_b)
    return grad_W, grad_b


def encoder_step_(
    grad_values_BK: Tensor,
    values_BK: Tensor,
    indices_BK: Tensor,
    x_BD: Tensor,
    W_enc_FD: Tensor,
    csr: FeatureCSR,
    state: RowAdamState,
    hyper: Tensor,
    config: GatherConfig | None = None,
) -> Tensor:
    """`encoder_grad`, and an Adam step of the encoder weights by a gradient that is never stored.

    Args:
        W_enc_FD: [F,D] encoder weights, contiguous; rows of features with a slot are moved.
        state: moments of the weights; moved to this step for features with a slot.
        hyper: [9] from `RowAdam.hyper`.
        grad_values_BK, values_BK, indices_BK, x_BD, csr, config: as there.

    Returns:
        grad_b [F] in the dtype of x; the bias is not moved.
    """
    assert W_enc_FD.is_contiguous()
    # Programs of features without a slot end before they would write.
    grad_b = x_BD.new_zeros(len(W_enc_FD))
    _sum_features(
        x_BD.contiguous(),
        grad_values_BK.reshape(1, -1).contiguous(),
        csr,
        len(W_enc_FD),
        config or _config("encoder_grad", x_BD, grad_values_BK, len(W_enc_FD)),
        W_SFD=W_enc_FD,
        grad_bias_SF=grad_b,
        state=state,
        hyper=hyper,
    )
    state.touch(csr.touched()[0], hyper)
    return grad_b
