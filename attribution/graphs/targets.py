"""Targets of a graph: logits, differences of logits, or features, each at a position of the prompt.

Default: the most likely next tokens at the end of the prompt that together have 95 % of the probability, at most 10
(Ameisen et al. 2025, "Circuit Tracing", section "Output nodes"). A logit is relative to the mean over the vocabulary,
because softmax is invariant to the mean.

The weight of a target in the influence is its probability; of a difference or a feature, 1. Weights are divided by
their sum, so that influence is a share. Probabilities are the model's, not renormalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings_dataclass
from torch import Tensor

from clt.attribution.graphs.graph import Target
from clt.attribution.graphs.sources import Readouts, Sources
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.config import STRICT
from clt.errors import GraphError


@settings_dataclass(frozen=True, kw_only=True, config=STRICT)
class LogitTargets:
    """Logits at one position, each relative to the mean over the vocabulary."""

    tokens: tuple[int | str, ...] = ()
    """Vocabulary ids, or texts of exactly one token; default: the most likely tokens."""
    probability: float = Field(default=0.95, gt=0, le=1)
    """Take the most likely tokens until their probabilities sum to this."""
    max_targets: int = Field(default=10, gt=0)
    """Take at most this many of the most likely tokens."""
    position: int | None = None
    """Index in the prompt, negative from its end; default: the last token before the answer."""


@settings_dataclass(frozen=True, kw_only=True, config=STRICT)
class LogitDifference:
    """One logit minus another."""

    token: int | str
    """Vocabulary id, or text of exactly one token."""
    minus: int | str
    """The token whose logit is subtracted."""
    position: int | None = None
    """Index in the prompt, negative from its end; default: the last token before the answer."""


@settings_dataclass(frozen=True, kw_only=True, config=STRICT)
class FeatureTarget:
    """The pre-activation of a feature, active or not."""

    layer: int = Field(ge=0)
    """Source layer of the feature."""
    feature: int = Field(ge=0)
    """Feature number."""
    position: int | None = None
    """Index in the prompt, negative from its end; default: the last token before the answer."""


TargetSettings = LogitTargets | LogitDifference | FeatureTarget


@dataclass(frozen=True, kw_only=True)
class ResolvedTarget:
    """A target node and its readout.

    Attributes:
        target: as stored in the graph; its weight is final.
        readout: a batch of one.
    """

    target: Target
    readout: Readouts


def resolve_targets(
    adapter: ModelAdapter, inputs: PromptInputs, sources: Sources, wanted: Sequence[TargetSettings]
) -> tuple[ResolvedTarget, ...]:
    """Turns settings into targets of a prompt.

    Args:
        adapter: the model.
        inputs: the prompt.
        sources: columns of its graph.
        wanted: at least one setting; targets come in this order.

    Returns:
        The targets, their weights summing to 1.

    Raises:
        GraphError: there is no target, one occurs twice, or one does not exist in this model and prompt.
    """
    found = [target for setting in wanted for target in _Resolver(adapter, inputs, sources).resolve(setting)]
    keys = [replace(item.target, weight=0.0, probability=0.0, label="") for item in found]
    for item, key in zip(found, keys, strict=True):
        if keys.count(key) > 1:
            raise GraphError(f"target '{item.target.label}' at position {item.target.position} occurs twice")
    total = sum(item.target.weight for item in found)
    if not total > 0:
        raise GraphError(
            "targets: there are none, or their probabilities are 0; choose more likely tokens or a difference"
        )
    return tuple(replace(item, target=replace(item.target, weight=item.target.weight / total)) for item in found)


@dataclass(frozen=True)
class _Resolver:
    adapter: ModelAdapter
    inputs: PromptInputs
    sources: Sources

    def resolve(self, setting: TargetSettings) -> list[ResolvedTarget]:
        position = self._position(setting.position)
        if isinstance(setting, FeatureTarget):
            return [self._feature(setting, position)]
        if isinstance(setting, LogitDifference):
            return [self._difference(self._token(setting.token), self._token(setting.minus), position)]
        probabilities = self.sources.linear.recording.logits[position].double().softmax(0)
        tokens = [self._token(token) for token in setting.tokens]
        if not tokens:
            likeliest = probabilities.topk(min(setting.max_targets, len(probabilities)))
            enough = int((likeliest.values.cumsum(0) < setting.probability).sum()) + 1
            tokens = likeliest.indices[:enough].tolist()
        return [self._logit(token, position, float(probabilities[token])) for token in tokens]

    def _position(self, position: int | None) -> int:
        length = self.sources.linear.n_positions
        index = int(self.inputs.answer_start[0]) - 1 if position is None else position
        if not -length <= index < length:
            raise GraphError(f"target position {index}: outside of the prompt, which has {length} tokens")
        return index % length

    def _token(self, token: int | str) -> int:
        if isinstance(token, int):
            if not 0 <= token < self.adapter.vocab_size:
                raise GraphError(f"target token {token}: vocabulary ids are 0..{self.adapter.vocab_size - 1}")
            return token
        tokenizer = self.adapter.tokenizer
        ids = list(tokenizer(token, add_special_tokens=False)["input_ids"])
        pieces = tokenizer.convert_ids_to_tokens(ids)
        if len(ids) != 1:
            raise GraphError(f"target token {token!r} is {len(ids)} tokens {pieces}; name a single one, or its id")
        # A fast tokenizer may have its token of unknown words in its model only.
        model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        if pieces[0] in {tokenizer.unk_token, getattr(model, "unk_token", None)} - {token}:
            raise GraphError(f"target token {token!r} is not in the vocabulary; name another, or an id")
        return int(ids[0])

    def _text(self, token: int) -> str:
        return self.adapter.token_text(token)

    def _logit(self, token: int, position: int, probability: float) -> ResolvedTarget:
        linear = self.sources.linear
        weight_VD, bias_V = linear.weight(self.adapter.lm_head), linear.bias(self.adapter.lm_head)
        logits_V = linear.recording.logits[position]
        readout = self._at_end(
            position,
            vector=weight_VD[token] - weight_VD.mean(0),
            constant=logits_V.new_zeros(()) if bias_V is None else bias_V[token] - bias_V.mean(),
            value=logits_V[token] - logits_V.mean(),
        )
        target = Target(
            kind="logit",
            label=self._text(token),
            position=position,
            token_id=token,
            layer=linear.n_layers,
            probability=probability,
            weight=probability,
        )
        return ResolvedTarget(target=target, readout=readout)

    def _difference(self, token: int, minus: int, position: int) -> ResolvedTarget:
        if token == minus:
            raise GraphError(f"target difference of token {token} with itself is 0; name two different tokens")
        linear = self.sources.linear
        weight_VD, bias_V = linear.weight(self.adapter.lm_head), linear.bias(self.adapter.lm_head)
        logits_V = linear.recording.logits[position]
        readout = self._at_end(
            position,
            vector=weight_VD[token] - weight_VD[minus],
            constant=logits_V.new_zeros(()) if bias_V is None else bias_V[token] - bias_V[minus],
            value=logits_V[token] - logits_V[minus],
        )
        target = Target(
            kind="difference",
            label=f"{self._text(token)} - {self._text(minus)}",
            position=position,
            token_id=token,
            minus_token_id=minus,
            layer=linear.n_layers,
            weight=1.0,
        )
        return ResolvedTarget(target=target, readout=readout)

    def _at_end(self, position: int, vector: Tensor, constant: Tensor, value: Tensor) -> Readouts:
        linear = self.sources.linear
        return Readouts(
            layer=linear.n_layers - 1,
            site="resid_post",
            position=torch.tensor([position], device=vector.device),
            vector=(vector * linear.final_scale[position])[None],
            constant=constant[None],
            value=value[None],
        )

    def _feature(self, setting: FeatureTarget, position: int) -> ResolvedTarget:
        config, name = self.sources.transcoder.config, f"feature {setting.layer}.{setting.feature}"
        if str(setting.layer) not in self.sources.transcoder.W_enc or setting.feature >= config.n_features:
            layers = sorted(int(layer) for layer in self.sources.transcoder.W_enc)
            raise GraphError(
                f"target {name}: the transcoder has features 0..{config.n_features - 1} in layers "
                f"{layers[0]}..{layers[-1]}"
            )
        if not bool(self.sources.seen[position]):
            raise GraphError(f"target {name}: the transcoder does not act at position {position} (drop_bos)")
        device = self.sources.seen.device
        readout = self.sources.feature_readouts(
            setting.layer, torch.tensor([position], device=device), torch.tensor([setting.feature], device=device)
        )
        target = Target(
            kind="feature",
            label=name,
            position=position,
            layer=setting.layer,
            feature=setting.feature,
            weight=1.0,
        )
        return ResolvedTarget(target=target, readout=readout)
