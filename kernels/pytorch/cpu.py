"""CPU backend for float32 and float64: embedding-bag decode, sampled products and CSR gradients.

Forward and backward touch only the k active features of a token, so the cost of a decode does not depend on F. Every
sum has a fixed order for a fixed number of threads: two runs give the same bits. Operations without a faster form here
are those of the reference.
"""

import warnings

import torch
import torch.nn.functional as functional
from torch import Tensor

from clt.kernels.common.adam import row_adam_
from clt.kernels.common.csr import FeatureCSR
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs, StoredGradientSteps
from clt.kernels.pytorch import reference
from clt.kernels.pytorch.dense import preactivations
from clt.kernels.pytorch.reference import batch_threshold, select_above

__all__ = [
    "batch_threshold",
    "decode",
    "decode_loss",
    "decoder_grad",
    "decoder_step_",
    "encode_topk",
    "encoder_grad",
    "encoder_step_",
    "preactivations",
    "row_adam_",
    "select_above",
    "select_topk",
]

# The CSR layout is used inside this module only and its results are tested; the notice would be shown to every user.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def rank_topk(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Same as `reference.rank_topk` by partial selection; ties at the k-th place are resolved by the reference."""
    n_features = pre_BF.shape[1]
    values_BK, indices_BK = pre_BF.topk(min(k + 1, n_features), dim=1)
    filled_BK = ~(values_BK[:, :k] <= 0)
    places_BK, filled_BK = reference.arrange_slots(indices_BK[:, :k], filled_BK, n_features)
    if k == n_features:
        return places_BK, filled_BK
    # Not less, rather than equal: NaN ties with NaN.
    tied_B = ~(values_BK[:, k] < values_BK[:, k - 1]) & ~(values_BK[:, k] <= 0)
    if bool(tied_B.any()):
        places_BK[tied_B], filled_BK[tied_B] = reference.rank_topk(pre_BF[tied_B], k)
    return places_BK, filled_BK


def select_topk(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.select_topk`."""
    indices_BK, filled_BK = rank_topk(pre_BF, k)
    return torch.where(filled_BK, pre_BF.gather(1, indices_BK), 0), indices_BK.int()


def encode_topk(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.encode_topk`."""
    return select_topk(preactivations(x_BD, W_enc_FD, b_enc_F), k)


def decode(inputs: DecodeInputs) -> Tensor:
    """See `KernelBackend.decode`."""
    values_BN, indices_BN = _bags(inputs.values_SBK, inputs.indices_SBK, inputs.W_dec_SFD.shape[1])
    table_RD = inputs.W_dec_SFD.flatten(0, 1)
    y_BD = functional.embedding_bag(indices_BN, table_RD, per_sample_weights=values_BN, mode="sum").add_(inputs.b_dec_D)
    return y_BD if inputs.skip_BD is None else y_BD.add_(inputs.skip_BD)


def decode_loss(inputs: DecodeInputs, y_BD: Tensor, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.decode_loss`."""
    residual_BD = decode(inputs).sub_(y_BD)
    if weights_B is None:
        return residual_BD.square().mean(), residual_BD
    return residual_BD.square().mean(dim=1) @ weights_B, residual_BD


def decoder_grad(inputs: DecoderGradInputs, need_W: bool = True) -> tuple[Tensor, Tensor | None]:
    """See `KernelBackend.decoder_grad`."""
    grad_BD, W_dec_SFD = inputs.grad_BD, inputs.W_dec_SFD
    if inputs.weights_B is not None:
        grad_BD = grad_BD * inputs.weights_B[:, None]
    if inputs.scale is not None:
        grad_BD = grad_BD * inputs.scale
    grad_BD = grad_BD.contiguous()
    grad_values = _sampled_products(grad_BD, inputs.values_SBK, inputs.indices_SBK, W_dec_SFD)
    if not need_W:
        return grad_values, None
    grad_W = torch.empty_like(W_dec_SFD)
    for source, values_BK in enumerate(inputs.values_SBK):
        _sum_rows(values_BK, grad_BD, inputs.csr, source, grad_W[source])
    return grad_values, grad_W


def encoder_grad(inputs: EncoderGradInputs) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.encoder_grad`."""
    x_BD, n_features = inputs.x_BD, inputs.n_features
    live_BK = torch.where(inputs.values_BK == 0, 0, inputs.grad_values_BK)
    grad_W = _sum_rows(live_BK, x_BD, inputs.csr, 0, x_BD.new_empty(n_features, x_BD.shape[1]))
    grad_b = live_BK.new_zeros(n_features).index_add_(0, inputs.indices_BK.reshape(-1), live_BK.reshape(-1))
    return grad_W, grad_b


_steps = StoredGradientSteps(decoder_grad, encoder_grad, row_adam_)
decoder_step_, encoder_step_ = _steps.decoder_step_, _steps.encoder_step_


def _bags(values_SBK: Tensor, indices_SBK: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """One bag per token over all sources, [B,S*K], so that the output is written once; rows of [S*F,D]."""
    sources, tokens, slots = values_SBK.shape
    shift_S11 = n_features * torch.arange(sources, device=indices_SBK.device)[:, None, None]
    indices_BN = (indices_SBK.long() + shift_S11).transpose(0, 1).reshape(tokens, sources * slots)
    return values_SBK.transpose(0, 1).reshape(tokens, sources * slots), indices_BN


def _sampled_products(grad_BD: Tensor, values_SBK: Tensor, indices_SBK: Tensor, W_dec_SFD: Tensor) -> Tensor:
    """[S,B,K]: inner product of every filled slot's decoder vector with its token's gradient."""
    if values_SBK.shape[2] > W_dec_SFD.shape[1]:
        # Slots that name features repeatedly, of tied decoders; PyTorch supports no row with more entries than columns.
        widest = W_dec_SFD.shape[1]
        parts = zip(values_SBK.split(widest, dim=2), indices_SBK.split(widest, dim=2), strict=True)
        return torch.cat([_sampled_products(grad_BD, values, indices, W_dec_SFD) for values, indices in parts], dim=2)
    values_BN, indices_BN = _bags(values_SBK, indices_SBK, W_dec_SFD.shape[1])
    tokens, width = values_BN.shape
    # CSR needs ascending columns: sources ascend, and so do the slots of a source but for its empty tail.
    pattern = torch.sparse_csr_tensor(
        torch.arange(0, tokens * width + 1, width),
        indices_BN.reshape(-1),
        torch.ones_like(values_BN).reshape(-1),
        (tokens, W_dec_SFD.shape[0] * W_dec_SFD.shape[1]),
        check_invariants=False,
    )
    product = torch.sparse.sampled_addmm(pattern, grad_BD, W_dec_SFD.flatten(0, 1).T, beta=0.0)
    live_BN = torch.where(values_BN == 0, 0, product.values().view(tokens, width))
    return live_BN.view(tokens, len(W_dec_SFD), -1).transpose(0, 1).contiguous()


def _sum_rows(weights_BK: Tensor, rows_BD: Tensor, csr: FeatureCSR, layer: int, out_FD: Tensor) -> Tensor:
    """For every feature the weighted sum of the rows of the tokens that hold it, into out [F,D]."""
    filled = int(csr.bounds[layer, -1])
    matrix_FB = torch.sparse_csr_tensor(
        csr.bounds[layer],
        csr.tokens[layer, :filled],
        weights_BK.reshape(-1)[csr.slots[layer, :filled]],
        (len(out_FD), len(rows_BD)),
        check_invariants=False,
    )
    return torch.addmm(out_FD, matrix_FB, rows_BD, beta=0, out=out_FD)
