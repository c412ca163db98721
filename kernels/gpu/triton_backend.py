"""Triton backend: exact TopK, gathers over all sources and feature-major gradients; dense products where faster.

The functions are those of `clt.kernels.pytorch.reference`. `decoder_step_` and `encoder_step_` update weights while
their gradient is in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clt.kernels.common.adam import RowAdamState
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs, StoredGradientSteps
from clt.kernels.gpu import configs
from clt.kernels.gpu import decode as gather
from clt.kernels.gpu import grad as feature_major
from clt.kernels.gpu.encode import encode_topk
from clt.kernels.gpu.optim import row_adam_
from clt.kernels.gpu.select import select_topk
from clt.kernels.gpu.threshold import batch_threshold, select_above
from clt.kernels.pytorch import dense
from clt.kernels.pytorch.dense import preactivations

__all__ = [
    "batch_threshold",
    "decode",
    "decode_loss",
    "decoder_grad",
    "decoder_step_",
    "encode_topk",
    "encoder_grad",
    "encoder_step_",
    "preactivations",
    "row_adam_",
    "select_above",
    "select_topk",
]


_dense_steps = StoredGradientSteps(dense.decoder_grad, dense.encoder_grad, row_adam_)


def _is_dense(op: str, codes: Tensor, weight_shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """True if products over all F features are faster than gathers, for codes [..,B,K] and weights [..,F,D]."""
    tokens, k = codes.shape[-2:]
    n_features, d_model = weight_shape[-2:]
    return configs.path(op, n_features, k, dtype, d_model, tokens) == "dense"


def _dense_decode(inputs: DecodeInputs) -> bool:
    return _is_dense("decode", inputs.values_SBK, inputs.W_dec_SFD.shape, inputs.W_dec_SFD.dtype)


def decode(inputs: DecodeInputs) -> Tensor:
    """See `KernelBackend.decode`."""
    return dense.decode(inputs) if _dense_decode(inputs) else gather.decode(inputs)


def decode_loss(inputs: DecodeInputs, y_BD: Tensor, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.decode_loss`."""
    run = dense.decode_loss if _dense_decode(inputs) else gather.decode_loss
    return run(inputs, y_BD, weights_B)


def _dense_decoder(inputs: DecoderGradInputs) -> bool:
    return _is_dense("decoder_grad", inputs.values_SBK, inputs.W_dec_SFD.shape, inputs.W_dec_SFD.dtype)


def _dense_encoder(inputs: EncoderGradInputs) -> bool:
    x_BD = inputs.x_BD
    return _is_dense("encoder_grad", inputs.values_BK, (inputs.n_features, x_BD.shape[1]), x_BD.dtype)


def decoder_grad(inputs: DecoderGradInputs, need_W: bool = True) -> tuple[Tensor, Tensor | None]:
    """See `KernelBackend.decoder_grad`."""
    run = dense.decoder_grad if _dense_decoder(inputs) else feature_major.decoder_grad
    return run(inputs, need_W)


def encoder_grad(inputs: EncoderGradInputs) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.encoder_grad`."""
    return dense.encoder_grad(inputs) if _dense_encoder(inputs) else feature_major.encoder_grad(inputs)


def decoder_step_(inputs: DecoderGradInputs, state: RowAdamState, hyper: Tensor) -> Tensor:
    """See `KernelBackend.decoder_step_`; one kernel where gathering is faster."""
    run = _dense_steps.decoder_step_ if _dense_decoder(inputs) else feature_major.decoder_step_
    return run(inputs, state, hyper)


def encoder_step_(inputs: EncoderGradInputs, W_enc_FD: Tensor, state: RowAdamState, hyper: Tensor) -> Tensor:
    """See `KernelBackend.encoder_step_`; one kernel where gathering is faster."""
    run = _dense_steps.encoder_step_ if _dense_encoder(inputs) else feature_major.encoder_step_
    return run(inputs, W_enc_FD, state, hyper)
