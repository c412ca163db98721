"""Triton backend: exact TopK, gathers over all sources and feature-major gradients; dense products where those win.

The functions are those of `clt.kernels.pytorch.reference`. `decoder_step_` and `encoder_step_` update weights while
their gradient is in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clt.kernels.common.adam import RowAdamState
from clt.kernels.common.csr import FeatureCSR
from clt.kernels.gpu import configs
from clt.kernels.gpu import decode as gather
from clt.kernels.gpu import grad as feature_major
from clt.kernels.gpu.encode import encode_topk
from clt.kernels.gpu.optim import row_adam_
from clt.kernels.gpu.select import select_topk
from clt.kernels.gpu.threshold import batch_threshold, select_above
from clt.kernels.pytorch import dense

__all__ = [
    "batch_threshold",
    "decode",
    "decode_loss",
    "decoder_grad",
    "decoder_step_",
    "encode_topk",
    "encoder_grad",
    "encoder_step_",
    "row_adam_",
    "select_above",
    "select_topk",
]


def _is_dense(op: str, codes: Tensor, weight_shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether products over all F features win for codes [..,B,K] and weights [..,F,D]."""
    tokens, k = codes.shape[-2:]
    n_features, d_model = weight_shape[-2:]
    return configs.path(op, n_features, k, dtype, d_model, tokens) == "dense"


def decode(
    values_SBK: Tensor, indices_SBK: Tensor, W_dec_SFD: Tensor, b_dec_D: Tensor, skip_BD: Tensor | None
) -> Tensor:
    """Sum over sources and slots of value times decoder vector, plus bias and skip, as in `clt.kernels.ops.decode`."""
    is_dense = _is_dense("decode", values_SBK, W_dec_SFD.shape, W_dec_SFD.dtype)
    run = dense.decode if is_dense else gather.decode
    return run(values_SBK, indices_SBK, W_dec_SFD, b_dec_D, skip_BD)


def decode_loss(
    values_SBK: Tensor,
    indices_SBK: Tensor,
    W_dec_SFD: Tensor,
    b_dec_D: Tensor,
    y_BD: Tensor,
    weights_B: Tensor | None,
    skip_BD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weighted squared error of a reconstruction and its residual, as in `clt.kernels.ops.decode_loss`."""
    is_dense = _is_dense("decode", values_SBK, W_dec_SFD.shape, W_dec_SFD.dtype)
    run = dense.decode_loss if is_dense else gather.decode_loss
    return run(values_SBK, indices_SBK, W_dec_SFD, b_dec_D, y_BD, weights_B, skip_BD)


def decoder_grad(
    grad_BD: Tensor,
    values_SBK: Tensor,
    indices_SBK: Tensor,
    W_dec_SFD: Tensor,
    csr: FeatureCSR,
    weights_B: Tensor | None,
    scale: Tensor | None,
    need_W: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `decode`, as in `clt.kernels.pytorch.reference.decoder_grad`."""
    if _is_dense("decoder_grad", values_SBK, W_dec_SFD.shape, W_dec_SFD.dtype):
        return dense.decoder_grad(grad_BD, values_SBK, indices_SBK, W_dec_SFD, weights_B, scale, need_W)
    return feature_major.decoder_grad(grad_BD, values_SBK, indices_SBK, W_dec_SFD, csr, weights_B, scale, need_W)


def encoder_grad(
    grad_values_BK: Tensor, values_BK: Tensor, indices_BK: Tensor, x_BD: Tensor, n_features: int, csr: FeatureCSR
) -> tuple[Tensor, Tensor]:
    """Gradients of `encode_topk`, as in `clt.kernels.pytorch.reference.encoder_grad`."""
    if _is_dense("encoder_grad", values_BK, (n_features, x_BD.shape[1]), x_BD.dtype):
        return dense.encoder_grad(grad_values_BK, values_BK, indices_BK, x_BD, n_features)
    return feature_major.encoder_grad(grad_values_BK, values_BK, indices_BK, x_BD, n_features, csr)


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
) -> Tensor:
    """`decoder_grad` and an Adam step of the decoders, as in `clt.kernels.ops.decoder_step_`."""
    if not _is_dense("decoder_grad", values_SBK, W_dec_SFD.shape, W_dec_SFD.dtype):
        return feature_major.decoder_step_(
            grad_BD, values_SBK, indices_SBK, W_dec_SFD, csr, weights_B, scale, state, hyper
        )
    grad_values, grad_W = dense.decoder_grad(grad_BD, values_SBK, indices_SBK, W_dec_SFD, weights_B, scale)
    assert grad_W is not None
    row_adam_(W_dec_SFD, grad_W, state, hyper, csr.touched())
    return grad_values


def encoder_step_(
    grad_values_BK: Tensor,
    values_BK: Tensor,
    indices_BK: Tensor,
    x_BD: Tensor,
    W_enc_FD: Tensor,
    csr: FeatureCSR,
    state: RowAdamState,
    hyper: Tensor,
) -> Tensor:
    """`encoder_grad` and an Adam step of the encoder, as in `clt.kernels.ops.encoder_step_`."""
    if not _is_dense("encoder_grad", values_BK, W_enc_FD.shape, W_enc_FD.dtype):
        return feature_major.encoder_step_(grad_values_BK, values_BK, indices_BK, x_BD, W_enc_FD, csr, state, hyper)
    grad_W, grad_b = dense.encoder_grad(grad_values_BK, values_BK, indices_BK, x_BD, len(W_enc_FD))
    row_adam_(W_enc_FD, grad_W, state, hyper, csr.touched()[0])
    return grad_b
