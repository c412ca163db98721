"""Thresholds from calibration tokens, for transcoders whose selection rule compares features with each other.

With a threshold per feature, steering one feature does not deactivate another, and a layer can be encoded without the
others. `to_jumprelu` sets thresholds at which every feature fires on as many calibration tokens as before.
`calibrate_threshold` sets the single threshold with which a joint_topk or batch_topk transcoder encodes a layer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clt.errors import ConfigError
from clt.evaluation.evaluator import StoreReport, evaluate_store
from clt.kernels import ops
from clt.records import ActivationBatch, SparseCodes
from clt.transcoder.architecture import SparsitySettings
from clt.transcoder.dead_features import firing_counts
from clt.transcoder.encoding import scores_of
from clt.transcoder.model import CrossLayerTranscoder

#: Number of features whose pre-activations are sorted at a time.
_SORTED_TOGETHER = 256

#: Neighbouring floats tried if exp(log t) does not fall between two pre-activations.
_NUDGES = 16


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """Effect of a conversion, measured on its calibration tokens.

    Attributes:
        before: measures of the original transcoder.
        after: measures of the converted one.
        never_fired: number of features that did not fire before; their threshold is infinite.
        changed_counts: number of features that fire on a different number of tokens than before, because
            pre-activations tie or are closer than two logarithms.
    """

    before: StoreReport
    after: StoreReport
    never_fired: int
    changed_counts: int


@torch.no_grad()
def to_jumprelu(
    transcoder: CrossLayerTranscoder, batches: Sequence[ActivationBatch]
) -> tuple[CrossLayerTranscoder, ConversionReport]:
    """Converts to a jumprelu transcoder with the same weights whose features fire as often as before.

    The threshold of a feature that fires on c tokens lies midway between its c-th and next largest pre-activation.

    Args:
        transcoder: a whole transcoder of any other kind.
        batches: raw calibration activations of all layers; x and y [n_layers,B,D]. Read several times; the
            pre-activations of one layer at all tokens are held in memory.

    Returns:
        The transcoder and a report.

    Raises:
        ConfigError: the transcoder is of kind jumprelu already.
        StoreError: there are no tokens.
    """
    if transcoder.config.sparsity.kind == "jumprelu":
        raise ConfigError("sparsity.kind=jumprelu: the transcoder has a threshold per feature already")
    before = evaluate_store(transcoder, batches)
    counts_LF = _firing(transcoder, batches)
    config = replace(transcoder.config, sparsity=SparsitySettings(kind="jumprelu"))
    converted = CrossLayerTranscoder(config, transcoder.scaling, transcoder.share, provenance=transcoder.provenance)
    converted = converted.to(next(transcoder.parameters())).requires_grad_(False)
    converted.load_state_dict(transcoder.state_dict(), strict=False)
    for row, layer in enumerate(transcoder.share.sources):
        pre_NF = torch.cat(
            [ops.preactivations(x_BD, *transcoder.encoder(layer)) for x_BD in _inputs(transcoder, batches, row)]
        )
        for features in torch.arange(transcoder.config.n_features, device=pre_NF.device).split(_SORTED_TOGETHER):
            log_F = _log_thresholds(pre_NF[:, features], counts_LF[row, features])
            converted.log_thresholds(layer)[features] = log_F
    report = ConversionReport(
        before=before,
        after=evaluate_store(converted, batches),
        never_fired=int((counts_LF == 0).sum()),
        changed_counts=int((_firing(converted, batches) != counts_LF).sum()),
    )
    return converted, report


@torch.no_grad()
def calibrate_threshold(transcoder: CrossLayerTranscoder, batches: Sequence[ActivationBatch]) -> float:
    """Sets the score threshold for encoding a layer alone, at which as many features fire as under the rule.

    Args:
        transcoder: a whole transcoder of kind joint_topk or batch_topk, changed in place.
        batches: raw calibration activations, as for `to_jumprelu`; the selected scores are held in memory.

    Returns:
        The threshold.

    Raises:
        ConfigError: the transcoder is of another kind.
    """
    kind = transcoder.config.sparsity.kind
    if kind not in ("joint_topk", "batch_topk"):
        raise ConfigError(f"sparsity.kind={kind}: layers are encoded independently; nothing to calibrate")
    tokens = sum(batch.x.shape[1] for batch in batches)
    n = transcoder.config.k * transcoder.n_sources * tokens
    if kind == "joint_topk":
        n = int(_firing(transcoder, batches).sum())
    best = torch.zeros(0, dtype=next(transcoder.parameters()).dtype, device=next(transcoder.parameters()).device)
    for row, layer in enumerate(transcoder.share.sources):
        for x_BD in _inputs(transcoder, batches, row):
            scores_BF = scores_of(transcoder, layer, ops.preactivations(x_BD, *transcoder.encoder(layer)))
            best = torch.cat([best, scores_BF[scores_BF > 0]])
            best = best.topk(min(n + 1, len(best)), sorted=False).values
    # Midway between the n-th and the next, or between the last and zero if all positive ones are selected.
    best = best.sort(descending=True).values
    next_best = float(best[n]) if len(best) > n else 0.0
    threshold = (float(best[min(n, len(best)) - 1]) + next_best) / 2 if len(best) else 0.0
    for layer in transcoder.share.sources:
        transcoder.threshold[layer].fill_(threshold)
    return threshold


def _inputs(transcoder: CrossLayerTranscoder, batches: Sequence[ActivationBatch], row: int) -> list[Tensor]:
    """Standardised encoder inputs [B,D] of one source layer."""
    layer, like = transcoder.share.sources[row], next(transcoder.parameters())
    return [
        transcoder.scaling.standardise_x(batch.x[[layer]].to(like.device), (layer,))[0].to(like.dtype)
        for batch in batches
    ]


def _firing(transcoder: CrossLayerTranscoder, batches: Sequence[ActivationBatch]) -> Tensor:
    """[L,F] int64: number of tokens on which each feature fires."""
    device = next(transcoder.parameters()).device
    counts_LF = torch.zeros(transcoder.n_sources, transcoder.config.n_features, dtype=torch.int64, device=device)
    for inputs in zip(*(_inputs(transcoder, batches, row) for row in range(transcoder.n_sources)), strict=True):
        codes: SparseCodes = transcoder.encode(torch.stack(inputs))
        counts_LF += firing_counts(codes)
    return counts_LF


def _log_thresholds(pre_NC: Tensor, counts_C: Tensor) -> Tensor:
    """Log thresholds that the given number of each feature's pre-activations exceed.

    Args:
        pre_NC: [N,C] pre-activations of C features at all tokens.
        counts_C: [C] number of pre-activations that exceed the threshold; 0 gives infinity.

    Returns:
        [C] in the dtype of pre.
    """
    descending_NC = pre_NC.sort(dim=0, descending=True).values
    upper_C = descending_NC.gather(0, (counts_C - 1).clamp(min=0)[None])[0]
    lower_C = descending_NC.gather(0, counts_C.clamp(max=len(pre_NC) - 1)[None])[0].clamp(min=0)
    lower_C = torch.where(counts_C == len(pre_NC), 0, lower_C)
    log_C = ((upper_C.double() + lower_C.double()) / 2).log().to(pre_NC.dtype)
    up, down = torch.full_like(log_C, torch.inf), torch.full_like(log_C, -torch.inf)
    for _ in range(_NUDGES):
        # exp is rounded: keep the threshold < upper and >= lower.
        threshold_C = log_C.exp()
        log_C = torch.where(threshold_C >= upper_C, torch.nextafter(log_C, down), log_C)
        log_C = torch.where(threshold_C < lower_C, torch.nextafter(log_C, up), log_C)
    return torch.where(counts_C == 0, torch.inf, log_C)
