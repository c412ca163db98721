"""Single operations of the kernel benchmark: encode, select, group by feature, decode, loss, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clt.kernels import ops
from clt.launch.bench.kernels.baselines import (
    TrainingMethod,
    bag,
    bag_decode,
    dense_reconstruction,
    loss_of,
    product_topk,
    scatter,
)
from clt.launch.bench.kernels.data import KernelInputs
from clt.launch.bench.kernels.measure import Case, Implementation, Runner
from clt.launch.bench.kernels.reference import Reference

OURS, TORCH_TOPK = "clt", "product, torch.topk"


def encode_case(inputs: KernelInputs, reference: Reference) -> Case:
    """Encoder with exact TopK."""
    arguments = inputs.x_BD, inputs.W_enc_FD, inputs.b_enc_F, inputs.size.k
    return Case(
        op="encode_topk",
        title="Encoder product, bias, ReLU and exact TopK.",
        works=(inputs.shape.encode(),),
        implementations=(
            Implementation.of(OURS, lambda: ops.encode_topk(*arguments)),
            Implementation.of(TORCH_TOPK, lambda: product_topk(*arguments)),
        ),
        error=reference.encode_error,
    )


def select_case(inputs: KernelInputs, reference: Reference) -> Case:
    """TopK of stored pre-activations."""
    pre_BF = torch.addmm(inputs.b_enc_F, inputs.x_BD, inputs.W_enc_FD.T)
    k = inputs.size.k
    return Case(
        op="select_topk",
        title="Exact TopK of stored pre-activations.",
        works=(inputs.shape.select(),),
        implementations=(
            Implementation.of(OURS, lambda: ops.select_topk(pre_BF, k)),
            Implementation.of("torch.topk", lambda: pre_BF.topk(k, dim=1, sorted=False)),
        ),
        error=lambda outputs: reference.select_error(pre_BF, outputs),
    )


def threshold_case(inputs: KernelInputs) -> Case:
    """BatchTopK with one threshold for the whole batch."""
    pre_BF = torch.addmm(inputs.b_enc_F, inputs.x_BD, inputs.W_enc_FD.T)
    n = inputs.size.n_tokens * inputs.size.k
    capacity = min(4 * inputs.size.k, inputs.size.n_features)

    def ours() -> tuple[torch.Tensor, ...]:
        return ops.select_above(pre_BF, *ops.batch_threshold(pre_BF, n), capacity)

    return Case(
        op="batch_topk",
        title=f"BatchTopK of stored pre-activations: the {n:,} largest of the batch.",
        works=(inputs.shape.threshold(n),),
        implementations=(
            Implementation.of(f"{OURS}, threshold", lambda: ops.batch_threshold(pre_BF, n)),
            Implementation.of(f"{OURS}, threshold and codes", ours),
            Implementation.of("torch.topk", lambda: pre_BF.flatten().topk(n, sorted=False)),
        ),
    )


def decode_case(inputs: KernelInputs, reference: Reference, peers: Sequence[TrainingMethod]) -> Case:
    """Reconstruction of one target.

    Args:
        inputs: tensors of the operation.
        reference: expected results.
        peers: kernels of other projects.
    """
    codes = inputs.values_SBK, inputs.indices_SBK, inputs.W_dec_SFD, inputs.b_dec_D
    return Case(
        op="decode",
        title=f"Reconstruction from {inputs.size.n_sources} source layers.",
        works=(inputs.shape.decode(),),
        implementations=(
            Implementation.of(OURS, lambda: ops.decode(*codes)),
            Implementation.of("embedding_bag", lambda: bag_decode(inputs)),
            Implementation.of("dense", lambda: dense_reconstruction(inputs)),
            *(_peer_decode(inputs, peer) for peer in peers),
        ),
        error=reference.decode_error,
    )


def _peer_decode(inputs: KernelInputs, peer: TrainingMethod) -> Implementation:
    def make() -> Runner:
        indices_SBK = inputs.indices_SBK.long()

        def run() -> torch.Tensor:
            y_BD = inputs.b_dec_D.expand(inputs.size.n_tokens, -1)
            for values_BK, indices_BK, W_FD in zip(inputs.values_SBK, indices_SBK, inputs.W_dec_SFD, strict=True):
                y_BD = y_BD + peer.decode((values_BK, indices_BK), W_FD)
            return y_BD

        return Runner(run=run)

    return Implementation(name=peer.name, make=make, may_fail=peer.may_fail)


def loss_case(inputs: KernelInputs, reference: Reference) -> Case:
    """Reconstruction, squared error and residual."""
    codes = inputs.values_SBK, inputs.indices_SBK, inputs.W_dec_SFD, inputs.b_dec_D
    y_BD = inputs.y_BD
    return Case(
        op="decode_loss",
        title=f"Reconstruction from {inputs.size.n_sources} source layers, squared error and residual.",
        works=(inputs.shape.decode_loss(),),
        implementations=(
            Implementation.of(OURS, lambda: ops.decode_loss(*codes, y_BD)),
            Implementation.of(f"{OURS} decode, then loss", lambda: loss_of(ops.decode(*codes), y_BD)),
            Implementation.of("embedding_bag", lambda: loss_of(bag_decode(inputs), y_BD)),
            Implementation.of("dense", lambda: loss_of(dense_reconstruction(inputs), y_BD)),
        ),
        error=reference.loss_error,
    )


def csr_case(inputs: KernelInputs) -> Case:
    """Grouping of all source layers by feature."""
    codes = inputs.values_SBK, inputs.indices_SBK
    n_features = inputs.size.n_features
    return Case(
        op="feature_csr",
        title=f"Codes of {inputs.size.n_sources} layers grouped by feature.",
        works=(inputs.shape.csr(inputs.size.n_sources),),
        implementations=(
            Implementation.of(OURS, lambda: ops.feature_csr(*codes, n_features).tensors()),
            Implementation.of(
                "torch.sort alone", lambda: tuple(inputs.indices_SBK.flatten(1).sort(dim=1, stable=True))
            ),
        ),
    )


TWO_PASSES, TWO_PASSES_BAG = "clt dz, then clt dW", "embedding_bag dz, then clt dW"


def decoder_case(inputs: KernelInputs, reference: Reference, peers: Sequence[TrainingMethod]) -> Case:
    """Both gradients of the reconstruction.

    Args:
        inputs: tensors of the operation.
        reference: expected results.
        peers: kernels of other projects.
    """
    codes = inputs.values_SBK, inputs.indices_SBK, inputs.W_dec_SFD
    return Case(
        op="decoder_grad",
        title=f"Gradients of activations and decoders of {inputs.size.n_sources} source layers, codes grouped before.",
        works=(inputs.shape.decoder_grad(),),
        implementations=(
            Implementation.of(OURS, lambda: ops.decoder_grad(inputs.grad_BD, *codes, inputs.csr)),
            Implementation(name=TWO_PASSES, make=lambda: _two_passes(inputs)),
            Implementation(name=TWO_PASSES_BAG, make=lambda: _two_passes_bag(inputs)),
            Implementation.of("gather and index_add_", lambda: _index_add(inputs)),
            Implementation.of("dense", lambda: _dense_decoder_grad(inputs)),
            *(_peer_backward(inputs, peer) for peer in peers),
        ),
        error=reference.decoder_error,
    )


def _feature_major(inputs: KernelInputs, grad_BD: Tensor) -> list[Tensor]:
    """Gradients of the decoders alone, computed as those of an encoder whose input is the gradient."""
    return [
        ops.encoder_grad(values_BK, values_BK, indices_BK, grad_BD, inputs.size.n_features, inputs.csr[s : s + 1])[0]
        for s, (values_BK, indices_BK) in enumerate(zip(inputs.values_SBK, inputs.indices_SBK, strict=True))
    ]


def _two_passes(inputs: KernelInputs) -> Runner:
    values_SBK = inputs.values_SBK.detach().requires_grad_()
    y_BD = ops.decode(values_SBK, inputs.indices_SBK, inputs.W_dec_SFD, inputs.b_dec_D, csr=inputs.csr)

    def run() -> tuple[Any, ...]:
        (grad_SBK,) = torch.autograd.grad(y_BD, values_SBK, inputs.grad_BD, retain_graph=True)
        return grad_SBK, _feature_major(inputs, inputs.grad_BD)

    return Runner(run=run)


def _two_passes_bag(inputs: KernelInputs) -> Runner:
    values = [values_BK.detach().requires_grad_() for values_BK in inputs.values_SBK]
    outputs = [
        bag(values_BK, indices_BK, W_FD)
        for values_BK, indices_BK, W_FD in zip(values, inputs.indices_SBK, inputs.W_dec_SFD, strict=True)
    ]

    def run() -> tuple[Any, ...]:
        grads = torch.autograd.grad(outputs, values, [inputs.grad_BD] * len(outputs), retain_graph=True)
        return grads, _feature_major(inputs, inputs.grad_BD)

    return Runner(run=run)


def _index_add(inputs: KernelInputs) -> tuple[Any, ...]:
    grad_values, grads_W = [], []
    for values_BK, indices_BK, W_FD in zip(inputs.values_SBK, inputs.indices_SBK, inputs.W_dec_SFD, strict=True):
        grad_values.append(torch.einsum("bd,bkd->bk", inputs.grad_BD, W_FD[indices_BK]))
        rows_BKD = values_BK[:, :, None] * inputs.grad_BD[:, None]
        grads_W.append(torch.zeros_like(W_FD).index_add_(0, indices_BK.flatten(), rows_BKD.flatten(0, 1)))
    return grad_values, grads_W


def _dense_decoder_grad(inputs: KernelInputs) -> tuple[Any, ...]:
    grad_values, grads_W = [], []
    for values_BK, indices_BK, W_FD in zip(inputs.values_SBK, inputs.indices_SBK, inputs.W_dec_SFD, strict=True):
        grad_values.append((inputs.grad_BD @ W_FD.T).gather(1, indices_BK.long()))
        grads_W.append(scatter(values_BK, indices_BK, len(W_FD)).T @ inputs.grad_BD)
    return grad_values, grads_W


def _peer_backward(inputs: KernelInputs, peer: TrainingMethod) -> Implementation:
    def make() -> Runner:
        sources = zip(inputs.values_SBK, inputs.indices_SBK, strict=True)
        codes = [peer.given(values_BK, indices_BK, inputs.size.n_features) for values_BK, indices_BK in sources]
        weights = [W_FD.detach().requires_grad_() for W_FD in inputs.W_dec_SFD]
        outputs = [peer.decode(code, W_FD) for code, W_FD in zip(codes, weights, strict=True)]
        leaves = [code[0] for code in codes] + weights
        gradients = [inputs.grad_BD.to(outputs[0].dtype)] * len(outputs)

        def run() -> tuple[Any, ...]:
            grads = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
            return grads[: len(codes)], grads[len(codes) :]

        return Runner(run=run)

    return Implementation(name=peer.name, make=make, may_fail=peer.may_fail)


def encoder_case(inputs: KernelInputs, reference: Reference) -> Case:
    """Gradients of the encoder of the last source layer."""
    values_BK, indices_BK, csr = inputs.values_SBK[-1], inputs.indices_SBK[-1], inputs.csr[-1:]
    # Arbitrary gradient of the activations, of both signs.
    grad_BK = (values_BK - values_BK.mean()).float()
    x_BD, n_features = inputs.x_BD, inputs.size.n_features

    def indexed() -> tuple[Tensor, Tensor]:
        narrow_BK, places = grad_BK.to(x_BD.dtype), indices_BK.flatten()
        rows_RD = (narrow_BK[:, :, None] * x_BD[:, None]).flatten(0, 1)
        grad_W_FD = torch.zeros_like(inputs.W_enc_FD).index_add_(0, places, rows_RD)
        return grad_W_FD, torch.zeros_like(inputs.b_enc_F).index_add_(0, places, narrow_BK.flatten())

    def dense() -> tuple[Tensor, Tensor]:
        grad_BF = scatter(grad_BK.to(x_BD.dtype), indices_BK, n_features)
        return grad_BF.T @ x_BD, grad_BF.sum(dim=0)

    return Case(
        op="encoder_grad",
        title="Gradients of one encoder and its bias, codes grouped before.",
        works=(inputs.shape.encoder_grad(),),
        implementations=(
            Implementation.of(OURS, lambda: ops.encoder_grad(grad_BK, values_BK, indices_BK, x_BD, n_features, csr)),
            Implementation.of("index_add_", indexed),
            Implementation.of("dense", dense),
        ),
        error=lambda outputs: reference.encoder_error(grad_BK, inputs.size.n_sources - 1, outputs[0]),
    )
