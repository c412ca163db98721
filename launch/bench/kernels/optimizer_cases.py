"""Adam in the kernel benchmark: on stored gradients, and fused into the backward pass of the decoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from clt.kernels import ops
from clt.launch.bench.kernels.baselines import LEARNING_RATE, adam, restart_adam
from clt.launch.bench.kernels.cases import OURS
from clt.launch.bench.kernels.data import KernelInputs
from clt.launch.bench.kernels.measure import Case, Implementation, Runner
from clt.launch.bench.kernels.reference import Reference

TORCH_ADAM = "torch.optim.Adam(fused)"
SETTINGS = ops.RowAdam(learning_rate=LEARNING_RATE)


def _state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes of Adam's moments that are compared, first the weights' own, which PyTorch's Adam uses."""
    if dtype == torch.bfloat16:
        return torch.bfloat16, torch.float32, torch.uint8
    return (torch.float32, torch.uint8) if dtype == torch.float32 else (dtype,)


def by_moments(make: Callable[[torch.dtype], Runner], dtype: torch.dtype) -> list[Implementation]:
    """Our optimizer with moments of all compared dtypes, for weights of a dtype."""
    return [
        Implementation(name=f"{OURS}, {str(state).removeprefix('torch.')} moments", make=partial(make, state))
        for state in _state_dtypes(dtype)
    ]


def adam_case(inputs: KernelInputs, reference: Reference) -> Case:
    """Adam on the stored gradients of all decoders."""
    grad_SFD = _gradients(inputs)
    return Case(
        op="row_adam",
        title=f"Adam with beta1 = 0 on stored gradients of {inputs.size.n_sources} decoders.",
        works=(inputs.shape.adam(inputs.dtype.itemsize),),
        implementations=(
            *by_moments(partial(_row_adam, inputs, grad_SFD), inputs.dtype),
            Implementation(name=TORCH_ADAM, make=lambda: _torch_adam(inputs, grad_SFD)),
        ),
        error=lambda W_dec: reference.adam_error(W_dec, grad_SFD[0][reference.features].double(), LEARNING_RATE),
    )


def _gradients(inputs: KernelInputs) -> Tensor:
    return ops.decoder_grad(inputs.grad_BD, inputs.values_SBK, inputs.indices_SBK, inputs.W_dec_SFD, inputs.csr)[1]


def _row_adam(inputs: KernelInputs, grad_SFD: Tensor, state_dtype: torch.dtype) -> Runner:
    W_SFD, touched_SF = inputs.W_dec_SFD.clone(), inputs.touched
    state = ops.RowAdamState.zeros(W_SFD, SETTINGS, state_dtype)
    hyper = SETTINGS.hyper(1, inputs.device, inputs.dtype)

    def run() -> Tensor:
        ops.row_adam_(W_SFD, grad_SFD, state, hyper, touched_SF)
        return W_SFD

    return Runner(run=run, start=lambda: restart(state, (W_SFD, inputs.W_dec_SFD)))


def restart(state: ops.RowAdamState, *pairs: tuple[Tensor, Tensor]) -> None:
    """Zeroes the moments and copies the second tensor of each pair into the first."""
    state.v_RD.zero_()
    if state.v_exponents_RG is not None:
        state.v_exponents_RG.zero_()
    state.last_step_R.zero_()
    for tensor, original in pairs:
        tensor.copy_(original)


def _parameters(W_SFD: Tensor, grad_SFD: Tensor) -> list[Tensor]:
    """One parameter per decoder, as in a trainer, each a view of the tensor of all decoders."""
    parameters = [W_FD.requires_grad_() for W_FD in W_SFD.detach().unbind()]
    for W_FD, grad_FD in zip(parameters, grad_SFD, strict=True):
        W_FD.grad = grad_FD
    return parameters


def _torch_adam(inputs: KernelInputs, grad_SFD: Tensor) -> Runner:
    W_SFD = inputs.W_dec_SFD.clone()
    optimizer = adam(_parameters(W_SFD, grad_SFD))

    def run() -> Tensor:
        optimizer.step()
        return W_SFD

    return Runner(run=run, start=lambda: restart_adam(optimizer, (W_SFD, inputs.W_dec_SFD)))


def fused_step_case(inputs: KernelInputs, reference: Reference) -> Case:
    """Gradients of the decoders and Adam."""
    return Case(
        op="decoder_step",
        title=f"Gradients of {inputs.size.n_sources} sources' activations and decoders, and Adam with beta1 = 0.",
        works=(inputs.shape.decoder_step(inputs.dtype.itemsize),),
        implementations=(
            *by_moments(partial(_fused, inputs), inputs.dtype),
            Implementation(
                name=f"{OURS} decoder_grad, then row_adam_", make=lambda: _fused(inputs, inputs.dtype, stored=True)
            ),
            Implementation(name=f"{OURS} decoder_grad, then {TORCH_ADAM}", make=lambda: _unfused_torch(inputs)),
        ),
        error=lambda outputs: max(
            reference.values_error(outputs[0]),
            reference.adam_error(outputs[1], reference.decoder_rows(inputs.grad_BD), LEARNING_RATE),
        ),
    )


def _fused(inputs: KernelInputs, state_dtype: torch.dtype, stored: bool = False) -> Runner:
    """Gradients and Adam in one pass, or one after the other with stored gradients."""
    W_SFD, touched_SF = inputs.W_dec_SFD.clone(), inputs.touched
    state = ops.RowAdamState.zeros(W_SFD, SETTINGS, state_dtype)
    hyper = SETTINGS.hyper(1, inputs.device, inputs.dtype)
    codes = inputs.values_SBK, inputs.indices_SBK

    def run() -> tuple[Tensor, Tensor]:
        if not stored:
            return ops.decoder_step_(inputs.grad_BD, *codes, W_SFD, inputs.csr, state, hyper), W_SFD
        grad_values, grad_W = ops.decoder_grad(inputs.grad_BD, *codes, W_SFD, inputs.csr)
        ops.row_adam_(W_SFD, grad_W, state, hyper, touched_SF)
        return grad_values, W_SFD

    return Runner(run=run, start=lambda: restart(state, (W_SFD, inputs.W_dec_SFD)))


def _unfused_torch(inputs: KernelInputs) -> Runner:
    W_SFD = inputs.W_dec_SFD.clone()
    parameters = _parameters(W_SFD, torch.zeros_like(W_SFD))
    optimizer, codes = adam(parameters), (inputs.values_SBK, inputs.indices_SBK)

    def run() -> tuple[Tensor, Tensor]:
        for W_FD in parameters:
            W_FD.grad = None
        grad_values, grad_W = ops.decoder_grad(inputs.grad_BD, *codes, W_SFD, inputs.csr)
        for W_FD, grad_FD in zip(parameters, grad_W, strict=True):
            W_FD.grad = grad_FD
        optimizer.step()
        return grad_values, W_SFD

    return Runner(run=run, start=lambda: restart_adam(optimizer, (W_SFD, inputs.W_dec_SFD)))
