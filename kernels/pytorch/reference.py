"""Reference backend: every operation in plain PyTorch, any dtype and device; the specification of the other backends.

Shape letters: B tokens, S source layers that write to a target, D d_model, F features per layer, K slots per token and
layer. A slot holds an activation and a feature number; slots ascend by feature number, empty slots (value 0, index 0)
come last and get no gradient. Ties at the K-th place go to the lowest feature number. Sums run in float32, in float64
for float64 tensors; results are rounded once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from clt.kernels.common.adam import row_adam_
from clt.kernels.common.dtypes import accumulator
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs, StoredGradientSteps

__all__ = [
    "accumulator",
    "arrange_slots",
    "batch_threshold",
    "decode",
    "decode_loss",
    "decoder_grad",
    "decoder_step_",
    "encode_topk",
    "encoder_grad",
    "encoder_step_",
    "preactivations",
    "rank_topk",
    "row_adam_",
    "select_above",
    "select_topk",
    "token_threshold",
]

#: Integers as wide as a float of so many bytes.
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def rank_topk(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Feature numbers of the k largest positive pre-activations of each token.

    Args:
        pre_BF: [B,F] pre-activations.
        k: slots per token, 1 <= k <= F.

    Returns:
        indices [B,K] int64, ascending with empty slots last as 0, and filled [B,K] bool. NaN ranks above everything and
        counts as filled, so that it reaches the loss, where it is detected.
    """
    order_BK = pre_BF.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return arrange_slots(order_BK, ~(pre_BF.gather(1, order_BK) <= 0), pre_BF.shape[1])


def arrange_slots(indices_BK: Tensor, filled_BK: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """Puts slots in their canonical order: filled ones ascending by feature number, then empty ones with index 0.

    Args:
        indices_BK: [B,K] feature numbers in any order.
        filled_BK: [B,K] bool, false for an empty slot.
        n_features: F.

    Returns:
        indices [B,K] and filled [B,K] in the new order.
    """
    key_BK = torch.where(filled_BK, indices_BK, n_features).sort(dim=1).values
    filled_BK = key_BK < n_features
    return torch.where(filled_BK, key_BK, 0), filled_BK


def preactivations(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor) -> Tensor:
    """See `KernelBackend.preactivations`."""
    wide = accumulator(x_BD.dtype)
    return torch.addmm(b_enc_F.to(wide), x_BD.to(wide), W_enc_FD.to(wide).T).to(x_BD.dtype)


def select_topk(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.select_topk`."""
    indices_BK, filled_BK = rank_topk(pre_BF, k)
    return torch.where(filled_BK, pre_BF.gather(1, indices_BK), 0), indices_BK.int()


def encode_topk(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.encode_topk`."""
    return select_topk(preactivations(x_BD, W_enc_FD, b_enc_F), k)


def positive_keys(pre: Tensor) -> Tensor:
    """Integers in the order of max(pre, 0), int64: the bits of positive numbers, the largest for NaN, else 0."""
    width = _INTEGER[pre.dtype.itemsize]
    return pre.view(width).masked_fill(pre.isnan(), torch.iinfo(width).max).clamp(min=0).long()


def batch_threshold(pre_BF: Tensor, n: int, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.batch_threshold`.

    A radix search over the bits of the numbers, eight at a time: only counts are exchanged between ranks.
    """
    # The keys that share all digits found so far.
    keys = positive_keys(pre_BF).reshape(-1)
    keys = keys[keys > 0]
    threshold = torch.zeros((), dtype=torch.int64, device=pre_BF.device)
    wanted = torch.full_like(threshold, n)
    for shift in range(8 * pre_BF.dtype.itemsize - 8, -1, -8):
        digits = (keys >> shift) & 0xFF
        counts = torch.bincount(digits, minlength=256)
        if reduce is not None:
            counts = reduce(counts)
        # The threshold's digit is the last that enough keys reach.
        n_reach = counts.flip(0).cumsum(0).flip(0)
        digit = (n_reach >= wanted).sum() - 1
        if digit < 0:
            return pre_BF.new_zeros(()), torch.zeros_like(wanted)
        wanted = wanted - (n_reach[digit] - counts[digit])
        threshold = threshold + (digit << shift)
        keys = keys[digits == digit]
    return threshold.to(_INTEGER[pre_BF.dtype.itemsize]).view(pre_BF.dtype), wanted


def token_threshold(pre_BN: Tensor, n: int, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """See `clt.kernels.ops.token_threshold`."""
    keys_BN = positive_keys(pre_BN)
    prefix_B = torch.zeros(len(pre_BN), dtype=torch.int64, device=pre_BN.device)
    wanted_B = torch.full_like(prefix_B, n)
    for shift in range(8 * pre_BN.dtype.itemsize - 8, -1, -8):
        digit_BN = (keys_BN >> shift) & 0xFF
        counted_BN = ((keys_BN >> (shift + 8)) == prefix_B[:, None]) & (keys_BN > 0)
        counts_BV = prefix_B.new_zeros(len(pre_BN), 256).scatter_add_(1, digit_BN, counted_BN.long())
        if reduce is not None:
            counts_BV = reduce(counts_BV)
        n_reach_BV = counts_BV.flip(1).cumsum(1).flip(1)
        # A token with fewer than n positive entries ends at key 0: its entries are never enough for a higher digit.
        digit_B = ((n_reach_BV >= wanted_B[:, None]).sum(dim=1) - 1).clamp(min=0)
        n_above_B = torch.nn.functional.pad(n_reach_BV, (0, 1)).gather(1, digit_B[:, None] + 1)[:, 0]
        wanted_B = wanted_B - n_above_B
        prefix_B = (prefix_B << 8) | digit_B
    threshold_B = prefix_B.to(_INTEGER[pre_BN.dtype.itemsize]).view(pre_BN.dtype)
    return threshold_B, torch.where(prefix_B == 0, 0, wanted_B)


def select_above(pre_BF: Tensor, threshold: Tensor, quota: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `KernelBackend.select_above`."""
    keys_BF, bound = positive_keys(pre_BF), positive_keys(threshold)
    # In (token, feature) order.
    tokens, features = ((keys_BF >= bound) & (keys_BF > 0)).nonzero(as_tuple=True)
    is_tied = keys_BF[tokens, features] == bound
    chosen = ~is_tied | (is_tied.cumsum(0) <= quota)
    tokens, features = tokens[chosen], features[chosen]
    counts_B = torch.bincount(tokens, minlength=len(pre_BF))
    slots = torch.arange(len(tokens), device=pre_BF.device) - (counts_B.cumsum(0) - counts_B)[tokens]
    values_BC = pre_BF.new_zeros(len(pre_BF), capacity)
    indices_BC = torch.zeros_like(values_BC, dtype=torch.int32)
    fits = slots < capacity
    places = (tokens[fits], slots[fits])
    values_BC[places] = pre_BF[tokens[fits], features[fits]]
    indices_BC[places] = features[fits].int()
    return values_BC, indices_BC, counts_B.int()


def _reconstruct(inputs: DecodeInputs) -> Tensor:
    """The sum of `decode` before it is rounded."""
    values_SBK, wide = inputs.values_SBK, accumulator(inputs.W_dec_SFD.dtype)
    y_BD = inputs.b_dec_D.to(wide).expand(values_SBK.shape[1], -1)
    if inputs.skip_BD is not None:
        y_BD = y_BD + inputs.skip_BD.to(wide)
    for values_BK, indices_BK, W_FD in zip(values_SBK, inputs.indices_SBK, inputs.W_dec_SFD, strict=True):
        live_BK = torch.where(values_BK == 0, torch.zeros_like(values_BK), values_BK).to(wide)
        y_BD = y_BD + torch.einsum("bk,bkd->bd", live_BK, W_FD[indices_BK.long()].to(wide))
    return y_BD


def decode(inputs: DecodeInputs) -> Tensor:
    """See `KernelBackend.decode`."""
    return _reconstruct(inputs).to(inputs.W_dec_SFD.dtype)


def decode_loss(inputs: DecodeInputs, y_BD: Tensor, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.decode_loss`."""
    residual_BD = _reconstruct(inputs) - y_BD
    error_B = residual_BD.square().mean(dim=1)
    error = error_B.mean() if weights_B is None else (error_B * weights_B).sum()
    return error, residual_BD.detach().to(inputs.W_dec_SFD.dtype)


def decoder_grad(inputs: DecoderGradInputs, need_W: bool = True) -> tuple[Tensor, Tensor | None]:
    """See `KernelBackend.decoder_grad`."""
    values_SBK, W_dec_SFD = inputs.values_SBK, inputs.W_dec_SFD
    wide = accumulator(W_dec_SFD.dtype)
    grad_BD = inputs.grad_BD.to(wide)
    if inputs.weights_B is not None:
        grad_BD = grad_BD * inputs.weights_B[:, None]
    if inputs.scale is not None:
        grad_BD = grad_BD * inputs.scale
    grad_values = torch.empty_like(values_SBK, dtype=wide)
    grad_W = torch.empty_like(W_dec_SFD) if need_W else None
    for source, (values_BK, indices_BK) in enumerate(zip(values_SBK, inputs.indices_SBK.long(), strict=True)):
        rows_BKD = W_dec_SFD[source][indices_BK].to(wide)
        product_BK = torch.einsum("bd,bkd->bk", grad_BD, rows_BKD)
        grad_values[source] = torch.where(values_BK == 0, 0, product_BK)
        if grad_W is not None:
            grad_W[source] = _sum_rows(values_BK.to(wide), indices_BK, grad_BD, W_dec_SFD.shape[1])
    return grad_values, grad_W


def encoder_grad(inputs: EncoderGradInputs) -> tuple[Tensor, Tensor]:
    """See `KernelBackend.encoder_grad`."""
    indices_BK, x_BD = inputs.indices_BK, inputs.x_BD
    wide = accumulator(x_BD.dtype)
    live_BK = torch.where(inputs.values_BK == 0, 0, inputs.grad_values_BK.to(wide))
    grad_W = _sum_rows(live_BK, indices_BK.long(), x_BD.to(wide), inputs.n_features)
    grad_b = live_BK.new_zeros(inputs.n_features).index_add_(0, indices_BK.reshape(-1).long(), live_BK.reshape(-1))
    return grad_W.to(x_BD.dtype), grad_b.to(x_BD.dtype)


_steps = StoredGradientSteps(decoder_grad, encoder_grad, row_adam_)
decoder_step_, encoder_step_ = _steps.decoder_step_, _steps.encoder_step_


def _sum_rows(weights_BK: Tensor, indices_BK: Tensor, rows_BD: Tensor, n_features: int) -> Tensor:
    """[F,D]: for every feature the weighted sum of the rows of the tokens that hold it."""
    contributions_BKD = weights_BK[:, :, None] * rows_BD[:, None]
    total_FD = rows_BD.new_zeros(n_features, rows_BD.shape[1])
    return total_FD.index_add_(0, indices_BK.reshape(-1), contributions_BKD.flatten(0, 1))
