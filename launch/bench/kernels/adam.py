"""Adam in the kernels' benchmark: on stored gradients, and fused into the backward pass of the decoders."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from clt.kernels import ops
from clt.launch.bench.kernels.data import Problem
from clt.launch.bench.kernels.forward import OURS
from clt.launch.bench.kernels.measure import Case, Contender, Runner
from clt.launch.bench.kernels.reference import Reference
from clt.launch.bench.kernels.rivals import LEARNING_RATE, adam, restart_adam

TORCH_ADAM = "torch.optim.Adam(fused)"
SETTINGS = ops.RowAdam(learning_rate=LEARNING_RATE)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Precisions of Adam's moments that are compared: that of PyTorch's Adam, which is the weights', comes first."""
    if dtype == torch.bfloat16:
        return torch.bfloat16, torch.float32, torch.uint8
    return (torch.float32, torch.uint8) if dtype == torch.float32 else (dtype,)


def ours_named(state_dtype: torch.dtype) -> str:
    """Name of our optimizer with moments of a precision."""
    return f"{OURS}, {str(state_dtype).removeprefix('torch.')} moments"


def adam_case(problem: Problem, reference: Reference) -> Case:
    """Adam on the stored gradients of all decoders."""
    grad_SFD = _gradients(problem)
    state_dtype, *others = state_dtypes(problem.dtype)
    return Case(
        op="row_adam",
        title=f"Adam with beta1 = 0 on stored gradients of {problem.size.n_sources} decoders.",
        works=(problem.shape.adam(state_dtype.itemsize),),
        contenders=(
            Contender(name=ours_named(state_dtype), make=lambda: _row_adam(problem, grad_SFD, state_dtype)),
            *(Contender(name=ours_named(other), make=partial(_row_adam, problem, grad_SFD, other)) for other in others),
            Contender(name=TORCH_ADAM, make=lambda: _torch_adam(problem, grad_SFD)),
        ),
        error=lambda W_dec: reference.adam_error(W_dec, grad_SFD[0][reference.features].double(), LEARNING_RATE),
    )


def _gradients(problem: Problem) -> Tensor:
    return ops.decoder_grad(problem.grad_BD, problem.values_SBK, problem.indices_SBK, problem.W_dec_SFD, problem.csr)[1]


def _row_adam(problem: Problem, grad_SFD: Tensor, state_dtype: torch.dtype) -> Runner:
    W_SFD, touched_SF = problem.W_dec_SFD.clone(), problem.touched
    state = ops.RowAdamState.zeros(W_SFD, SETTINGS, state_dtype)
    hyper = SETTINGS.hyper(1, problem.device, problem.dtype)

    def run() -> Tensor:
        ops.row_adam_(W_SFD, grad_SFD, state, hyper, touched_SF)
        return W_SFD

    return Runner(run=run, start=lambda: restart(state, (W_SFD, problem.W_dec_SFD)))


def restart(state: ops.RowAdamState, *pairs: tuple[Tensor, Tensor]) -> None:
    """Empties the moments and copies the second tensor of each pair into the first."""
    state.v_RD.zero_()
    if state.v_exponents_RG is not None:
        state.v_exponents_RG.zero_()
    state.last_step_R.zero_()
    for tensor, original in pairs:
        tensor.copy_(original)


def _parameters(W_SFD: Tensor, grad_SFD: Tensor) -> list[Tensor]:
    """One parameter per decoder, as trainers have them, in the memory of all."""
    parameters = [W_FD.requires_grad_() for W_FD in W_SFD.detach().unbind()]
    for W_FD, grad_FD in zip(parameters, grad_SFD, strict=True):
        W_FD.grad = grad_FD
    return parameters


def _torch_adam(problem: Problem, grad_SFD: Tensor) -> Runner:
    W_SFD = problem.W_dec_SFD.clone()
    optimizer = adam(_parameters(W_SFD, grad_SFD))

    def run() -> Tensor:
        optimizer.step()
        return W_SFD

    return Runner(run=run, start=lambda: restart_adam(optimizer, (W_SFD, problem.W_dec_SFD)))


def fused_step_case(problem: Problem, reference: Reference) -> Case:
    """Gradients of the decoders and Adam."""
    state_dtype, *others = state_dtypes(problem.dtype)
    return Case(
        op="decoder_step",
        title=f"Gradients of {problem.size.n_sources} sources' activations and decoders, and Adam with beta1 = 0.",
        works=(problem.shape.decoder_step(state_dtype.itemsize),),
        contenders=(
            Contender(name=ours_named(state_dtype), make=lambda: _fused(problem, state_dtype)),
            *(Contender(name=ours_named(other), make=partial(_fused, problem, other)) for other in others),
            Contender(name=f"{OURS} decoder_grad, then row_adam_", make=lambda: _unfused(problem, state_dtype)),
            Contender(name=f"{OURS} decoder_grad, then {TORCH_ADAM}", make=lambda: _unfused_torch(problem)),
        ),
        error=lambda outputs: max(
            reference.values_error(outputs[0]),
            reference.adam_error(outputs[1], reference.decoder_rows(problem.grad_BD), LEARNING_RATE),
        ),
    )


def _fused(problem: Problem, state_dtype: torch.dtype) -> Runner:
    W_SFD = problem.W_dec_SFD.clone()
    state = ops.RowAdamState.zeros(W_SFD, SETTINGS, state_dtype)
    hyper = SETTINGS.hyper(1, problem.device, problem.dtype)
    codes = problem.values_SBK, problem.indices_SBK

    def run() -> tuple[Tensor, Tensor]:
        return ops.decoder_step_(problem.grad_BD, *codes, W_SFD, problem.csr, state, hyper), W_SFD

    return Runner(run=run, start=lambda: restart(state, (W_SFD, problem.W_dec_SFD)))


def _unfused(problem: Problem, state_dtype: torch.dtype) -> Runner:
    W_SFD, touched_SF = problem.W_dec_SFD.clone(), problem.touched
    state = ops.RowAdamState.zeros(W_SFD, SETTINGS, state_dtype)
    hyper = SETTINGS.hyper(1, problem.device, problem.dtype)
    codes = problem.values_SBK, problem.indices_SBK

    def run() -> tuple[Tensor, Tensor]:
        grad_values, grad_W = ops.decoder_grad(problem.grad_BD, *codes, W_SFD, problem.csr)
        ops.row_adam_(W_SFD, grad_W, state, hyper, touched_SF)
        return grad_values, W_SFD

    return Runner(run=run, start=lambda: restart(state, (W_SFD, problem.W_dec_SFD)))


def _unfused_torch(problem: Problem) -> Runner:
    W_SFD = problem.W_dec_SFD.clone()
    parameters = _parameters(W_SFD, torch.zeros_like(W_SFD))
    optimizer, codes = adam(parameters), (problem.values_SBK, problem.indices_SBK)

    def run() -> tuple[Tensor, Tensor]:
        for W_FD in parameters:
            W_FD.grad = None
        grad_values, grad_W = ops.decoder_grad(problem.grad_BD, *codes, W_SFD, problem.csr)
        for W_FD, grad_FD in zip(parameters, grad_W, strict=True):
            W_FD.grad = grad_FD
        optimizer.step()
        return grad_values, W_SFD

    return Runner(run=run, start=lambda: restart_adam(optimizer, (W_SFD, problem.W_dec_SFD)))
