"""Interventions on transcoder features, as edits of a running forward pass or generation.

Users call `clt.attribution.replacement.replacement_model.ReplacementModel`. Features are encoded at the read sites and
decoded at the MLP outputs of the same forward. An intervention sets a feature's activation; the MLP outputs at all of
its target layers change by the difference times its decoder vectors (Ameisen et al. 2025, "Circuit Tracing", section
"Validating Attribution Graph Hypotheses with Interventions"). Columns are counted over the calls of a generation, so
that a position is the same in the prefill and in the decoding steps.

Shape letters: N prompts, S prompt length, W columns of one call (S at prefill, 1 per token after), B = N * W, K slots,
U features under intervention in a layer, D d_model.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clt.capture.models.adapter import PromptInputs
from clt.capture.models.sites import decoder_site
from clt.errors import GraphError
from clt.records import SparseCodes
from clt.transcoder.layers import LayerShare
from clt.transcoder.model import CrossLayerTranscoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """Sets or scales the activation of one feature; of several on one feature and position the last one applies.

    Attributes:
        layer: source layer of the feature.
        feature: feature number.
        position: index in the sequence of prompt and new tokens, without padding; None: every position at which the
            transcoder acts.
        value: the activation to set.
        scale: factor for the activation of the running forward; give exactly one of value and scale.
        prompt: row of the batch; None: every prompt.
    """

    layer: int
    feature: int
    position: int | None = None
    value: float | None = None
    scale: float | None = None
    prompt: int | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.scale is None):
            raise GraphError(f"{self}: give either value or scale")
        # Columns of a FeatureTable give tensors, which are no keys of a mapping.
        whole: dict[str, Callable[[Any], float]] = dict.fromkeys(
            ("layer", "feature", "position", "prompt"), operator.index
        )
        for name, plain in (whole | {"value": float, "scale": float}).items():
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, None if given is None else plain(given))
            except (TypeError, ValueError):
                raise GraphError(f"{self}: {name}={given!r} is not a single number of its kind") from None
        if not math.isfinite(self.value if self.value is not None else self.scale or 0.0):
            raise GraphError(f"{self}: value and scale must be finite")

    def __str__(self) -> str:
        return f"intervention on layer {self.layer}, feature {self.feature}, position {self.position}"


@dataclass(frozen=True, kw_only=True)
class RecordedErrors:
    """Error terms of the transcoder in a forward of the model.

    Attributes:
        by_target: target layer -> [N,S,D], MLP output minus reconstruction; zero where the transcoder does not act.
    """

    by_target: Mapping[int, Tensor]


@dataclass(frozen=True)
class TokenColumns:
    """Columns of a batch of prompts and of the tokens that a generation adds.

    Attributes:
        replaced: [N,S + new] bool, where the transcoder acts: not at padding, with `drop_bos` not at BOS.
        positions: [N,S + new] int64, index in the sequence without padding; -1 at padding.
    """

    replaced: Tensor
    positions: Tensor

    @classmethod
    def of(cls, inputs: PromptInputs, drop_bos: bool, new_columns: int = 0) -> TokenColumns:
        """Columns of a batch of prompts and of the new tokens of a generation.

        Args:
            inputs: the prompts.
            drop_bos: whether the transcoder leaves out the beginning-of-sequence token.
            new_columns: new tokens per prompt.
        """
        real = inputs.real_mask
        replaced = inputs.tokens.encoded(drop_bos)
        positions = torch.where(real, inputs.tokens.position.long(), -1)
        new = real.sum(1, keepdim=True) + torch.arange(new_columns, device=real.device)
        return cls(torch.cat([replaced, new >= 0], 1), torch.cat([positions, new], 1))


#: Source layer -> its interventions.
Plan = Mapping[int, Sequence[Intervention]]
#: Source layer -> codes of a call: values [B,K] and indices [B,K] int32.
LayerCodes = Mapping[int, tuple[Tensor, Tensor]]


def plan_interventions(
    interventions: Iterable[Intervention], transcoder: CrossLayerTranscoder, columns: TokenColumns
) -> dict[int, list[Intervention]]:
    """Checks interventions and groups them by layer, in the order given.

    Args:
        interventions: activations to change.
        transcoder: the transcoder whose features they change.
        columns: positions at which it acts.

    Returns:
        Source layer to its interventions.

    Raises:
        GraphError: one names a layer, feature, position or prompt that does not exist.
    """
    plan: dict[int, list[Intervention]] = {}
    for intervention in interventions:
        _check(intervention, transcoder, columns)
        plan.setdefault(intervention.layer, []).append(intervention)
    return plan


def _check(intervention: Intervention, transcoder: CrossLayerTranscoder, columns: TokenColumns) -> None:
    sources = LayerShare.everything(transcoder.config).sources
    if intervention.layer not in sources:
        raise GraphError(f"{intervention}: the transcoder has features in layers {sources[0]}..{sources[-1]}")
    if not 0 <= intervention.feature < transcoder.config.n_features:
        raise GraphError(f"{intervention}: features are numbered 0..{transcoder.config.n_features - 1}")
    n_prompts = len(columns.positions)
    if intervention.prompt is not None and not 0 <= intervention.prompt < n_prompts:
        raise GraphError(f"{intervention}: prompt {intervention.prompt} is outside of 0..{n_prompts - 1}")
    if intervention.position is None:
        return
    for row in range(n_prompts) if intervention.prompt is None else [intervention.prompt]:
        seen = columns.positions[row][columns.replaced[row]]
        if not bool((seen == intervention.position).any()):
            last = int(columns.positions[row].max())
            raise GraphError(
                f"{intervention}: the transcoder does not act at this position of prompt {row}; its last is {last}"
            )


@dataclass(frozen=True, kw_only=True)
class _Change:
    """Changes of U features of a layer at the positions of a call.

    Attributes:
        activation_NWU: new activation minus that of the running forward.
        active_NWU: 1 where a feature becomes active, -1 where it becomes inactive, else 0.
    """

    activation_NWU: Tensor
    active_NWU: Tensor


class LiveEdits:
    """Edits of one forward or generation: features are encoded at read sites and decoded at MLP outputs.

    Args:
        transcoder: a whole folded transcoder.
        columns: positions at which it acts.
        plan: interventions by layer.
        kept_codes: codes that are decoded in place of those that the running forward encodes.

    Attributes:
        encoded: codes that the running forward encodes.
        codes: codes that are decoded, before interventions.
    """

    def __init__(
        self, transcoder: CrossLayerTranscoder, columns: TokenColumns, plan: Plan, kept_codes: LayerCodes | None = None
    ) -> None:
        whole = LayerShare.everything(transcoder.config)
        self.transcoder, self.columns, self.plan = transcoder, columns, plan
        self.sources: Sequence[int] = whole.sources
        self.targets: Sequence[int] = whole.targets
        self.encoded: dict[int, tuple[Tensor, Tensor]] = {}
        self.codes: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept_codes = kept_codes or {}
        self._inputs: dict[int, Tensor] = {}
        self._changes: dict[int, _Change] = {}
        self._effective: dict[Intervention, Tensor] = {}
        self._numbers = {layer: sorted({i.feature for i in group}) for layer, group in plan.items()}
        self._window = slice(0, 0)

    def edits(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Edits by site, for `clt.capture.models.hooks.attach`."""
        layers = sorted(set(self.sources) | (set(self.targets) if self.transcoder.config.skip else set()))
        site = self.transcoder.config.read_site
        reads = {decoder_site(layer, site): self._reader(layer, first=layer == layers[0]) for layer in layers}
        return reads | {decoder_site(target, "mlp_out"): self._writer(target) for target in self.targets}

    def log_ineffective(self) -> None:
        """Logs the interventions that gave no feature another activation in any call."""
        wanted = [intervention for group in self.plan.values() for intervention in group]
        idle = [i for i in wanted if i not in self._effective or not bool(self._effective[i])]
        if idle:
            log.warning(
                "%s changed no activation%s: the feature is inactive there, or has this value already",
                idle[0],
                f" (and {len(idle) - 1} more of {len(wanted)})" if len(idle) > 1 else "",
            )

    def write(self, target: int, own_NWD: Tensor) -> Tensor:
        """[N,W,D] output of a target's MLP branch, given the output of its own MLP."""
        raise NotImplementedError

    def _reader(self, layer: int, first: bool) -> Callable[[Tensor], Tensor]:
        def read(x_NWD: Tensor) -> Tensor:
            if first:
                self._advance(x_NWD.shape[1])
            x_BD = x_NWD.reshape(-1, x_NWD.shape[2]).to(next(self.transcoder.parameters()).dtype)
            x_BD = self.transcoder.scaling.normalise_x(x_BD)
            self._inputs[layer] = x_BD
            if layer in self.sources:
                self.encoded[layer] = self.transcoder.encode_layer(layer, x_BD)
                self.codes[layer] = self._kept_codes.get(layer, self.encoded[layer])
            if layer in self.plan:
                self._changes[layer] = self._change(layer)
            return x_NWD

        return read

    def _writer(self, target: int) -> Callable[[Tensor], Tensor]:
        return lambda own_NWD: self.write(target, own_NWD)

    def _advance(self, width: int) -> None:
        self._window = slice(self._window.stop, self._window.stop + width)
        assert self._window.stop <= self.columns.positions.shape[1], "the model ran on more columns than planned"

    @property
    def _acting(self) -> Tensor:
        """Columns of this call in which the transcoder acts."""
        return self.columns.replaced[:, self._window, None]

    def _change(self, layer: int) -> _Change:
        """Changes of the layer's features under intervention."""
        values_BK, indices_BK = self.codes[layer]
        numbers = torch.tensor(self._numbers[layer], dtype=indices_BK.dtype, device=indices_BK.device)
        # An empty slot has value 0, so its index 0 adds nothing to feature 0.
        running_BU = (values_BK[:, :, None] * (indices_BK[:, :, None] == numbers)).sum(1)
        running_NWU = running_BU.reshape(len(self.columns.positions), -1, len(numbers))
        wanted_NWU = running_NWU.clone()
        positions_NW = self.columns.positions[:, self._window]
        for intervention in self.plan[layer]:
            column = self._numbers[layer].index(intervention.feature)
            rows = slice(None) if intervention.prompt is None else slice(intervention.prompt, intervention.prompt + 1)
            new_NW = running_NWU[rows, :, column] * (intervention.scale or 0.0)
            if intervention.value is not None:
                new_NW = torch.full_like(new_NW, intervention.value)
            acts_NW = self._acting[rows, :, 0]
            if intervention.position is not None:
                acts_NW = acts_NW & (positions_NW[rows] == intervention.position)
            effective = ((new_NW != running_NWU[rows, :, column]) & acts_NW).any()
            self._effective[intervention] = self._effective.get(intervention, False) | effective
            wanted_NWU[rows, :, column] = torch.where(acts_NW, new_NW, wanted_NWU[rows, :, column])
        active_NWU = (wanted_NWU != 0).to(wanted_NWU) - (running_NWU != 0).to(wanted_NWU)
        return _Change(activation_NWU=wanted_NWU - running_NWU, active_NWU=active_NWU)

    def _reconstruct(self, target: int, like_NWD: Tensor) -> Tensor:
        """Output of the transcoder from the running codes, without interventions."""
        pairs = [self.codes[source] for source in self.transcoder.sources_of(target)]
        codes = SparseCodes.stacked(pairs, self.transcoder.config.n_features)
        y_BD = self.transcoder.decode_layer(target, codes.values, codes.indices, self._inputs.get(target))
        return y_BD.reshape(like_NWD.shape)

    def _add_changes(self, target: int, y_NWD: Tensor) -> Tensor:
        """Adds the change of the transcoder's output by the interventions."""
        sources = self.transcoder.sources_of(target)
        for source in (layer for layer in sources if layer in self.plan):
            row, change = source - sources.start, self._changes[source]
            written_NWU = change.activation_NWU
            if self.transcoder.config.feature_offset:
                offset_U = self.transcoder.feature_offsets(target)[row, self._numbers[source]]
                written_NWU = written_NWU + change.active_NWU * offset_U
            y_NWD = y_NWD + written_NWU @ self.transcoder.decoder_matrix(target)[row, self._numbers[source]]
        return y_NWD


class ReplacedOutputs(LiveEdits):
    """Replaces MLP outputs by the transcoder's, plus recorded errors if given.

    Args:
        transcoder: a whole folded transcoder.
        columns: positions at which it acts.
        plan: interventions by layer.
        errors: error terms of the same columns.
        targets: layers whose outputs are the transcoder's. Default: all.
        kept_codes: see `LiveEdits`.

    Raises:
        GraphError: the errors were recorded for prompts of another shape.
    """

    def __init__(
        self,
        transcoder: CrossLayerTranscoder,
        columns: TokenColumns,
        plan: Plan,
        errors: RecordedErrors | None = None,
        targets: Sequence[int] | None = None,
        kept_codes: LayerCodes | None = None,
    ) -> None:
        super().__init__(transcoder, columns, plan, kept_codes)
        if targets is not None:
            self.targets = targets
            self.sources = sorted({*plan, *(source for target in targets for source in transcoder.sources_of(target))})
        self._errors = errors.by_target if errors else {}
        expected = tuple(columns.replaced.shape)
        for target, error_NSD in self._errors.items():
            if tuple(error_NSD.shape[:2]) != expected:
                found = tuple(error_NSD.shape[:2])
                raise GraphError(
                    f"errors of layer {target}: prompts have shape {found}, expected {expected}; record them again"
                )

    def write(self, target: int, own_NWD: Tensor) -> Tensor:
        y_NWD = self._add_changes(target, self._reconstruct(target, own_NWD))
        if target in self._errors:
            y_NWD = y_NWD + self._errors[target]
        return torch.where(self._acting, y_NWD.to(own_NWD.dtype), own_NWD)


class SteeredOutputs(LiveEdits):
    """MLP outputs are the model's own plus the changes that the interventions make.

    Args:
        transcoder: a whole folded transcoder.
        columns: positions at which it acts.
        plan: interventions by layer.
        kept_codes: see `LiveEdits`.
        encodes_all: encode every source layer, not only those with interventions.
    """

    def __init__(
        self,
        transcoder: CrossLayerTranscoder,
        columns: TokenColumns,
        plan: Plan,
        kept_codes: LayerCodes | None = None,
        encodes_all: bool = False,
    ) -> None:
        super().__init__(transcoder, columns, plan, kept_codes)
        if not encodes_all:
            self.sources = sorted(plan)
        self.targets = sorted({target for source in plan for target in transcoder.targets_of(source)})

    def write(self, target: int, own_NWD: Tensor) -> Tensor:
        return self._add_changes(target, own_NWD).to(own_NWD.dtype)


class RecordedOutputs(LiveEdits):
    """Keeps the model's own MLP outputs and records the transcoder's error terms in `errors`."""

    def __init__(self, transcoder: CrossLayerTranscoder, columns: TokenColumns) -> None:
        super().__init__(transcoder, columns, {})
        self.errors: dict[int, Tensor] = {}

    def write(self, target: int, own_NWD: Tensor) -> Tensor:
        error_NWD = own_NWD - self._reconstruct(target, own_NWD)
        self.errors[target] = torch.where(self._acting, error_NWD, 0)
        return own_NWD
