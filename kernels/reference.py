"""The meaning of every operation in plain PyTorch, any dtype and device: the specification the fast paths are held to.

Shape letters: B tokens, S source layers that write to a target, D d_model, F features per layer, K slots per token and
layer. A slot holds an activation and a feature number; slots ascend by feature number, empty slots (value 0, index 0)
come last. Ties at the K-th place go to the lowest feature number.
"""

import torch
from torch import Tensor


def select_topk(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Feature numbers of the k largest positive pre-activations of each token.

    Args:
        pre_BF: [B,F] pre-activations.
        k: slots per token, 1 <= k <= F.

    Returns:
        indices [B,K] int64, ascending with empty slots last as 0, and filled [B,K] bool. NaN counts as filled, so that
        a broken value reaches the loss and is seen there.
    """
    order_BK = pre_BF.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return arrange_slots(order_BK, ~(pre_BF.gather(1, order_BK) <= 0), pre_BF.shape[1])


def arrange_slots(indices_BK: Tensor, filled_BK: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """Puts slots in their canonical order: filled ones ascending by feature number, then empty ones with index 0."""
    key_BK = torch.where(filled_BK, indices_BK, n_features).sort(dim=1).values
    filled_BK = key_BK < n_features
    return torch.where(filled_BK, key_BK, 0), filled_BK


def encode_topk(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """TopK(ReLU(x W_enc^T + b_enc)), as in `clt.kernels.ops.encode_topk`."""
    pre_BF = torch.addmm(b_enc_F, x_BD, W_enc_FD.T)
    indices_BK, filled_BK = select_topk(pre_BF.detach(), k)
    return torch.where(filled_BK, pre_BF.gather(1, indices_BK), 0), indices_BK.int()


def decode(values_SBK: Tensor, indices_SBK: Tensor, W_dec_SFD: Tensor, b_dec_D: Tensor) -> Tensor:
    """Sum over sources and slots of value times decoder vector, plus bias, as in `clt.kernels.ops.decode`."""
    y_BD = b_dec_D.expand(values_SBK.shape[1], -1)
    for values_BK, indices_BK, W_FD in zip(values_SBK, indices_SBK, W_dec_SFD, strict=True):
        live_BK = torch.where(values_BK == 0, torch.zeros_like(values_BK), values_BK)
        y_BD = y_BD + torch.einsum("bk,bkd->bd", live_BK, W_FD[indices_BK.long()])
    return y_BD
