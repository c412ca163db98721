"""The only public door to the kernels: checks its arguments and picks the implementation.

CPU tensors in float32 or float64 take the sparse CPU path, everything else the reference. Both give the same features,
values within rounding, and gradients; `tests/kernels` holds that.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from clt.kernels import cpu, reference


def _implementation(x: Tensor) -> ModuleType:
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return cpu
    return reference


def encode_topk(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Activations of the k largest positive features: TopK(ReLU(x W_enc^T + b_enc)).

    Args:
        x_BD: [B,D] encoder inputs.
        W_enc_FD: [F,D] encoder weights, same dtype.
        b_enc_F: [F] encoder bias; -inf excludes a feature.
        k: slots per token.

    Returns:
        values [B,K], differentiable with respect to all three tensors, and indices [B,K] int32, ascending; empty slots
        come last with value 0 and index 0 and get no gradient. Ties go to the lowest feature number.

    Raises:
        ValueError: shapes do not fit or k is not in 1..F.
    """
    if (
        x_BD.ndim != 2
        or W_enc_FD.ndim != 2
        or x_BD.shape[1] != W_enc_FD.shape[1]
        or b_enc_F.shape != W_enc_FD.shape[:1]
    ):
        raise ValueError(
            f"encode_topk: x {tuple(x_BD.shape)}, W_enc {tuple(W_enc_FD.shape)}, b_enc {tuple(b_enc_F.shape)} "
            "must be [B,D], [F,D], [F]"
        )
    if not 1 <= k <= len(W_enc_FD):
        raise ValueError(f"encode_topk: k={k} must lie in 1..{len(W_enc_FD)}")
    values_BK, indices_BK = _implementation(x_BD).encode_topk(x_BD, W_enc_FD, b_enc_F, k)
    return values_BK, indices_BK


def decode(values_SBK: Tensor, indices_SBK: Tensor, W_dec_SFD: Tensor, b_dec_D: Tensor) -> Tensor:
    """Reconstruction of one target layer from the codes of its S source layers.

    Args:
        values_SBK: [S,B,K] activations; slots with value 0 are empty.
        indices_SBK: [S,B,K] int32 feature numbers.
        W_dec_SFD: [S,F,D] decoders from each source into this target.
        b_dec_D: [D] bias.

    Returns:
        [B,D], differentiable with respect to values, decoders and bias; empty slots get no gradient.

    Raises:
        ValueError: shapes do not fit.
    """
    fits = (
        values_SBK.ndim == 3
        and values_SBK.shape == indices_SBK.shape
        and W_dec_SFD.ndim == 3
        and len(W_dec_SFD) == len(values_SBK)
        and b_dec_D.shape == W_dec_SFD.shape[2:]
    )
    if not fits:
        raise ValueError(
            f"decode: values {tuple(values_SBK.shape)}, indices {tuple(indices_SBK.shape)}, W_dec "
            f"{tuple(W_dec_SFD.shape)}, b_dec {tuple(b_dec_D.shape)} must be [S,B,K], [S,B,K], [S,F,D], [D]"
        )
    y_BD: Tensor = _implementation(values_SBK).decode(values_SBK, indices_SBK, W_dec_SFD, b_dec_D)
    return y_BD
