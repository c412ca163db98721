"""One target's share of a training step: its own encoder, and the decoders from all of its sources.

A model with as many targets as source layers does this once per target. The codes of the other sources are given, and
so is what a real step makes once for all targets: ours, their grouping by feature; the dense way, their matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clt.kernels import ops
from clt.launch.bench.kernels.adam import SETTINGS, TORCH_ADAM, ours_named, restart, state_dtypes
from clt.launch.bench.kernels.data import Problem
from clt.launch.bench.kernels.forward import OURS
from clt.launch.bench.kernels.measure import Case, Contender, Runner, graphed
from clt.launch.bench.kernels.reference import Reference, StepReference
from clt.launch.bench.kernels.rivals import (
    BAG,
    DENSE,
    LEARNING_RATE,
    Method,
    adam,
    product_topk,
    restart_adam,
    training_step,
)

FORWARD_BACKWARD, STEP = "forward_backward", "step"


def forward_backward_case(problem: Problem, reference: Reference, peers: Sequence[Method]) -> Case:
    """Forward and backward, gradients stored, no optimizer."""
    return Case(
        op=FORWARD_BACKWARD,
        title=f"{_words(problem)}, forward and backward, gradients stored.",
        works=problem.shape.forward_backward(),
        contenders=(
            Contender(name=OURS, make=lambda: _forward_backward(problem)),
            *_others(problem, reference, peers, with_adam=False),
        ),
        error=StepReference(reference, ops.encode_topk).gradient_error,
    )


def step_case(problem: Problem, reference: Reference, peers: Sequence[Method]) -> Case:
    """Forward, backward and Adam."""
    state_dtype, *others = state_dtypes(problem.dtype)
    ours = StepReference(reference, ops.encode_topk)
    graph = (
        Contender(
            name=f"{ours_named(state_dtype)}, CUDA graph",
            make=lambda: graphed(_step(problem, state_dtype)),
            may_fail=True,
        ),
    )
    return Case(
        op=STEP,
        title=f"{_words(problem)}, forward, backward and Adam with beta1 = 0.",
        works=problem.shape.step(state_dtype.itemsize),
        contenders=(
            Contender(name=ours_named(state_dtype), make=lambda: _step(problem, state_dtype)),
            *(Contender(name=ours_named(other), make=partial(_step, problem, other)) for other in others),
            *(graph if problem.device.type == "cuda" else ()),
            *_others(problem, reference, peers, with_adam=True),
        ),
        error=lambda outputs: ours.trained_error(outputs, LEARNING_RATE),
    )


def _words(problem: Problem) -> str:
    return f"Training step of one target: one encoder, {problem.size.n_sources} decoders"


def _others(problem: Problem, reference: Reference, peers: Sequence[Method], with_adam: bool) -> list[Contender]:
    # They all choose features by the same product and torch.topk.
    choice = StepReference(reference, product_topk)

    def contender(method: Method) -> Contender:
        return Contender(
            name=f"{method.name}, {TORCH_ADAM}" if with_adam else method.name,
            make=lambda: training_step(problem, method, with_adam),
            may_fail=method.may_fail,
            error=(lambda outputs: choice.trained_error(outputs, LEARNING_RATE))
            if with_adam
            else choice.gradient_error,
        )

    return [contender(method) for method in (DENSE, BAG, *peers)]


class _Codes:
    """The codes of all sources of which the last is made anew, and their grouping."""

    def __init__(self, problem: Problem, wants_grad: bool) -> None:
        self.n_features = problem.size.n_features
        self.values_SBK = problem.values_SBK[:-1].detach().requires_grad_(wants_grad)
        self.indices_SBK = problem.indices_SBK[:-1]
        self.csr = problem.csr[:-1].tensors()

    def with_own(self, values_BK: Tensor, indices_BK: Tensor) -> tuple[Tensor, Tensor, ops.FeatureCSR, ops.FeatureCSR]:
        """Values, indices and grouping of all sources, and the grouping of the last."""
        own = ops.feature_csr(values_BK[None], indices_BK[None], self.n_features)
        csr = [torch.cat(pair) for pair in zip(self.csr, own.tensors(), strict=True)]
        values_SBK = torch.cat([self.values_SBK, values_BK[None]])
        return values_SBK, torch.cat([self.indices_SBK, indices_BK[None]]), ops.FeatureCSR.from_tensors(csr), own


def _forward_backward(problem: Problem) -> Runner:
    originals = problem.W_enc_FD, problem.b_enc_F, problem.W_dec_SFD, problem.b_dec_D
    leaves = W_enc_FD, b_enc_F, W_dec_SFD, b_dec_D = [tensor.detach().requires_grad_() for tensor in originals]
    codes = _Codes(problem, wants_grad=True)

    def run() -> tuple[Any, ...]:
        for leaf in (*leaves, codes.values_SBK):
            leaf.grad = None
        own = ops.encode_topk(problem.x_BD, W_enc_FD, b_enc_F, problem.size.k)
        values_SBK, indices_SBK, csr, _ = codes.with_own(*own)
        loss, _ = ops.decode_loss(values_SBK, indices_SBK, W_dec_SFD, b_dec_D, problem.y_BD, csr=csr)
        loss.backward()
        return loss.detach(), W_dec_SFD.grad, W_enc_FD.grad

    return Runner(run=run)


def _step(problem: Problem, state_dtype: torch.dtype) -> Runner:
    W_enc_FD, W_dec_SFD = problem.W_enc_FD.clone(), problem.W_dec_SFD.clone()
    b_enc_F, b_dec_D = (bias.clone().requires_grad_() for bias in (problem.b_enc_F, problem.b_dec_D))
    decoder, encoder = (ops.RowAdamState.zeros(W, SETTINGS, state_dtype) for W in (W_dec_SFD, W_enc_FD))
    hyper = SETTINGS.hyper(1, problem.device, problem.dtype)
    # The loss is a mean over tokens and channels of a square.
    scale = torch.tensor(2.0 / problem.y_BD.numel(), dtype=hyper.dtype, device=problem.device)
    biases = adam([b_enc_F, b_dec_D], capturable=problem.device.type == "cuda")
    codes = _Codes(problem, wants_grad=False)

    @torch.no_grad()
    def run() -> tuple[Any, ...]:
        own_values, own_indices = ops.encode_topk(problem.x_BD, W_enc_FD, b_enc_F, problem.size.k)
        values_SBK, indices_SBK, csr, own = codes.with_own(own_values, own_indices)
        loss, residual_BD = ops.decode_loss(values_SBK, indices_SBK, W_dec_SFD, b_dec_D, problem.y_BD, csr=csr)
        grad_values = ops.decoder_step_(
            residual_BD, values_SBK, indices_SBK, W_dec_SFD, csr, decoder, hyper, scale=scale
        )
        b_enc_F.grad = ops.encoder_step_(
            grad_values[-1], own_values, own_indices, problem.x_BD, W_enc_FD, own, encoder, hyper
        )
        b_dec_D.grad = (residual_BD.sum(dim=0, dtype=hyper.dtype) * scale).to(b_dec_D.dtype)
        biases.step()
        return loss, W_dec_SFD, W_enc_FD

    def start() -> None:
        restart(encoder, (W_enc_FD, problem.W_enc_FD))
        restart(decoder, (W_dec_SFD, problem.W_dec_SFD))
        restart_adam(biases, (b_enc_F, problem.b_enc_F), (b_dec_D, problem.b_dec_D))

    return Runner(run=run, start=start)
