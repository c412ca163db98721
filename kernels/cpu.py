"""The fast CPU path, float32 and float64: embedding-bag decode, sampled products and CSR gradients.

Forward and backward touch only the k active features of a token, so the cost of a decode does not depend on F. Every
sum has a fixed order for a fixed number of threads: two runs give the same bits.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from clt.kernels import reference

# The CSR layout is used inside this module only and its results are tested; the notice would greet every user.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def select_topk(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Same as `reference.select_topk` by partial selection; ties at the k-th place are settled by the reference."""
    values_BK, indices_BK = pre_BF.topk(k, dim=1, sorted=False)
    filled_BK = ~(values_BK <= 0)
    least_B1 = values_BK.amin(dim=1, keepdim=True)
    tied_B = ((pre_BF >= least_B1).sum(dim=1) > k) & (least_B1[:, 0] > 0)
    indices_BK, filled_BK = reference.arrange_slots(indices_BK, filled_BK, pre_BF.shape[1])
    if bool(tied_B.any()):
        indices_BK[tied_B], filled_BK[tied_B] = reference.select_topk(pre_BF[tied_B], k)
    return indices_BK, filled_BK


def _feature_major(values_BN: Tensor, indices_BN: Tensor, n_rows: int) -> Tensor:
    """Codes [B,N] as the CSR matrix [n_rows,B] whose row f lists the tokens in which feature f is active."""
    keys, order = indices_BN.reshape(-1).sort(stable=True)
    bounds = torch.searchsorted(keys, torch.arange(n_rows + 1, device=keys.device))
    tokens = torch.div(order, indices_BN.shape[1], rounding_mode="floor")
    return torch.sparse_csr_tensor(
        bounds, tokens, values_BN.reshape(-1)[order], (n_rows, len(values_BN)), check_invariants=False
    )


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        pre_BF = torch.addmm(b_enc_F, x_BD, W_enc_FD.T)
        indices_BK, filled_BK = select_topk(pre_BF, k)
        values_BK = torch.where(filled_BK, pre_BF.gather(1, indices_BK), 0)
        ctx.save_for_backward(x_BD, W_enc_FD, indices_BK, filled_BK)
        indices_int = indices_BK.int()
        ctx.mark_non_differentiable(indices_int)
        return values_BK, indices_int

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, W_enc_FD, indices_BK, filled_BK = ctx.saved_tensors
        grad_BK = torch.where(filled_BK, grads[0], 0)
        grad_FB = _feature_major(grad_BK, indices_BK, len(W_enc_FD))
        grad_W = grad_FB @ x_BD
        grad_b = torch.zeros_like(W_enc_FD[:, 0]).index_add_(0, indices_BK.reshape(-1), grad_BK.reshape(-1))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = functional.embedding_bag(indices_BK, W_enc_FD, per_sample_weights=grad_BK, mode="sum")
        return grad_x, grad_W, grad_b, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_SBK: Tensor, indices_SBK: Tensor, W_dec_SFD: Tensor, b_dec_D: Tensor) -> Tensor:
        sources, tokens, slots = values_SBK.shape
        n_features = W_dec_SFD.shape[1]
        shift_S11 = n_features * torch.arange(sources, device=indices_SBK.device)[:, None, None]
        # One bag per token over all sources: the output is written once.
        indices_BN = (indices_SBK.long() + shift_S11).transpose(0, 1).reshape(tokens, sources * slots)
        values_BN = values_SBK.transpose(0, 1).reshape(tokens, sources * slots)
        table_RD = W_dec_SFD.flatten(0, 1)
        ctx.save_for_backward(values_BN, indices_BN, W_dec_SFD)
        y_BD = functional.embedding_bag(indices_BN, table_RD, per_sample_weights=values_BN, mode="sum")
        return y_BD.add_(b_dec_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_BN, indices_BN, W_dec_SFD = ctx.saved_tensors
        grad_BD = grads[0].contiguous()
        tokens, width = values_BN.shape
        rows = W_dec_SFD.shape[0] * W_dec_SFD.shape[1]
        grad_values = None
        if ctx.needs_input_grad[0]:
            # CSR wants ascending columns: sources ascend, and so do the slots of a source but for its empty tail.
            pattern = torch.sparse_csr_tensor(
                torch.arange(0, tokens * width + 1, width),
                indices_BN.reshape(-1),
                torch.ones_like(values_BN).reshape(-1),
                (tokens, rows),
                check_invariants=False,
            )
            product = torch.sparse.sampled_addmm(pattern, grad_BD, W_dec_SFD.flatten(0, 1).T, beta=0.0)
            live_BN = torch.where(values_BN == 0, 0, product.values().view(tokens, width))
            grad_values = live_BN.view(tokens, W_dec_SFD.shape[0], -1).transpose(0, 1)
        grad_W = grad_b = None
        if ctx.needs_input_grad[2]:
            grad_W = (_feature_major(values_BN, indices_BN, rows) @ grad_BD).view_as(W_dec_SFD)
        if ctx.needs_input_grad[3]:
            grad_b = grad_BD.sum(dim=0)
        return grad_values, None, grad_W, grad_b


def encode_topk(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """TopK(ReLU(x W_enc^T + b_enc)), as in `clt.kernels.ops.encode_topk`."""
    values_BK, indices_BK = _EncodeTopK.apply(x_BD, W_enc_FD, b_enc_F, k)
    return values_BK, indices_BK


def decode(values_SBK: Tensor, indices_SBK: Tensor, W_dec_SFD: Tensor, b_dec_D: Tensor) -> Tensor:
    """Sum over sources and slots of value times decoder vector, plus bias, as in `clt.kernels.ops.decode`."""
    y_BD: Tensor = _Decode.apply(values_SBK, indices_SBK, W_dec_SFD, b_dec_D)
    return y_BD
