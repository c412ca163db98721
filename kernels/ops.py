"""Public entry to the kernels: checks arguments and calls the registered operators.

Shape letters: L layers, S source layers of one target, B tokens, D d_model, F features per layer, K slots per token and
layer. A slot holds an activation and a feature number; slots ascend by feature number, empty slots (value 0, index 0)
come last and get no gradient. All implementations (`use_backend`) give the same features; values and gradients agree
within rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clt.kernels import library
from clt.kernels.backend import backend_of, device_guard, implementation, use_backend
from clt.kernels.common.adam import RowAdam, RowAdamState
from clt.kernels.common.checks import check_k, fit, fit_decode, fit_encoder, fit_grad
from clt.kernels.common.csr import FeatureCSR
from clt.kernels.pytorch import reference

__all__ = [
    "FeatureCSR",
    "RowAdam",
    "RowAdamState",
    "backend_of",
    "batch_threshold",
    "decode",
    "decode_loss",
    "decoder_grad",
    "decoder_step_",
    "encode_selected",
    "encode_topk",
    "encoder_grad",
    "encoder_step_",
    "feature_csr",
    "preactivations",
    "row_adam_",
    "select_above",
    "select_topk",
    "token_threshold",
    "use_backend",
]


def encode_topk(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Activations of the k largest positive features: TopK(ReLU(x W_enc^T + b_enc)).

    Args:
        x_BD: [B,D] encoder inputs.
        W_enc_FD: [F,D] encoder weights, same dtype.
        b_enc_F: [F] encoder bias, same dtype; -inf excludes a feature.
        k: slots per token.

    Returns:
        values [B,K], differentiable with respect to all three tensors, and indices [B,K] int32, ascending; empty slots
        come last with value 0 and index 0 and get no gradient. Ties go to the lowest feature number. A NaN ranks
        above everything.

    Raises:
        ValueError: shapes do not fit or k is not in 1..F.
    """
    fit("encode_topk", x=(x_BD, "BD"), W_enc=(W_enc_FD, "FD"), b_enc=(b_enc_F, "F"))
    check_k("encode_topk", k, len(W_enc_FD))
    return library.encode_topk(x_BD, W_enc_FD, b_enc_F, k)


def preactivations(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor) -> Tensor:
    """x W_enc^T + b_enc for selections that need all of it; not differentiable (see `encode_selected`).

    Args:
        x_BD: [B,D] encoder inputs.
        W_enc_FD: [F,D] encoder weights, same dtype.
        b_enc_F: [F] encoder bias, same dtype.

    Returns:
        [B,F] in the dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    fit("preactivations", x=(x_BD, "BD"), W_enc=(W_enc_FD, "FD"), b_enc=(b_enc_F, "F"))
    return implementation(x_BD).preactivations(x_BD.detach(), W_enc_FD.detach(), b_enc_F.detach())


def encode_selected(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, values_BK: Tensor, indices_BK: Tensor) -> Tensor:
    """Makes activations that some rule selected differentiable, as those of `encode_topk` are.

    Args:
        x_BD: [B,D] encoder inputs.
        W_enc_FD: [F,D] encoder weights, same dtype.
        b_enc_F: [F] encoder bias, same dtype.
        values_BK: [B,K] the selected entries of `preactivations`, 0 in empty slots.
        indices_BK: [B,K] int32 feature numbers, ascending, empty slots last as 0.

    Returns:
        The same values [B,K], differentiable with respect to x, W_enc and b_enc; the selection is a constant.

    Raises:
        ValueError: shapes do not fit.
    """
    fit_encoder("encode_selected", values_BK, values_BK, indices_BK, x_BD)
    fit("encode_selected", x=(x_BD, "BD"), W_enc=(W_enc_FD, "FD"), b_enc=(b_enc_F, "F"))
    return library.encode_selected(x_BD, W_enc_FD, b_enc_F, values_BK.detach(), indices_BK)


def select_topk(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest positive pre-activations of each token; not differentiable.

    Args:
        pre_BF: [B,F] pre-activations.
        k: slots per token.

    Returns:
        values [B,K] and indices [B,K] int32, as `encode_topk` gives them.

    Raises:
        ValueError: k is not in 1..F.
    """
    fit("select_topk", pre=(pre_BF, "BF"))
    check_k("select_topk", k, pre_BF.shape[1])
    return library.select_topk(pre_BF.detach(), k)


def feature_csr(values_LBK: Tensor, indices_LBK: Tensor, n_features: int) -> FeatureCSR:
    """Groups the slots of codes by feature; built once per step and shared by every backward pass over the codes.

    Args:
        values_LBK: [L,B,K] activations.
        indices_LBK: [L,B,K] int32 feature numbers.
        n_features: F.

    Returns:
        The grouping; index it with a slice of layers.

    Raises:
        ValueError: shapes do not fit.
    """
    fit("feature_csr", values=(values_LBK, "LBK"), indices=(indices_LBK, "LBK"))
    return FeatureCSR.from_tensors(library.feature_csr(values_LBK.detach(), indices_LBK, n_features))


def decode(
    values_SBK: Tensor,
    indices_SBK: Tensor,
    W_dec_SFD: Tensor,
    b_dec_D: Tensor,
    skip_BD: Tensor | None = None,
    csr: FeatureCSR | None = None,
) -> Tensor:
    """Reconstruction of one target layer from the codes of its S source layers.

    Args:
        values_SBK: [S,B,K] activations; slots with value 0 are empty.
        indices_SBK: [S,B,K] int32 feature numbers.
        W_dec_SFD: [S,F,D] decoders from each source into this target.
        b_dec_D: [D] bias.
        skip_BD: [B,D] added to the sum, or None.
        csr: grouping of these S layers; None to build it in the backward pass.

    Returns:
        [B,D] in the dtype of the decoders, differentiable with respect to values, decoders, bias and skip.

    Raises:
        ValueError: shapes do not fit.
    """
    fit_decode("decode", values_SBK, indices_SBK, W_dec_SFD, b_dec_D, skip=(skip_BD, "BD"))
    return library.decode(values_SBK, indices_SBK, W_dec_SFD, b_dec_D, skip_BD, _tensors(csr))


def decode_loss(
    values_SBK: Tensor,
    indices_SBK: Tensor,
    W_dec_SFD: Tensor,
    b_dec_D: Tensor,
    y_BD: Tensor,
    weights_B: Tensor | None = None,
    skip_BD: Tensor | None = None,
    csr: FeatureCSR | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared error of a reconstruction, without storing the reconstruction.

    Args:
        values_SBK: [S,B,K] activations; slots with value 0 are empty.
        indices_SBK: [S,B,K] int32 feature numbers.
        W_dec_SFD: [S,F,D] decoders from each source into this target.
        b_dec_D: [D] bias.
        y_BD: [B,D] target of the reconstruction; gets no gradient.
        weights_B: [B] weight of each token; None for 1/B.
        skip_BD: [B,D] added to the reconstruction, or None.
        csr: grouping of these S layers; None to build it in the backward pass.

    Returns:
        error [], the weighted sum over tokens of the mean over channels of the squared residual, float32 (float64 for
        float64 decoders), differentiable with respect to values, decoders, bias and skip; and residual [B,D],
        reconstruction - y in the dtype of the decoders, detached.

    Raises:
        ValueError: shapes do not fit.
    """
    fit_decode(
        "decode_loss",
        values_SBK,
        indices_SBK,
        W_dec_SFD,
        b_dec_D,
        y=(y_BD, "BD"),
        weights=(weights_B, "B"),
        skip=(skip_BD, "BD"),
    )
    return library.decode_loss(
        values_SBK, indices_SBK, W_dec_SFD, b_dec_D, y_BD.detach(), weights_B, skip_BD, _tensors(csr)
    )


def decoder_grad(
    grad_BD: Tensor,
    values_SBK: Tensor,
    indices_SBK: Tensor,
    W_dec_SFD: Tensor,
    csr: FeatureCSR,
    weights_B: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `decode` with respect to activations and decoders, from one read of the reconstruction's gradient.

    Args:
        grad_BD: [B,D] gradient of the reconstruction, up to the two factors below.
        values_SBK: [S,B,K] activations.
        indices_SBK: [S,B,K] int32 feature numbers.
        W_dec_SFD: [S,F,D] decoders.
        csr: grouping of these S layers.
        weights_B: [B] factor per token, None for 1.
        scale: [] factor, None for 1.

    Returns:
        grad_values [S,B,K] float32 (float64 for float64 decoders), 0 in empty slots, and grad_W [S,F,D] in the dtype
        of the decoders.

    Raises:
        ValueError: shapes do not fit.
    """
    fit_grad("decoder_grad", grad_BD, values_SBK, indices_SBK, W_dec_SFD, weights_B, scale)
    grads = library.decoder_grad(grad_BD, values_SBK, indices_SBK, W_dec_SFD, csr.tensors(), weights_B, scale, True)
    return grads[0], grads[1]


def encoder_grad(
    grad_values_BK: Tensor, values_BK: Tensor, indices_BK: Tensor, x_BD: Tensor, n_features: int, csr: FeatureCSR
) -> tuple[Tensor, Tensor]:
    """Gradients of `encode_topk` with respect to weights and bias.

    Args:
        grad_values_BK: [B,K] gradient of the activations; ignored in empty slots.
        values_BK: [B,K] activations.
        indices_BK: [B,K] int32 feature numbers.
        x_BD: [B,D] encoder inputs.
        n_features: F.
        csr: grouping of this one layer.

    Returns:
        grad_W [F,D] and grad_b [F] in the dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    fit_encoder("encoder_grad", grad_values_BK, values_BK, indices_BK, x_BD)
    return library.encoder_grad(grad_values_BK, values_BK, indices_BK, x_BD, n_features, csr.tensors())


@torch.no_grad()
def decoder_step_(
    grad_BD: Tensor,
    values_SBK: Tensor,
    indices_SBK: Tensor,
    W_dec_SFD: Tensor,
    csr: FeatureCSR,
    state: RowAdamState,
    hyper: Tensor,
    weights_B: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """`decoder_grad`, and Adam on the decoders of active features in place: their gradient is never stored.

    Excludes clipping by the norm of this step's gradient and accumulation over micro-batches.

    Args:
        grad_BD: [B,D] gradient of the reconstruction, up to the two factors below.
        values_SBK: [S,B,K] activations.
        indices_SBK: [S,B,K] int32 feature numbers.
        W_dec_SFD: [S,F,D] decoders; updated.
        csr: grouping of these S layers.
        state: moments of the decoders; updated.
        hyper: from `RowAdam.hyper`.
        weights_B: [B] factor per token, None for 1.
        scale: [] factor, None for 1.

    Returns:
        grad_values [S,B,K] float32 (float64 for float64 decoders), taken with the weights before the update.

    Raises:
        ValueError: shapes do not fit.
    """
    fit_grad("decoder_step_", grad_BD, values_SBK, indices_SBK, W_dec_SFD, weights_B, scale)
    return library.decoder_step_(
        grad_BD, values_SBK, indices_SBK, W_dec_SFD, csr.tensors(), weights_B, scale, state.tensors(), state.seed, hyper
    )


@torch.no_grad()
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
    """`encoder_grad`, and Adam on the encoder rows of active features in place: their gradient is never stored.

    Args:
        grad_values_BK: [B,K] gradient of the activations; ignored in empty slots.
        values_BK: [B,K] activations.
        indices_BK: [B,K] int32 feature numbers.
        x_BD: [B,D] encoder inputs.
        W_enc_FD: [F,D] encoder; updated.
        csr: grouping of this one layer.
        state: moments of the encoder; updated.
        hyper: from `RowAdam.hyper`.

    Returns:
        grad_b [F] in the dtype of x; the caller updates the bias.

    Raises:
        ValueError: shapes do not fit.
    """
    fit_encoder("encoder_step_", grad_values_BK, values_BK, indices_BK, x_BD)
    return library.encoder_step_(
        grad_values_BK, values_BK, indices_BK, x_BD, W_enc_FD, csr.tensors(), state.tensors(), state.seed, hyper
    )


@torch.no_grad()
def row_adam_(param: Tensor, grad: Tensor, state: RowAdamState, hyper: Tensor, touched: Tensor) -> None:
    """One Adam step on the touched rows of a parameter, in place.

    Args:
        param: [..,F,D] parameter; updated.
        grad: its gradient.
        state: its moments; updated.
        hyper: from `RowAdam.hyper`.
        touched: [..,F] bool; other rows and their moments are neither read nor written.

    Raises:
        ValueError: shapes do not fit.
    """
    if param.shape != grad.shape or touched.shape != param.shape[:-1] or state.v_RD.numel() != param.numel():
        raise ValueError(
            f"row_adam_: param {tuple(param.shape)}, grad {tuple(grad.shape)}, touched {tuple(touched.shape)} and "
            f"moments {tuple(state.v_RD.shape)} do not fit"
        )
    library.row_adam_(param, grad, state.tensors(), state.seed, hyper, touched)


def batch_threshold(pre_BF: Tensor, n: int, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The n-th largest positive pre-activation of a whole batch (BatchTopK; Bussmann et al. 2024, section 3).

    Args:
        pre_BF: [B,F] pre-activations; rows may be tokens of several layers.
        n: activations wanted over the batch.
        reduce: sums a small int64 tensor of counts over the ranks that hold the rest of the batch, or None.

    Returns:
        threshold [] in the dtype of pre, 0 if fewer than n are positive, and quota [] int64: how many of those equal
        to it are wanted.

    Raises:
        ValueError: n is not positive.
    """
    fit("batch_threshold", pre=(pre_BF, "BF"))
    if n < 1:
        raise ValueError(f"batch_threshold: n={n} must be positive")
    with device_guard(pre_BF):
        return implementation(pre_BF).batch_threshold(pre_BF.detach(), n, reduce)


def token_threshold(pre_BN: Tensor, n: int, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The n-th largest positive entry of every token: `batch_threshold` for each token by itself.

    Args:
        pre_BN: [B,N] candidates of each token, few enough to sort; empty ones are 0.
        n: activations wanted of a token.
        reduce: sums [B,256] int64 counts over the ranks that hold other candidates of the same tokens, or None.

    Returns:
        threshold [B] in the dtype of pre, 0 for a token with fewer than n positive entries, and quota [B] int64: how
        many of those equal to it are wanted.

    Raises:
        ValueError: n is not positive.
    """
    fit("token_threshold", pre=(pre_BN, "BN"))
    if n < 1:
        raise ValueError(f"token_threshold: n={n} must be positive")
    return reference.token_threshold(pre_BN.detach(), n, reduce)


def select_above(pre_BF: Tensor, threshold: Tensor, quota: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the pre-activations above a threshold, and of the first `quota` equal to it in (token, feature) order.

    Args:
        pre_BF: [B,F] pre-activations.
        threshold: [] from `batch_threshold`.
        quota: [] int64 from `batch_threshold`.
        capacity: slots per token, C.

    Returns:
        values [B,C] and indices [B,C] int32 as `encode_topk` gives them, and counts [B] int32 of all selected; a token
        whose count exceeds C kept its lowest feature numbers only.

    Raises:
        ValueError: capacity is not in 1..F.
    """
    fit("select_above", pre=(pre_BF, "BF"))
    check_k("select_above", capacity, pre_BF.shape[1])
    with device_guard(pre_BF):
        return implementation(pre_BF).select_above(pre_BF.detach(), threshold, quota, capacity)


def _tensors(csr: FeatureCSR | None) -> list[Tensor]:
    return [] if csr is None else csr.tensors()
