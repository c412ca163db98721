"""Training loss, in standardised units: squared error of every target plus two terms for dead features.

The squared error is divided by the store's variance (1 in standardised units) and token weights by their mean over the
store, both constants, so that the loss is a mean over tokens on any number of ranks.

AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section A.2), extended to cross-layer decoders: the
dead features of all layers reconstruct the live ones' residual in every target. The residual is small, so its gradient
is too small for dead features to re-enter the top k. The revival term raises the activations that AuxK selected until
the feature fires (a pre-activation loss in the manner of Conerly et al. 2025, "Dictionary learning optimization
techniques", restricted to the slots where the feature fits best).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt.errors import ConfigError
from clt.kernels import ops
from clt.records import Modality, SparseCodes
from clt.training.settings import AuxKSettings, TokenWeights
from clt.transcoder.decoding import squared_error
from clt.transcoder.model import CrossLayerTranscoder

if TYPE_CHECKING:
    from clt.distributed.shared_decoders import SharedDecoders


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Loss terms of one rank's tokens and targets.

    Attributes:
        total: scalar to differentiate: this rank's share of the loss; the sum over the model group is the loss.
        error_M: [M_own] mean squared error per target over weighted tokens and channels, of the columns owned here,
            detached.
        auxk: scalar auxiliary error before its coefficient, detached.
        revival: scalar revival term before its weight, detached; negative.
    """

    total: Tensor
    error_M: Tensor
    auxk: Tensor
    revival: Tensor


def modality_weights(settings: TokenWeights, counts: Sequence[int]) -> Tensor | None:
    """Weight of a token of each modality in the loss: its setting over the mean over all tokens that train.

    Args:
        settings: the weights.
        counts: tokens that train, by modality in the order of `Modality`.

    Returns:
        [G] float64, mean 1 over the tokens; None if all weights are equal.

    Raises:
        ConfigError: all tokens that train have weight 0.
    """
    weights = (settings.text, settings.image, settings.image_special, settings.bos)
    if len(set(weights)) == 1:
        return None
    sums = [weight * count for weight, count in zip(weights, counts, strict=True)]
    if sum(sums) == 0:
        some = " and ".join(Modality(number).name.lower() for number, count in enumerate(counts) if count)
        raise ConfigError(
            f"data.token_weights: the tokens that pass the filter ({some or 'none'}) have weight 0; raise it"
        )
    return torch.tensor(weights, dtype=torch.float64) * sum(counts) / sum(sums)


def encode_dead(
    transcoder: CrossLayerTranscoder, x_LBD: Tensor, dead_LF: Tensor, k: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes of the dead features only: their k largest positive pre-activations.

    Args:
        transcoder: the transcoder, or one rank's share.
        x_LBD: [L_own,B,D] standardised encoder inputs.
        dead_LF: [L_own,F] bool.
        k: slots per token and layer.

    Yields:
        values [B,K] and indices [B,K] int32 of each own source; all slots of a layer without dead features are empty.
    """
    for row, layer in enumerate(transcoder.share.sources):
        exclude_F = torch.zeros_like(transcoder.encoder_bias(layer)).masked_fill(~dead_LF[row], -torch.inf)
        bias_F = transcoder.encoder_bias(layer) + exclude_F
        yield ops.encode_topk(x_LBD[row], transcoder.encoder_matrix(layer), bias_F, k)


def auxk_error(
    transcoder: CrossLayerTranscoder,
    layer: int,
    values_SBK: Tensor,
    indices_SBK: Tensor,
    missed: Tensor,
    csr: ops.FeatureCSR | None = None,
    weights_B: Tensor | None = None,
    shared: SharedDecoders | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared error of the dead features' reconstruction of the live features' residual in one target.

    Args:
        transcoder: the transcoder, or one rank's share.
        layer: target layer owned here.
        values_SBK: [S,B,K] activations of the dead features of this target's sources.
        indices_SBK: [S,B,K] int32 feature numbers.
        missed: [B,D_own] standardised y - yhat of the same tokens, [S,B,D_own] of independent sources; a constant.
        csr: grouping of these S layers by feature; None: the backward pass builds it.
        weights_B: [B] weight of each token; None for 1/B.
        shared: decoders that belong to sources, if some are not owned here.

    Returns:
        error [], weighted sum over tokens of the mean over all D channels as far as columns are owned here, and the
        residual, reconstruction - missed, detached. Of independent sources the mean of their errors.
    """
    no_bias = torch.zeros_like(transcoder.decoder_bias(layer))
    error, residual = squared_error(
        transcoder, layer, values_SBK, indices_SBK, no_bias, missed, weights_B, None, csr, shared
    )
    return transcoder.column_part(error), residual


def revival(codes: SparseCodes, n_sources: int, weights_B: Tensor | None = None) -> Tensor:
    """Negative mean activation of the dead features that AuxK selected.

    Args:
        codes: dead features' codes of the sources owned here, [L_own,B,K].
        n_sources: source layers of the whole transcoder, L.
        weights_B: [B] weight of each token; None for 1/B.

    Returns:
        Scalar; summed over the model group it is the mean over all layers, tokens and slots.
    """
    if weights_B is None:
        return -codes.values.mean(dim=(1, 2)).sum() / n_sources
    return -(codes.values.mean(dim=2) @ weights_B.to(codes.values.dtype)).sum() / n_sources


def combine(
    error_M: Tensor, auxk_M: Tensor | None, revival: Tensor | None, settings: AuxKSettings, weights_M: Tensor
) -> LossTerms:
    """The loss: mean over all targets, or pairs, of the squared error, plus the weighted terms of dead features.

    Args:
        error_M: [M_own] from `CrossLayerTranscoder.decode_loss_layer`.
        auxk_M: [M_own] from `auxk_error`, or None without dead features.
        revival: scalar from the function of that name, or None without dead features.
        settings: weights of the two.
        weights_M: [M_own] of each target, from `clt.transcoder.layers.target_weight`.

    Returns:
        This rank's terms; summed over the model group they are the loss.
    """
    total = (error_M * weights_M).sum()
    auxk = lift = torch.zeros_like(total)
    if auxk_M is not None and revival is not None:
        auxk, lift = (auxk_M * weights_M).sum(), revival
        total = total + settings.coefficient * auxk + settings.revival * lift
    return LossTerms(total=total, error_M=error_M.detach(), auxk=auxk.detach(), revival=lift.detach())
