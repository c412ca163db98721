"""Kernels of other projects for the kernel benchmark, imported from their checkouts; none of their code is here.

EleutherAI's clt-training and sparsify: an embedding bag whose backward computes both gradients after a counting sort by
atomics. openai's sparse_autoencoder: a separate pass for each gradient. Only files without imports of their own package
are loaded. The steps between them follow their trainers: product, ReLU and torch.topk; the encoder's gradient by
openai's kernel or, in sparsify, by index_add_ of all contributions.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clt.errors import ConfigError
from clt.launch.bench.kernels.baselines import TrainingMethod, product_topk, sparse_leaf
from clt.launch.bench.kernels.report import ELEUTHER

#: (indices [N,k], values [N,k] float32, rows [N,D], F) to [F,D], the weighted sum of the rows of each feature's tokens.
Transposed = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def eleuther(checkout: Path) -> TrainingMethod:
    """EleutherAI's kernels.

    Args:
        checkout: of clt-training or of sparsify.

    Raises:
        ConfigError: it is neither.
    """
    bag = _load(checkout, "sparsify/xformers.py", "--eleuther").xformers_embedding_bag
    transposed: Transposed = _all_contributions
    name = f"{ELEUTHER} sparsify"
    if (checkout / "sparsify" / "kernels.py").is_file():
        transposed = _load(checkout, "sparsify/kernels.py", "--eleuther").triton_sparse_transpose_dense_matmul
        name = f"{ELEUTHER} clt-training"

    def decode(code: tuple[Tensor, Tensor], W_dec_FD: Tensor) -> Tensor:
        y_BD: Tensor = bag(code[1], W_dec_FD, code[0])
        return y_BD

    return _method(name, decode, transposed)


def openai(checkout: Path) -> TrainingMethod:
    """openai's kernels, whose activations are float32.

    Args:
        checkout: of sparse_autoencoder.

    Raises:
        ConfigError: it is not.
    """
    kernels = _load(checkout, "sparse_autoencoder/kernels.py", "--openai")

    def decode(code: tuple[Tensor, Tensor], W_dec_FD: Tensor) -> Tensor:
        # Their decoder is [D,F] with contiguous columns.
        y_BD: Tensor = kernels.TritonDecoderAutograd.apply(code[1], code[0].float(), W_dec_FD.T)
        return y_BD

    return _method("openai", decode, kernels.triton_sparse_transpose_dense_matmul)


def _method(name: str, decode: Callable[[Any, Tensor], Tensor], transposed: Transposed) -> TrainingMethod:
    def encode(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values_BK, indices_BK = _PeerEncoder.apply(x_BD, W_enc_FD, b_enc_F, k, transposed)
        return values_BK, indices_BK

    return TrainingMethod(name=name, encode=encode, decode=decode, given=sparse_leaf, may_fail=True)


class _PeerEncoder(torch.autograd.Function):
    """Product, ReLU and torch.topk, with the sparse backward of both projects."""

    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int, transposed: Transposed
    ) -> tuple[Tensor, Tensor]:
        values_BK, indices_BK = product_topk(x_BD, W_enc_FD, b_enc_F, k)
        ctx.save_for_backward(x_BD, b_enc_F, values_BK, indices_BK)
        ctx.transposed = transposed
        ctx.mark_non_differentiable(indices_BK)
        return values_BK, indices_BK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, b_enc_F, values_BK, indices_BK = ctx.saved_tensors
        grad_BK = grads[0] * (values_BK > 0)
        grad_W_FD = ctx.transposed(indices_BK, grad_BK.float(), x_BD, len(b_enc_F))
        grad_b_F = torch.zeros_like(b_enc_F).index_add_(0, indices_BK.flatten(), grad_BK.flatten().type_as(b_enc_F))
        return None, grad_W_FD.type_as(b_enc_F), grad_b_F, None, None


def _all_contributions(indices_BK: Tensor, values_BK: Tensor, rows_BD: Tensor, n_features: int) -> Tensor:
    contributions_BKD = values_BK.type_as(rows_BD)[:, :, None] * rows_BD[:, None]
    total_FD = rows_BD.new_zeros(n_features, rows_BD.shape[1])
    return total_FD.index_add_(0, indices_BK.flatten(), contributions_BKD.flatten(0, 1))


def _load(checkout: Path, file: str, option: str) -> ModuleType:
    path = checkout / file
    if not path.is_file():
        raise ConfigError(f"{option} {checkout}: has no {file}; give the folder of a checkout")
    name = "clt_bench_peer_" + file.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Triton finds the source of a kernel through its module.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
