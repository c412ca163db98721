"""Gradients of decode and encode with respect to weights, and of decode with respect to activations.

Feature-major: a program sums what the slots of one feature (entries of a `FeatureCSR`) add to its weight row, reading
each token's gradient once for both the row and the activations. The sum of a feature ends in registers and is stored,
or updates the weights by an Adam step at once, without a stored weight gradient. A feature with more than SPLIT slots
is cut into parts, kept in scratch memory, that a second kernel adds in order. No atomics: same bits every time.
"""

import triton
from torch import Tensor

from clt.kernels.common import csr as grouping
from clt.kernels.common.adam import RowAdamState
from clt.kernels.common.csr import FeatureCSR
from clt.kernels.common.dtypes import accumulator
from clt.kernels.common.interface import DecoderGradInputs, EncoderGradInputs
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
    """Launches the kernels; outputs that are None are not computed; with a state, W is updated in place."""
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


def _sum_decoder(
    inputs: DecoderGradInputs,
    config: GatherConfig | None,
    grad_W_SFD: Tensor | None,
    state: RowAdamState | None = None,
    hyper: Tensor | None = None,
) -> Tensor:
    """`_sum_features` of a decoder; returns grad_values [S,B,K] in the accumulator's dtype."""
    grad_BD, values_SBK, W_SFD = inputs.grad_BD, inputs.values_SBK, inputs.W_dec_SFD
    grad_values = grad_BD.new_empty(values_SBK.shape, dtype=accumulator(W_SFD.dtype))
    _sum_features(
        grad_BD.contiguous(),
        values_SBK.flatten(1).contiguous(),
        inputs.csr,
        W_SFD.shape[1],
        config or _config("decoder_grad", grad_BD, values_SBK, W_SFD.shape[1]),
        weights_B=inputs.weights_B,
        scale=inputs.scale,
        W_SFD=W_SFD.contiguous(),
        grad_W_SFD=grad_W_SFD,
        grad_values_SN=grad_values.flatten(1),
        state=state,
        hyper=hyper,
    )
    return grad_values


def decoder_grad(
    inputs: DecoderGradInputs, need_W: bool = True, config: GatherConfig | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `KernelBackend.decoder_grad`; rows of grad are read once, indices from the grouping.

    `config` holds launch settings, None for those of the table.
    """
    W_SFD = inputs.W_dec_SFD
    grad_W = W_SFD.new_empty(W_SFD.shape) if need_W else None
    return _sum_decoder(inputs, config, grad_W), grad_W


def decoder_step_(
    inputs: DecoderGradInputs, state: RowAdamState, hyper: Tensor, config: GatherConfig | None = None
) -> Tensor:
    """`decoder_grad`, and an Adam step of the decoders by a gradient that is never stored.

    Args:
        inputs: of the gradients; rows of the contiguous decoders whose feature has a slot are updated.
        state: moments of the decoders; updated for features with a slot.
        hyper: [9] from `RowAdam.hyper`.
        config: launch settings, None for those of the table.

    Returns:
        grad_values [S,B,K] at the old decoders, in the accumulator's dtype, 0 in empty slots.
    """
    assert inputs.W_dec_SFD.is_contiguous()
    grad_values = _sum_decoder(inputs, config, None, state, hyper)
    state.touch(inputs.csr.touched(), hyper)
    return grad_values


def _sum_encoder(
    inputs: EncoderGradInputs,
    config: GatherConfig | None,
    grad_b: Tensor,
    *,
    grad_W_FD: Tensor | None = None,
    W_FD: Tensor | None = None,
    state: RowAdamState | None = None,
    hyper: Tensor | None = None,
) -> None:
    """`_sum_features` of an encoder, whose gradient of the bias goes to grad_b."""
    _sum_features(
        inputs.x_BD.contiguous(),
        inputs.grad_values_BK.reshape(1, -1).contiguous(),
        inputs.csr,
        inputs.n_features,
        config or _config("encoder_grad", inputs.x_BD, inputs.grad_values_BK, inputs.n_features),
        W_SFD=W_FD,
        grad_W_SFD=grad_W_FD,
        grad_bias_SF=grad_b,
        state=state,
        hyper=hyper,
    )


def encoder_grad(inputs: EncoderGradInputs, config: GatherConfig | None = None) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.encoder_grad`."""
    grad_W, grad_b = (inputs.x_BD.new_empty(inputs.n_features, *rest) for rest in (inputs.x_BD.shape[1:], ()))
    _sum_encoder(inputs, config, grad_b, grad_W_FD=grad_W)
    return grad_W, grad_b


def encoder_step_(
    inputs: EncoderGradInputs,
    W_enc_FD: Tensor,
    state: RowAdamState,
    hyper: Tensor,
    config: GatherConfig | None = None,
) -> Tensor:
    """`encoder_grad`, and an Adam step of the encoder weights by a gradient that is never stored.

    Args:
        inputs: of the gradients.
        W_enc_FD: [F,D] encoder weights, contiguous; rows of features with a slot are updated.
        state: moments of the weights; updated for features with a slot.
        hyper: [9] from `RowAdam.hyper`.
        config: launch settings, None for those of the table.

    Returns:
        grad_b [F] in the dtype of x; the bias is not updated.
    """
    assert W_enc_FD.is_contiguous()
    # Programs of features without a slot end before they would write.
    grad_b = inputs.x_BD.new_zeros(len(W_enc_FD))
    _sum_encoder(inputs, config, grad_b, W_FD=W_enc_FD, state=state, hyper=hyper)
    state.touch(inputs.csr.touched()[0], hyper)
    return grad_b
