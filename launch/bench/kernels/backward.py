"""The backward operations of the kernels' benchmark: gradients of decoder and encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clt.kernels import ops
from clt.launch.bench.kernels.data import Problem
from clt.launch.bench.kernels.forward import OURS
from clt.launch.bench.kernels.measure import Case, Contender, Runner
from clt.launch.bench.kernels.reference import Reference
from clt.launch.bench.kernels.rivals import Method, bag, scatter

TWO_PASSES, TWO_PASSES_BAG = "clt dz, then clt dW", "embedding_bag dz, then clt dW"


def decoder_case(problem: Problem, reference: Reference, peers: Sequence[Method]) -> Case:
    """Both gradients of the reconstruction."""
    codes = problem.values_SBK, problem.indices_SBK, problem.W_dec_SFD
    return Case(
        op="decoder_grad",
        title=f"Gradients of activations and decoders of {problem.size.n_sources} source layers, codes grouped before.",
        works=(problem.shape.decoder_grad(),),
        contenders=(
            Contender(
                name=OURS, make=lambda: Runner(run=lambda: ops.decoder_grad(problem.grad_BD, *codes, problem.csr))
            ),
            Contender(name=TWO_PASSES, make=lambda: _two_passes(problem)),
            Contender(name=TWO_PASSES_BAG, make=lambda: _two_passes_bag(problem)),
            Contender(name="gather and index_add_", make=lambda: Runner(run=lambda: _index_add(problem))),
            Contender(name="dense", make=lambda: Runner(run=lambda: _dense_decoder_grad(problem))),
            *(_peer_backward(problem, peer) for peer in peers),
        ),
        error=reference.decoder_error,
    )


def _feature_major(problem: Problem, grad_BD: Tensor) -> list[Tensor]:
    """Gradients of the decoders alone: to our kernels they are those of an encoder that reads the gradient."""
    return [
        ops.encoder_grad(values_BK, values_BK, indices_BK, grad_BD, problem.size.n_features, problem.csr[s : s + 1])[0]
        for s, (values_BK, indices_BK) in enumerate(zip(problem.values_SBK, problem.indices_SBK, strict=True))
    ]


def _two_passes(problem: Problem) -> Runner:
    values_SBK = problem.values_SBK.detach().requires_grad_()
    y_BD = ops.decode(values_SBK, problem.indices_SBK, problem.W_dec_SFD, problem.b_dec_D, csr=problem.csr)

    def run() -> tuple[Any, ...]:
        (grad_SBK,) = torch.autograd.grad(y_BD, values_SBK, problem.grad_BD, retain_graph=True)
        return grad_SBK, _feature_major(problem, problem.grad_BD)

    return Runner(run=run)


def _two_passes_bag(problem: Problem) -> Runner:
    values = [values_BK.detach().requires_grad_() for values_BK in problem.values_SBK]
    outputs = [
        bag(values_BK, indices_BK, W_FD)
        for values_BK, indices_BK, W_FD in zip(values, problem.indices_SBK, problem.W_dec_SFD, strict=True)
    ]

    def run() -> tuple[Any, ...]:
        grads = torch.autograd.grad(outputs, values, [problem.grad_BD] * len(outputs), retain_graph=True)
        return grads, _feature_major(problem, problem.grad_BD)

    return Runner(run=run)


def _index_add(problem: Problem) -> tuple[Any, ...]:
    grad_values, grads_W = [], []
    for values_BK, indices_BK, W_FD in zip(problem.values_SBK, problem.indices_SBK, problem.W_dec_SFD, strict=True):
        grad_values.append(torch.einsum("bd,bkd->bk", problem.grad_BD, W_FD[indices_BK]))
        rows_BKD = values_BK[:, :, None] * problem.grad_BD[:, None]
        grads_W.append(torch.zeros_like(W_FD).index_add_(0, indices_BK.flatten(), rows_BKD.flatten(0, 1)))
    return grad_values, grads_W


def _dense_decoder_grad(problem: Problem) -> tuple[Any, ...]:
    grad_values, grads_W = [], []
    for values_BK, indices_BK, W_FD in zip(problem.values_SBK, problem.indices_SBK, problem.W_dec_SFD, strict=True):
        grad_values.append((problem.grad_BD @ W_FD.T).gather(1, indices_BK.long()))
        grads_W.append(scatter(values_BK, indices_BK, len(W_FD)).T @ problem.grad_BD)
    return grad_values, grads_W


def _peer_backward(problem: Problem, peer: Method) -> Contender:
    def make() -> Runner:
        sources = zip(problem.values_SBK, problem.indices_SBK, strict=True)
        codes = [peer.given(values_BK, indices_BK, problem.size.n_features) for values_BK, indices_BK in sources]
        weights = [W_FD.detach().requires_grad_() for W_FD in problem.W_dec_SFD]
        outputs = [peer.decode(code, W_FD) for code, W_FD in zip(codes, weights, strict=True)]
        leaves = [code[0] for code in codes] + weights
        gradients = [problem.grad_BD.to(outputs[0].dtype)] * len(outputs)

        def run() -> tuple[Any, ...]:
            grads = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
            return grads[: len(codes)], grads[len(codes) :]

        return Runner(run=run)

    return Contender(name=peer.name, make=make, may_fail=peer.may_fail)


def encoder_case(problem: Problem, reference: Reference) -> Case:
    """Gradients of the encoder of the last source layer."""
    values_BK, indices_BK, csr = problem.values_SBK[-1], problem.indices_SBK[-1], problem.csr[-1:]
    # Any gradient of the activations will do; this one has both signs.
    grad_BK = (values_BK - values_BK.mean()).float()
    x_BD, n_features = problem.x_BD, problem.size.n_features

    def indexed() -> tuple[Tensor, Tensor]:
        narrow_BK, places = grad_BK.to(x_BD.dtype), indices_BK.flatten()
        rows_RD = (narrow_BK[:, :, None] * x_BD[:, None]).flatten(0, 1)
        grad_W_FD = torch.zeros_like(problem.W_enc_FD).index_add_(0, places, rows_RD)
        return grad_W_FD, torch.zeros_like(problem.b_enc_F).index_add_(0, places, narrow_BK.flatten())

    def dense() -> tuple[Tensor, Tensor]:
        grad_BF = scatter(grad_BK.to(x_BD.dtype), indices_BK, n_features)
        return grad_BF.T @ x_BD, grad_BF.sum(dim=0)

    return Case(
        op="encoder_grad",
        title="Gradients of one encoder and its bias, codes grouped before.",
        works=(problem.shape.encoder_grad(),),
        contenders=(
            Contender(
                name=OURS,
                make=lambda: Runner(
                    run=lambda: ops.encoder_grad(grad_BK, values_BK, indices_BK, x_BD, n_features, csr)
                ),
            ),
            Contender(name="index_add_", make=lambda: Runner(run=indexed)),
            Contender(name="dense", make=lambda: Runner(run=dense)),
        ),
        error=lambda outputs: reference.encoder_error(grad_BK, problem.size.n_sources - 1, outputs[0]),
    )
