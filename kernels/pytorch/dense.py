"""Dense path: codes scattered into a [B,S*F] matrix and multiplied by a library product, on tensor cores.

A gather moves 2*B*K*D bytes, a product takes 2*B*F*D operations: where F/K is small the product is faster, although
most of what it multiplies is zero. `clt.kernels.gpu.configs.path` chooses. Products of bfloat16 sum in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clt.kernels.common.dtypes import accumulator
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs


def scatter_codes(values_SBK: Tensor, indices_SBK: Tensor, n_features: int) -> Tensor:
    """Codes as a dense matrix.

    Args:
        values_SBK: [S,B,K] activations; slots with value 0 are empty.
        indices_SBK: [S,B,K] int32 feature numbers.
        n_features: F.

    Returns:
        [B,S*F] in the dtype of the values: 0 where a feature is not active, the sum where several slots hold it.
    """
    sources, tokens, k = values_SBK.shape
    codes_SBF = values_SBK.new_zeros(sources, tokens, n_features + 1)
    # Empty slots all hold feature 0: they go to a separate column, so that they overwrite no other slot.
    places, order = indices_SBK.long().masked_fill(values_SBK == 0, n_features).sort(dim=2, stable=True)
    sums = values_SBK.gather(2, order).to(accumulator(values_SBK.dtype))
    # Running sums within runs of one feature, in an order that is fixed, as that of scatter_add_ on a GPU is not.
    for shift in (1 << n for n in range((k - 1).bit_length())):
        same = places[..., shift:] == places[..., :-shift]
        sums[..., shift:] = sums[..., shift:] + torch.where(same, sums[..., :-shift], 0)
    is_last = torch.nn.functional.pad(places.diff(dim=2) != 0, (0, 1), value=True)
    codes_SBF.scatter_(2, torch.where(is_last, places, n_features), sums.to(values_SBK.dtype))
    return codes_SBF[:, :, :n_features].transpose(0, 1).reshape(tokens, sources * n_features)


def preactivations(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor) -> Tensor:
    """See `KernelBackend.preactivations`; one library product."""
    return torch.addmm(b_enc_F, x_BD, W_enc_FD.T)


def decode(inputs: DecodeInputs) -> Tensor:
    """See `KernelBackend.decode`."""
    codes_BR = scatter_codes(inputs.values_SBK, inputs.indices_SBK, inputs.W_dec_SFD.shape[1])
    y_BD = torch.addmm(inputs.b_dec_D, codes_BR, inputs.W_dec_SFD.flatten(0, 1))
    return y_BD if inputs.skip_BD is None else y_BD + inputs.skip_BD


def decode_loss(inputs: DecodeInputs, y_BD: Tensor, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.decode_loss`."""
    wide = accumulator(inputs.W_dec_SFD.dtype)
    residual_BD = decode(inputs).to(wide) - y_BD
    error_B = residual_BD.square().mean(dim=1)
    error = error_B.mean() if weights_B is None else error_B @ weights_B.to(wide)
    return error, residual_BD.to(inputs.W_dec_SFD.dtype)


def decoder_grad(inputs: DecoderGradInputs, need_W: bool = True) -> tuple[Tensor, Tensor | None]:
    """See `KernelBackend.decoder_grad`; two products, which do not read the grouping."""
    grad_BD, values_SBK, W_dec_SFD = inputs.grad_BD, inputs.values_SBK, inputs.W_dec_SFD
    wide = accumulator(W_dec_SFD.dtype)
    if inputs.weights_B is not None:
        grad_BD = grad_BD * inputs.weights_B[:, None].to(grad_BD.dtype)
    factor = grad_BD.new_ones((), dtype=wide) if inputs.scale is None else inputs.scale
    grad_values = torch.empty_like(values_SBK, dtype=wide)
    for source, W_FD in enumerate(W_dec_SFD):
        product_BK = (grad_BD @ W_FD.T).gather(1, inputs.indices_SBK[source].long())
        grad_values[source] = torch.where(values_SBK[source] == 0, 0, product_BK * factor)
    if not need_W:
        return grad_values, None
    codes_BR = scatter_codes(values_SBK, inputs.indices_SBK, W_dec_SFD.shape[1])
    grad_W = (codes_BR.T @ grad_BD).view_as(W_dec_SFD)
    return grad_values, grad_W.mul_(factor.to(grad_W.dtype))


def encoder_grad(inputs: EncoderGradInputs) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.encoder_grad`; one product, which does not read the grouping."""
    x_BD = inputs.x_BD
    live_BK = torch.where(inputs.values_BK == 0, 0, inputs.grad_values_BK)
    # A slot whose gradient is 0 may be dropped with the empty ones: it adds nothing.
    grad_BF = scatter_codes(live_BK[None], inputs.indices_BK[None], inputs.n_features)
    return grad_BF.to(x_BD.dtype).T @ x_BD, grad_BF.sum(dim=0).to(x_BD.dtype)
