"""Sparsity penalty of jumprelu and relu, and the curvature term of the straight-through threshold gradient.

The penalty of a token is the sum of tanh(c z n) over its active features, with activation z and norm n of the feature's
decoder vectors over all targets (Ameisen et al. 2025, "Circuit Tracing", section D). n has a gradient, or decoders
would grow while z shrinks. The loss is the mean over tokens and source layers.

Deactivating a feature at its threshold t changes the loss by t g - t^2 h / 2 + l tanh(c t n): slope g of the squared
error above the threshold, curvature h (the error is quadratic in z), penalty weight l. `encoding.jump` passes on t g
and t l c n / cosh^2(c z n); this module adds the rest. Without the curvature g is near 0 at the best activations
whatever the threshold, nothing opposes the penalty, and thresholds only rise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clt.records import SparseCodes
from clt.transcoder.encoding import decoder_squares, in_window, sum_by_feature
from clt.transcoder.layers import error_weight
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.sparsity import Peers

#: Lower bound of squared norms: keeps the gradient of a norm finite for zero decoders.
_LEAST_SQUARE = 1e-24


def sparsity_loss(
    transcoder: CrossLayerTranscoder, codes: SparseCodes, weight: float, peers: Peers, weights_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted penalty of the source layers owned here; a collective call of the model group.

    Args:
        transcoder: the transcoder, or one rank's share, of the kind jumprelu or relu.
        codes: [L_own,B,K] its codes.
        weight: weight of the penalty at this step.
        peers: owners of the other layers.
        weights_B: [B] weight of each token in the squared error; None for 1/B.

    Returns:
        this rank's share of the loss [], to be added to the squared error, and its share of the penalty [], unweighted
        and detached; the sums over the model group are those of the transcoder.
    """
    settings, F = transcoder.config.sparsity, codes.n_features
    squares_LF = decoder_squares(transcoder, peers)
    tokens = codes.values.shape[1]
    if weights_B is None:
        weights_B = codes.values.new_full((tokens,), 1 / max(1, tokens))
    # An empty selection of the squares puts their all-reduce into every rank's backward pass.
    penalty = squares_LF[[]].sum().to(codes.values.dtype)
    correction = torch.zeros_like(penalty)
    for row, layer in enumerate(transcoder.share.sources):
        values_BK, indices_BK = codes.values[row], codes.indices[row]
        squares_F = squares_LF[transcoder.source_row(layer)]
        norm_F = squares_F.clamp(min=_LEAST_SQUARE).sqrt().to(values_BK.dtype)
        tanh_BK: Tensor = _TanhPenalty.apply(values_BK, norm_F, indices_BK, settings.penalty_scale)
        penalty = penalty + tanh_BK.sum(dim=1) @ weights_B / transcoder.n_sources_of_model
        if settings.kind != "jumprelu":
            continue
        log_threshold_F = transcoder.log_thresholds(layer)
        curvature_F = _curvature_term(transcoder, codes, row, squares_F.detach(), weight, weights_B)
        assert curvature_F.shape == (F,)
        # Infinite thresholds, of features that never fire, have no gradient.
        finite_F = log_threshold_F.masked_fill(log_threshold_F.isinf(), 0)
        # Value zero: only the gradient matters.
        correction = correction + ((finite_F - finite_F.detach()) * curvature_F).sum()
    return weight * penalty + correction, penalty.detach()


@torch.no_grad()
def _curvature_term(
    transcoder: CrossLayerTranscoder, codes: SparseCodes, row: int, squares_F: Tensor, weight: float, weights_B: Tensor
) -> Tensor:
    """[F]: terms of the gradient of each log threshold that `encoding.jump` leaves out."""
    settings, layer = transcoder.config.sparsity, transcoder.share.sources[row]
    values_BK, indices_BK = codes.values[row].detach(), codes.indices[row]
    chosen = indices_BK.long()
    t_BK = transcoder.log_thresholds(layer).detach().exp()[chosen]
    squares_BK = squares_F.to(values_BK.dtype)[chosen]
    c_BK = settings.penalty_scale * squares_BK.clamp(min=_LEAST_SQUARE).sqrt()
    half_curvature_BK = squares_BK * (error_weight(transcoder.config) / transcoder.config.d_model)
    at_threshold_BK = torch.tanh(c_BK * t_BK) - t_BK * c_BK / torch.cosh(c_BK * values_BK).square()
    gain_BK = -t_BK.square() * half_curvature_BK + weight / transcoder.n_sources_of_model * at_threshold_BK
    amounts_BK = -(t_BK / settings.bandwidth) * gain_BK * weights_B[:, None]
    amounts_BK = torch.where(in_window(values_BK, t_BK, settings.bandwidth), amounts_BK, 0)
    return sum_by_feature(amounts_BK, values_BK, indices_BK, codes.n_features)


class _TanhPenalty(torch.autograd.Function):
    """tanh(c z n) of every slot; the gradient of n is summed in a fixed order."""

    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, norm_F: Tensor, indices_BK: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        tanh_BK = torch.tanh(scale * values_BK * norm_F[indices_BK.long()])
        ctx.save_for_backward(values_BK, norm_F, indices_BK, tanh_BK)
        return tanh_BK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, norm_F, indices_BK, tanh_BK = ctx.saved_tensors
        slope_BK = gradients[0] * ctx.scale * (1 - tanh_BK.square())
        grad_norm_F = sum_by_feature(slope_BK * values_BK, values_BK, indices_BK, len(norm_F))
        return slope_BK * norm_F[indices_BK.long()], grad_norm_F, None, None
