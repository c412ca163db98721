"""PyTorch baselines of the kernel benchmark: dense products with torch.topk, embedding bag, and fused Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from clt.launch.bench.kernels.data import KernelInputs
from clt.launch.bench.kernels.measure import Runner

LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """Encoder and decoder functions with which autograd trains a target layer.

    Attributes:
        name: row of the table.
        encode: (x [N,D], W_enc [F,D], b_enc [F], k) to a code.
        decode: (code, W_dec [F,D]) to [N,D], without bias.
        given: (values [N,k], indices [N,k], F) of a source layer to a code that requires a gradient.
        may_fail: whether it is code of another project.
    """

    name: str
    encode: Callable[[Tensor, Tensor, Tensor, int], Any]
    decode: Callable[[Any, Tensor], Tensor]
    given: Callable[[Tensor, Tensor, int], Any]
    may_fail: bool = False


def scatter(values_BK: Tensor, indices_BK: Tensor, n_features: int) -> Tensor:
    """Codes as a matrix [N,F].

    Args:
        values_BK: [N,k] activations.
        indices_BK: [N,k] feature numbers.
        n_features: F.
    """
    return values_BK.new_zeros(len(values_BK), n_features).scatter(1, indices_BK.long(), values_BK)


def product_topk(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """TopK(ReLU(x W^T + b)) by a library product and torch.topk.

    Args:
        x_BD: [N,D] encoder inputs.
        W_enc_FD: [F,D] encoder.
        b_enc_F: [F] its bias.
        k: slots per token.

    Returns:
        Values [N,k] and indices [N,k], unsorted.
    """
    values_BK, indices_BK = torch.addmm(b_enc_F, x_BD, W_enc_FD.T).relu_().topk(k, dim=1, sorted=False)
    return values_BK, indices_BK


def bag(values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Decodes by PyTorch's embedding bag.

    Args:
        values_BK: [N,k] activations.
        indices_BK: [N,k] feature numbers.
        W_dec_FD: [F,D] decoder.
    """
    return functional.embedding_bag(indices_BK, W_dec_FD, per_sample_weights=values_BK, mode="sum")


def bag_decode(inputs: KernelInputs) -> Tensor:
    """Reconstruction by one embedding bag over all sources."""
    values_SBK, W_dec_SFD = inputs.values_SBK, inputs.W_dec_SFD
    sources, tokens, _ = values_SBK.shape
    shift_S11 = W_dec_SFD.shape[1] * torch.arange(sources, dtype=torch.int32, device=inputs.device)[:, None, None]
    indices_BN = (inputs.indices_SBK + shift_S11).transpose(0, 1).reshape(tokens, -1)
    values_BN = values_SBK.transpose(0, 1).reshape(tokens, -1)
    return bag(values_BN, indices_BN, W_dec_SFD.flatten(0, 1)) + inputs.b_dec_D


def dense_reconstruction(inputs: KernelInputs) -> Tensor:
    """Reconstruction by one library product per source."""
    y_BD = inputs.b_dec_D
    for values_BK, indices_BK, W_FD in zip(inputs.values_SBK, inputs.indices_SBK, inputs.W_dec_SFD, strict=True):
        y_BD = torch.addmm(y_BD, scatter(values_BK, indices_BK, len(W_FD)), W_FD)
    return y_BD


def loss_of(y_hat_BD: Tensor, y_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error in float32, and the residual."""
    residual_BD = y_hat_BD - y_BD
    return residual_BD.float().square().mean(), residual_BD


def _dense_encode(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> Tensor:
    values_BK, indices_BK = product_topk(x_BD, W_enc_FD, b_enc_F, k)
    return scatter(values_BK, indices_BK, len(W_enc_FD))


def sparse_leaf(values_BK: Tensor, indices_BK: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """A given code as values that require a gradient, and int64 indices.

    Args:
        values_BK: [N,k] activations.
        indices_BK: [N,k] feature numbers.
        n_features: unused; dense codes need it.
    """
    return values_BK.detach().requires_grad_(), indices_BK.long()


DENSE = TrainingMethod(
    name="dense",
    encode=_dense_encode,
    decode=lambda code_BF, W_FD: code_BF @ W_FD,
    given=lambda values, indices, n_features: scatter(values, indices, n_features).requires_grad_(),
)
BAG = TrainingMethod(
    name="embedding_bag",
    encode=product_topk,
    decode=lambda code, W_FD: bag(code[0], code[1], W_FD),
    given=sparse_leaf,
)


def adam(parameters: Sequence[Tensor], capturable: bool = False) -> torch.optim.Adam:
    """PyTorch's fused Adam with beta1 = 0; moments in the parameters' dtype."""
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.0, 0.999), fused=True, capturable=capturable)


def restart_adam(optimizer: torch.optim.Optimizer, *pairs: tuple[Tensor, Tensor]) -> None:
    """Copies the second tensor of each pair into the first and zeroes the moments, whose allocation is not timed."""
    with torch.no_grad():
        for tensor, original in pairs:
            tensor.copy_(original)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def training_step(inputs: KernelInputs, method: TrainingMethod, with_adam: bool) -> Runner:
    """Training step of one target by autograd: its own encoder, and the decoders from all sources.

    Args:
        inputs: tensors; the codes of the last source are replaced by those of the encoder.
        method: encoder and decoder functions.
        with_adam: whether to run the optimizer too, on copies of the weights.

    Returns:
        Work that returns the loss and the gradients of decoders and encoder, or their weights after the step.
    """

    def parameter(tensor: Tensor) -> Tensor:
        return (tensor.clone() if with_adam else tensor.detach()).requires_grad_()

    W_enc_FD, b_enc_F, b_dec_D = map(parameter, (inputs.W_enc_FD, inputs.b_enc_F, inputs.b_dec_D))
    decoders = [parameter(W_FD) for W_FD in inputs.W_dec_SFD]
    parameters = [W_enc_FD, b_enc_F, b_dec_D, *decoders]
    sources = zip(inputs.values_SBK[:-1], inputs.indices_SBK[:-1], strict=True)
    given = [method.given(values_BK, indices_BK, inputs.size.n_features) for values_BK, indices_BK in sources]
    optimizer = adam(parameters) if with_adam else None

    def clear_gradients() -> None:
        for leaf in (*parameters, *(code[0] if isinstance(code, tuple) else code for code in given)):
            leaf.grad = None

    def run() -> tuple[Any, ...]:
        clear_gradients()
        codes = [*given, method.encode(inputs.x_BD, W_enc_FD, b_enc_F, inputs.size.k)]
        y_hat_BD = b_dec_D.expand(inputs.size.n_tokens, -1)
        for code, W_FD in zip(codes, decoders, strict=True):
            y_hat_BD = y_hat_BD + method.decode(code, W_FD)
        loss, _ = loss_of(y_hat_BD, inputs.y_BD)
        loss.backward()
        if optimizer is None:
            return loss.detach(), [W_FD.grad for W_FD in decoders], W_enc_FD.grad
        optimizer.step()
        return loss.detach(), [W_FD.detach() for W_FD in decoders], W_enc_FD.detach()

    def start() -> None:
        if optimizer is None:
            return
        originals = (inputs.W_enc_FD, inputs.b_enc_F, inputs.b_dec_D, *inputs.W_dec_SFD)
        restart_adam(optimizer, *zip(parameters, originals, strict=True))

    return Runner(run=run, start=start)
