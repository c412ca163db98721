"""Training step of one target in the kernel benchmark: its own encoder and the decoders from all its sources.

A model with as many targets as source layers runs this once per target. The codes of the other sources are inputs, in
the form that a real step computes once for all targets: grouped by feature for ours, matrices for dense products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clt.kernels import ops
from clt.launch.bench.kernels.baselines import (
    BAG,
    DENSE,
    LEARNING_RATE,
    TrainingMethod,
    adam,
    product_topk,
    restart_adam,
    training_step,
)
from clt.launch.bench.kernels.cases import OURS
from clt.launch.bench.kernels.data import KernelInputs
from clt.launch.bench.kernels.measure import Case, Implementation, Runner, graphed
from clt.launch.bench.kernels.optimizer_cases import SETTINGS, TORCH_ADAM, by_moments, restart
from clt.launch.bench.kernels.reference import Reference, StepReference

FORWARD_BACKWARD, STEP = "forward_backward", "step"


def forward_backward_case(inputs: KernelInputs, reference: Reference, peers: Sequence[TrainingMethod]) -> Case:
    """Forward and backward with stored gradients, no optimizer.

    Args:
        inputs: tensors of the operation.
        reference: expected results.
        peers: kernels of other projects.
    """
    return Case(
        op=FORWARD_BACKWARD,
        title=f"{_words(inputs)}, forward and backward, gradients stored.",
        works=inputs.shape.forward_backward(),
        implementations=(
            Implementation(name=OURS, make=lambda: _forward_backward(inputs)),
            *_others(inputs, reference, peers, with_adam=False),
        ),
        error=StepReference(reference, ops.encode_topk).gradient_error,
    )


def step_case(inputs: KernelInputs, reference: Reference, peers: Sequence[TrainingMethod]) -> Case:
    """Forward, backward and Adam.

    Args:
        inputs: tensors of the operation.
        reference: expected results.
        peers: kernels of other projects.
    """
    choice = StepReference(reference, ops.encode_topk)
    ours = by_moments(partial(_step, inputs), inputs.dtype)
    if inputs.device.type == "cuda":
        make = ours[0].make
        ours.append(Implementation(name=f"{ours[0].name}, CUDA graph", make=lambda: graphed(make()), may_fail=True))
    return Case(
        op=STEP,
        title=f"{_words(inputs)}, forward, backward and Adam with beta1 = 0.",
        works=inputs.shape.step(inputs.dtype.itemsize),
        implementations=(*ours, *_others(inputs, reference, peers, with_adam=True)),
        error=lambda outputs: choice.trained_error(outputs, LEARNING_RATE),
    )


def _words(inputs: KernelInputs) -> str:
    return f"Training step of one target: one encoder, {inputs.size.n_sources} decoders"


def _others(
    inputs: KernelInputs, reference: Reference, peers: Sequence[TrainingMethod], with_adam: bool
) -> list[Implementation]:
    # All of them select features by the same product and torch.topk.
    choice = StepReference(reference, product_topk)

    def implementation(method: TrainingMethod) -> Implementation:
        return Implementation(
            name=f"{method.name}, {TORCH_ADAM}" if with_adam else method.name,
            make=lambda: training_step(inputs, method, with_adam),
            may_fail=method.may_fail,
            error=(lambda outputs: choice.trained_error(outputs, LEARNING_RATE))
            if with_adam
            else choice.gradient_error,
        )

    return [implementation(method) for method in (DENSE, BAG, *peers)]


class _Codes:
    """Codes of all sources and their grouping; those of the last source are computed in the step."""

    def __init__(self, inputs: KernelInputs, wants_grad: bool) -> None:
        self.n_features = inputs.size.n_features
        self.values_SBK = inputs.values_SBK[:-1].detach().requires_grad_(wants_grad)
        self.indices_SBK = inputs.indices_SBK[:-1]
        self.csr = inputs.csr[:-1].tensors()

    def with_own(self, values_BK: Tensor, indices_BK: Tensor) -> tuple[Tensor, Tensor, ops.FeatureCSR, ops.FeatureCSR]:
        """Values, indices and grouping of all sources with new codes of the last, and its grouping."""
        own = ops.feature_csr(values_BK[None], indices_BK[None], self.n_features)
        csr = [torch.cat(pair) for pair in zip(self.csr, own.tensors(), strict=True)]
        values_SBK = torch.cat([self.values_SBK, values_BK[None]])
        return values_SBK, torch.cat([self.indices_SBK, indices_BK[None]]), ops.FeatureCSR.from_tensors(csr), own


def _forward_backward(inputs: KernelInputs) -> Runner:
    originals = inputs.W_enc_FD, inputs.b_enc_F, inputs.W_dec_SFD, inputs.b_dec_D
    leaves = W_enc_FD, b_enc_F, W_dec_SFD, b_dec_D = [tensor.detach().requires_grad_() for tensor in originals]
    codes = _Codes(inputs, wants_grad=True)

    def run() -> tuple[Any, ...]:
        for leaf in (*leaves, codes.values_SBK):
            leaf.grad = None
        own = ops.encode_topk(inputs.x_BD, W_enc_FD, b_enc_F, inputs.size.k)
        values_SBK, indices_SBK, csr, _ = codes.with_own(*own)
        loss, _ = ops.decode_loss(values_SBK, indices_SBK, W_dec_SFD, b_dec_D, inputs.y_BD, csr=csr)
        loss.backward()
        return loss.detach(), W_dec_SFD.grad, W_enc_FD.grad

    return Runner(run=run)


def _step(inputs: KernelInputs, state_dtype: torch.dtype) -> Runner:
    W_enc_FD, W_dec_SFD = inputs.W_enc_FD.clone(), inputs.W_dec_SFD.clone()
    b_enc_F, b_dec_D = (bias.clone().requires_grad_() for bias in (inputs.b_enc_F, inputs.b_dec_D))
    decoder, encoder = (ops.RowAdamState.zeros(W, SETTINGS, state_dtype) for W in (W_dec_SFD, W_enc_FD))
    hyper = SETTINGS.hyper(1, inputs.device, inputs.dtype)
    # The loss is the mean square over tokens and channels.
    scale = torch.tensor(2.0 / inputs.y_BD.numel(), dtype=hyper.dtype, device=inputs.device)
    biases = adam([b_enc_F, b_dec_D], capturable=inputs.device.type == "cuda")
    codes = _Codes(inputs, wants_grad=False)

    @torch.no_grad()
    def run() -> tuple[Any, ...]:
        own_values, own_indices = ops.encode_topk(inputs.x_BD, W_enc_FD, b_enc_F, inputs.size.k)
        values_SBK, indices_SBK, csr, own = codes.with_own(own_values, own_indices)
        loss, residual_BD = ops.decode_loss(values_SBK, indices_SBK, W_dec_SFD, b_dec_D, inputs.y_BD, csr=csr)
        grad_values = ops.decoder_step_(
            residual_BD, values_SBK, indices_SBK, W_dec_SFD, csr, decoder, hyper, scale=scale
        )
        b_enc_F.grad = ops.encoder_step_(
            grad_values[-1], own_values, own_indices, inputs.x_BD, W_enc_FD, own, encoder, hyper
        )
        b_dec_D.grad = (residual_BD.sum(dim=0, dtype=hyper.dtype) * scale).to(b_dec_D.dtype)
        biases.step()
        return loss, W_dec_SFD, W_enc_FD

    def start() -> None:
        restart(encoder, (W_enc_FD, inputs.W_enc_FD))
        restart(decoder, (W_dec_SFD, inputs.W_dec_SFD))
        restart_adam(biases, (b_enc_F, inputs.b_enc_F), (b_dec_D, inputs.b_dec_D))

    return Runner(run=run, start=start)
