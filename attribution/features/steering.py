"""Steering experiment: share of answers that change when the most influential features of their graphs are ablated.

For every held-out prompt that the model answers correctly, the top n features by influence on the first answer token's
logit are ablated: set to 0 at all positions, attention and norms live. The control ablates n other active features of
the same layers with similar output norm (decoder norm times activation). If graphs are right, answers change far more
often under the ablation than under the control (Ameisen et al. 2025, "Circuit Tracing", section "Evaluating mechanistic
faithfulness"). Each ablation is done in the model itself and in the replacement model; docs/demo.md compares the two.

The experiment has no random part: the same transcoder and examples give the same report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass as settings_dataclass
from torch import Tensor

from clt.attribution.features.confidence import Proportion, wilson_interval
from clt.attribution.features.ranking import match_controls, rank_features
from clt.attribution.graphs.attribute import AttributionSettings, attribute
from clt.attribution.graphs.targets import LogitTargets
from clt.attribution.replacement.replacement_model import Intervention, MlpOutputs, RecordedErrors, ReplacementModel
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.capture.sources.examples import Example
from clt.config import STRICT
from clt.errors import InputError
from clt.transcoder.model import CrossLayerTranscoder


@settings_dataclass(frozen=True, kw_only=True, config=STRICT)
class SteeringSettings:
    """Prompts and sizes of the steering experiment."""

    num_prompts: int = Field(default=200, gt=0)
    """Correctly answered prompts to use; a low rate needs many to be distinguished from its control."""
    sizes: tuple[PositiveInt, ...] = (1, 5, 10, 20)
    """Numbers n of features to ablate."""
    mlps: tuple[MlpOutputs, ...] = ("original", "replaced")
    """Ablate in the model itself, in the replacement model with error terms, or in both."""
    max_feature_nodes: int | None = Field(default=128, gt=0)
    """Features of each prompt's graph whose inputs are computed; null: all."""


@dataclass(frozen=True, kw_only=True)
class SteeringResult:
    """Answers that change when n features are ablated.

    Attributes:
        mlps: the model in which they were ablated.
        n: features ablated.
        ablated: prompts whose first answer token changes when the top n features are ablated.
        control: prompts whose first answer token changes when the n matched features are ablated.
        ablated_margin: mean fraction of the answer's logit margin that the ablation leaves. The margin is the logit of
            the first answer token minus the largest other one: 1 without ablation, negative where the answer changes.
        control_margin: the same under the control.
        strength_ratio: output norm of the control features over that of the top features, summed over prompts; 1 is a
            perfect match.
    """

    mlps: MlpOutputs
    n: int
    ablated: Proportion
    control: Proportion
    ablated_margin: float
    control_margin: float
    strength_ratio: float


@dataclass(frozen=True, kw_only=True)
class SteeringReport:
    """Results of the steering experiment.

    Attributes:
        num_prompts: correctly answered prompts that were used.
        num_examples: examples read to find them.
        results: one per size for each of the settings' `mlps`.
    """

    num_prompts: int
    num_examples: int
    results: tuple[SteeringResult, ...]


def steer(
    adapter: ModelAdapter,
    transcoder: CrossLayerTranscoder,
    examples: Iterable[Example],
    settings: SteeringSettings | None = None,
) -> SteeringReport:
    """Runs the experiment on the first correctly answered examples.

    Args:
        adapter: the model.
        transcoder: a transcoder trained on it.
        examples: held-out examples with answers.
        settings: sizes and limits. Default: those of `SteeringSettings`.

    Returns:
        Shares of answers that change, with 95 % CI. A prompt with too few features for a control of some size is left
        out of both sides of that size.

    Raises:
        InputError: an example has no answer, or too few are answered correctly.
        CheckpointError: the transcoder belongs to another model.
    """
    settings = settings or SteeringSettings()
    model = ReplacementModel(adapter, transcoder)
    ablations: list[_Ablation] = []
    num_prompts = num_examples = 0
    for example in examples:
        num_examples += 1
        question = _question(adapter, example)
        if question is None:
            continue
        ablations += _steer_prompt(model, question, settings)
        num_prompts += 1
        if num_prompts == settings.num_prompts:
            break
    else:
        raise InputError(
            f"num_prompts={settings.num_prompts}: {num_prompts} of {num_examples} examples are answered correctly; "
            "give more examples or lower num_prompts"
        )
    return SteeringReport(
        num_prompts=num_prompts,
        num_examples=num_examples,
        results=tuple(_summarise(mlps, n, ablations) for mlps in settings.mlps for n in settings.sizes),
    )


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A prompt without its answer, the answer's first token, and that token's margin in the model's own logits."""

    inputs: PromptInputs
    token: int
    margin: float


@dataclass(frozen=True, kw_only=True)
class _Ablation:
    """One prompt, size and side: fraction of the margin left, and output norm of the ablated features."""

    mlps: MlpOutputs
    n: int
    is_control: bool
    changed: bool
    margin: float
    output_norm: float


def _question(adapter: ModelAdapter, example: Example) -> _Question | None:
    """The example as a question, if greedy decoding gives exactly its answer."""
    if example.answer is None:
        raise InputError(f"example {example.example_id} has no answer; steering needs one")
    whole = adapter.prepare(example.prompt, example.images, example.answer)
    asked = whole.answer_mask[0].nonzero()[:, 0]
    wanted = whole.tokens.token_id[0, asked + 1].long()
    with torch.no_grad():
        logits_PV = adapter.forward(whole)[0, asked]
    # Teacher forcing: greedy decoding gives the answer if and only if every token of it is the likeliest one.
    margin = float(_margin(logits_PV[:1], int(wanted[0])))
    if not torch.equal(logits_PV.argmax(-1), wanted) or margin == 0:
        return None
    inputs = adapter.prepare(example.prompt, example.images)
    return _Question(inputs=inputs, token=int(wanted[0]), margin=margin)


def _margin(logits_NV: Tensor, token: int) -> Tensor:
    """[N] logit of a token minus the largest other one."""
    others_NV = logits_NV.index_fill(1, torch.tensor([token], device=logits_NV.device), -torch.inf)
    return logits_NV[:, token] - others_NV.max(1).values


def _steer_prompt(model: ReplacementModel, question: _Question, settings: SteeringSettings) -> list[_Ablation]:
    """Ablates the top and the matched features, every size and side a row of one batch."""
    attribution = AttributionSettings(
        targets=(LogitTargets(tokens=(question.token,)),), max_feature_nodes=settings.max_feature_nodes
    )
    graph = attribute(model.adapter, model.transcoder, question.inputs, attribution)
    features = rank_features(graph, model.transcoder)
    rows: list[tuple[int, bool, Tensor]] = []
    for n in settings.sizes:
        control = match_controls(features, n) if n <= len(features) else None
        if control is not None:
            rows += [(n, False, torch.arange(n)), (n, True, control)]
    if not rows:
        return []
    batch = model.adapter.collate([question.inputs] * len(rows))
    interventions = [
        Intervention(layer=int(features.layer[i]), feature=int(features.feature[i]), value=0.0, prompt=row)
        for row, (_, _, ablated) in enumerate(rows)
        for i in ablated
    ]
    ablations = []
    for mlps in settings.mlps:
        errors = _repeated(model.record_errors(question.inputs), len(rows)) if mlps == "replaced" else None
        logits_NSV = model.forward(batch, interventions, errors, mlps=mlps)
        margins = _margin(logits_NSV[:, -1], question.token).tolist()
        changed = (logits_NSV[:, -1].argmax(-1) != question.token).tolist()
        for row, (n, is_control, ablated) in enumerate(rows):
            ablation = _Ablation(
                mlps=mlps,
                n=n,
                is_control=is_control,
                changed=changed[row],
                margin=margins[row] / question.margin,
                output_norm=float(features.output_norm[ablated].sum()),
            )
            ablations.append(ablation)
    return ablations


def _repeated(errors: RecordedErrors, times: int) -> RecordedErrors:
    """The error terms of one prompt for a batch of its copies."""
    return RecordedErrors(by_target={layer: e.expand(times, -1, -1) for layer, e in errors.by_target.items()})


def _summarise(mlps: MlpOutputs, n: int, ablations: list[_Ablation]) -> SteeringResult:
    ablations = [ablation for ablation in ablations if (ablation.mlps, ablation.n) == (mlps, n)]
    sides = [[ablation for ablation in ablations if ablation.is_control == is_control] for is_control in (False, True)]
    rates = [wilson_interval(sum(ablation.changed for ablation in side), len(side)) for side in sides]
    margins = [sum(ablation.margin for ablation in side) / len(side) if side else math.nan for side in sides]
    norms = [sum(ablation.output_norm for ablation in side) for side in sides]
    return SteeringResult(
        mlps=mlps,
        n=n,
        ablated=rates[0],
        control=rates[1],
        ablated_margin=margins[0],
        control_margin=margins[1],
        strength_ratio=norms[1] / norms[0] if norms[0] else math.nan,
    )
