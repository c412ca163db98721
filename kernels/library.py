"""The operations as torch.library custom operators, with fake implementations for torch.compile, and gradients.

Each operator is documented by the function of the same name in `clt.kernels.ops`, which checks the arguments and then
calls it. Operators take no dataclasses: a `FeatureCSR` and a `RowAdamState` are passed as the lists of their tensors;
an empty grouping is built in the backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef

from clt.kernels.backend import device_guard, implementation
from clt.kernels.common.adam import RowAdamState
from clt.kernels.common.csr import SPLIT, FeatureCSR
from clt.kernels.common.dtypes import accumulator
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs

# No postponed annotations here: the operators' schemas are read from them.

P = ParamSpec("P")
R = TypeVar("R")


def _operator(*mutated: str) -> Callable[[Callable[P, R]], CustomOpDef]:
    """Registers a function as operator clt::<name>, run with its first argument's GPU current, as Triton needs it.

    Args:
        mutated: names of the arguments that the operator changes in place.
    """

    def register(run: Callable[P, R]) -> CustomOpDef:
        @functools.wraps(run)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            with device_guard(args[0]):  # type: ignore[arg-type]
                return run(*args, **kwargs)

        return torch.library.custom_op(f"clt::{run.__name__}", guarded, mutates_args=mutated)

    return register


@_operator()
def feature_csr(values: Tensor, indices: Tensor, n_features: int) -> list[Tensor]:
    return FeatureCSR.build(values, indices, n_features).tensors()


@feature_csr.register_fake
def _(values: Tensor, indices: Tensor, n_features: int) -> list[Tensor]:
    layers, slots = len(values), values.shape[1] * values.shape[2]
    widths = (n_features + 1, slots, slots, n_features + 1, slots // SPLIT)
    return [values.new_empty((layers, width), dtype=torch.int32) for width in widths]


@_operator()
def select_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return implementation(pre).select_topk(pre, k)


@_operator()
def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return implementation(x).encode_topk(x, W_enc, b_enc, k)


@select_topk.register_fake
def _(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return pre.new_empty((len(pre), k)), pre.new_empty((len(pre), k), dtype=torch.int32)


@encode_topk.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((len(x), k)), x.new_empty((len(x), k), dtype=torch.int32)


@_operator()
def encoder_grad(
    grad_values: Tensor, values: Tensor, indices: Tensor, x: Tensor, n_features: int, csr: list[Tensor]
) -> tuple[Tensor, Tensor]:
    grouping = FeatureCSR.from_tensors(csr)
    return implementation(x).encoder_grad(EncoderGradInputs(grad_values, values, indices, x, n_features, grouping))


@encoder_grad.register_fake
def _(
    grad_values: Tensor, values: Tensor, indices: Tensor, x: Tensor, n_features: int, csr: list[Tensor]
) -> tuple[Tensor, Tensor]:
    return x.new_empty((n_features, x.shape[1])), x.new_empty(n_features)


def _save_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, _, _ = inputs
    ctx.save_for_backward(x, W_enc, *output)
    ctx.mark_non_differentiable(output[1])


def _encode_backward(ctx: Any, grad_values: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, W_enc, values, indices = ctx.saved_tensors
    grad_x = grad_W = grad_b = None
    if ctx.needs_input_grad[0]:
        live = torch.where(values == 0, 0, grad_values)
        grad_x = decode(live[None], indices[None], W_enc[None], W_enc.new_zeros(W_enc.shape[1]), None, [])
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        csr = feature_csr(values[None], indices[None], len(W_enc))
        grad_W, grad_b = encoder_grad(grad_values, values, indices, x, len(W_enc), csr)
    return grad_x, grad_W, grad_b, None


encode_topk.register_autograd(_encode_backward, setup_context=_save_encode)


@_operator()
def encode_selected(x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return values.clone()


@encode_selected.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return torch.empty_like(values)


def _save_selected(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, W_enc, _, _, indices = inputs
    ctx.save_for_backward(x, W_enc, output, indices)


def _selected_backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
    return *_encode_backward(ctx, grad_values, None)[:3], None, None


encode_selected.register_autograd(_selected_backward, setup_context=_save_selected)


@_operator()
def decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, skip: Tensor | None, csr: list[Tensor]
) -> Tensor:
    return implementation(W_dec).decode(DecodeInputs(values, indices, W_dec, b_dec, skip))


@decode.register_fake
def _(values: Tensor, indices: Tensor, W_dec: Tensor, *_: Any) -> Tensor:
    return W_dec.new_empty((values.shape[1], W_dec.shape[2]))


@_operator()
def decode_loss(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    y: Tensor,
    weights: Tensor | None,
    skip: Tensor | None,
    csr: list[Tensor],
) -> tuple[Tensor, Tensor]:
    return implementation(W_dec).decode_loss(DecodeInputs(values, indices, W_dec, b_dec, skip), y, weights)


@decode_loss.register_fake
def _(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return W_dec.new_empty((), dtype=accumulator(W_dec.dtype)), W_dec.new_empty(y.shape)


@_operator()
def decoder_grad(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    csr: list[Tensor],
    weights: Tensor | None,
    scale: Tensor | None,
    need_W: bool,
) -> list[Tensor]:
    inputs = DecoderGradInputs(grad, values, indices, W_dec, FeatureCSR.from_tensors(csr), weights, scale)
    return [tensor for tensor in implementation(W_dec).decoder_grad(inputs, need_W) if tensor is not None]


@decoder_grad.register_fake
def _(grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, *rest: Any) -> list[Tensor]:
    *_, need_W = rest
    grad_values = values.new_empty(values.shape, dtype=accumulator(W_dec.dtype))
    return [grad_values, torch.empty_like(W_dec)] if need_W else [grad_values]


def _code_grads(
    ctx: Any,
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    csr: list[Tensor],
    weights: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of values and decoders, inputs 0 and 2 of both decoding operators, as far as they are wanted."""
    need_values, need_W = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    if not need_values and not need_W:
        return None, None
    csr = csr or feature_csr(values, indices, W_dec.shape[1])
    grads = decoder_grad(grad, values, indices, W_dec, csr, weights, scale, need_W)
    return grads[0].to(values.dtype), grads[1] if need_W else None


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, W_dec, _, _, csr = inputs
    ctx.save_for_backward(values, indices, W_dec, *csr)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, indices, W_dec, *csr = ctx.saved_tensors
    grad = grad.contiguous()
    grad_values, grad_W = _code_grads(ctx, grad, values, indices, W_dec, csr, None, None)
    grad_b = grad.sum(dim=0) if ctx.needs_input_grad[3] else None
    return grad_values, None, grad_W, grad_b, grad if ctx.needs_input_grad[4] else None, [None] * len(csr)


decode.register_autograd(_decode_backward, setup_context=_save_decode)


def _save_decode_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, indices, W_dec, _, _, weights, _, csr = inputs
    residual = output[1]
    ctx.mark_non_differentiable(residual)
    ctx.has_weights = weights is not None
    ctx.save_for_backward(values, indices, W_dec, residual, *([weights] if ctx.has_weights else []), *csr)


def _decode_loss_backward(ctx: Any, grad_error: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    values, indices, W_dec, residual, *rest = ctx.saved_tensors
    weights, csr = (rest[0], rest[1:]) if ctx.has_weights else (None, rest)
    tokens, d_model = residual.shape
    # d error / d reconstruction = 2 w_b residual_b / D, with w_b = 1/B when no weights are given.
    scale = grad_error * (2 / d_model if ctx.has_weights else 2 / (d_model * tokens))
    grad_values, grad_W = _code_grads(ctx, residual, values, indices, W_dec, csr, weights, scale)
    grad_b = grad_skip = None
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[6]:
        grad_y = residual.to(scale.dtype) * scale
        if weights is not None:
            grad_y = grad_y * weights[:, None]
        grad_b = grad_y.sum(dim=0).to(residual.dtype) if ctx.needs_input_grad[3] else None
        grad_skip = grad_y.to(residual.dtype) if ctx.needs_input_grad[6] else None
    return grad_values, None, grad_W, grad_b, None, None, grad_skip, [None] * len(csr)


decode_loss.register_autograd(_decode_loss_backward, setup_context=_save_decode_loss)


@_operator("param", "state")
def row_adam_(param: Tensor, grad: Tensor, state: list[Tensor], seed: int, hyper: Tensor, touched: Tensor) -> None:
    implementation(param).row_adam_(param, grad, RowAdamState.from_tensors(state, seed), hyper, touched)


@row_adam_.register_fake
def _(*_: Any) -> None:
    return None


@_operator("W_dec", "state")
def decoder_step_(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    csr: list[Tensor],
    weights: Tensor | None,
    scale: Tensor | None,
    state: list[Tensor],
    seed: int,
    hyper: Tensor,
) -> Tensor:
    inputs = DecoderGradInputs(grad, values, indices, W_dec, FeatureCSR.from_tensors(csr), weights, scale)
    return implementation(W_dec).decoder_step_(inputs, RowAdamState.from_tensors(state, seed), hyper)


@decoder_step_.register_fake
def _(grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape, dtype=accumulator(W_dec.dtype))


@_operator("W_enc", "state")
def encoder_step_(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    csr: list[Tensor],
    state: list[Tensor],
    seed: int,
    hyper: Tensor,
) -> Tensor:
    inputs = EncoderGradInputs(grad_values, values, indices, x, len(W_enc), FeatureCSR.from_tensors(csr))
    return implementation(W_enc).encoder_step_(inputs, W_enc, RowAdamState.from_tensors(state, seed), hyper)


@encoder_step_.register_fake
def _(grad_values: Tensor, values: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(W_enc))
