"""The steering experiment: do the features a graph calls influential carry the answer?

For every held-out prompt that the model answers correctly, the (layer, feature) pairs with the largest influence on the
first answer token's logit, summed over positions, are ablated: set to 0 at all positions, attention and norms live. The
control ablates as many active features of the same prompt that match the chosen ones in layer and in what they write,
decoder norm times activation. If graphs are right, the answer flips far more often under the first than under the
second (Ameisen et al. 2025, "Circuit Tracing", section "Evaluating mechanistic faithfulness").

Every ablation is done twice, each time from the model's own logits. `mlps="original"` acts on the model itself, whose
answer is what the claim is about: its MLPs may repair what was removed, and may also remove it once more, for a
cross-layer decoder already holds part of what later MLPs answer to the feature. `mlps="replaced"` acts on the
replacement model with the prompt's error terms, where nothing is counted twice, but only the transcoder's features
respond. Chosen pairs and control share whichever bias there is; a claim should hold under both.

Nothing here is random: the same transcoder and examples give the same report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass as settings_dataclass
from torch import Tensor

from clt.attribution.features.intervals import Proportion, wilson_interval
from clt.attribution.features.pairs import match_controls, rank_pairs
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
    """What a user chooses about the experiment."""

    num_prompts: int = Field(default=200, gt=0)
    """Correctly answered prompts to steer; low rates need many to be told from a control."""
    sizes: tuple[PositiveInt, ...] = (1, 5, 10, 20)
    """Numbers of pairs to ablate."""
    mlps: tuple[MlpOutputs, ...] = ("original", "replaced")
    """Ablate in the model itself, in the replacement model with error terms, or in both."""
    max_feature_nodes: int | None = Field(default=128, gt=0)
    """Rows of each prompt's graph; absent: all. A feature without a row counts where it acts on one that has a row."""


@dataclass(frozen=True, kw_only=True)
class SteeringResult:
    """Flips when n pairs are ablated.

    Attributes:
        mlps: what the ablation acted on.
        n: pairs ablated.
        ablated: prompts whose first answer token flips when the most influential pairs are ablated.
        control: prompts whose first answer token flips when the matched pairs are ablated.
        ablated_margin: mean share that the ablation leaves of the answer's margin: the logit of its first token minus
            the largest other one, 1 without ablation, negative where the answer flips.
        control_margin: the same under the control.
        strength_ratio: what the control pairs write over what the chosen pairs write, summed over prompts; 1 is a
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
    """The experiment's outcome.

    Attributes:
        num_prompts: correctly answered prompts that were steered.
        num_examples: examples looked at to find them.
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
        settings: sizes and limits; the defaults when absent.

    Returns:
        Flip rates with 95 % intervals. A prompt that has too few features for a control at some size counts for
        neither side of that size.

    Raises:
        InputError: an example has no answer, or too few are answered correctly.
        CheckpointError: the transcoder belongs to another model.
    """
    settings = settings or SteeringSettings()
    model = ReplacementModel(adapter, transcoder)
    trials: list[_Trial] = []
    num_prompts = num_examples = 0
    for example in examples:
        num_examples += 1
        question = _question(adapter, example)
        if question is None:
            continue
        trials += _steer_prompt(model, question, settings)
        num_prompts += 1
        if num_prompts == settings.num_prompts:
            break
    else:
        raise InputError(
            f"{num_prompts} of {num_examples} examples are answered correctly, {settings.num_prompts} are needed; "
            "give more examples"
        )
    return SteeringReport(
        num_prompts=num_prompts,
        num_examples=num_examples,
        results=tuple(_summarise(mlps, n, trials) for mlps in settings.mlps for n in settings.sizes),
    )


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A prompt without its answer, the answer's first token, and that token's margin in the model's own logits."""

    inputs: PromptInputs
    token: int
    margin: float


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One prompt, one size, one side: margin left of 1, and what the ablated pairs write."""

    mlps: MlpOutputs
    n: int
    is_control: bool
    flipped: bool
    margin: float
    strength: float


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


def _steer_prompt(model: ReplacementModel, question: _Question, settings: SteeringSettings) -> list[_Trial]:
    """Ablates the most influential and the matched pairs, every size and side a row of one batch."""
    attribution = AttributionSettings(
        targets=(LogitTargets(tokens=(question.token,)),), max_feature_nodes=settings.max_feature_nodes
    )
    pairs = rank_pairs(attribute(model.adapter, model.transcoder, question.inputs, attribution), model.transcoder)
    rows: list[tuple[int, bool, Tensor]] = []
    for n in settings.sizes:
        control = match_controls(pairs, n) if n <= len(pairs.layer) else None
        if control is not None:
            rows += [(n, False, torch.arange(n)), (n, True, control)]
    if not rows:
        return []
    batch = model.adapter.collate([question.inputs] * len(rows))
    interventions = [
        Intervention(layer=int(pairs.layer[i]), feature=int(pairs.feature[i]), value=0.0, prompt=row)
        for row, (_, _, ablated) in enumerate(rows)
        for i in ablated
    ]
    trials = []
    for mlps in settings.mlps:
        errors = _repeated(model.record_errors(question.inputs), len(rows)) if mlps == "replaced" else None
        logits_NSV = model.forward(batch, interventions, errors, mlps=mlps)
        margins = _margin(logits_NSV[:, -1], question.token).tolist()
        flipped = (logits_NSV[:, -1].argmax(-1) != question.token).tolist()
        for row, (n, is_control, ablated) in enumerate(rows):
            trial = _Trial(
                mlps=mlps,
                n=n,
                is_control=is_control,
                flipped=flipped[row],
                margin=margins[row] / question.margin,
                strength=float(pairs.strength[ablated].sum()),
            )
            trials.append(trial)
    return trials


def _repeated(errors: RecordedErrors, times: int) -> RecordedErrors:
    """The error terms of one prompt for a batch of its copies."""
    return RecordedErrors(by_target={layer: e.expand(times, -1, -1) for layer, e in errors.by_target.items()})


def _summarise(mlps: MlpOutputs, n: int, trials: list[_Trial]) -> SteeringResult:
    trials = [trial for trial in trials if (trial.mlps, trial.n) == (mlps, n)]
    sides = [[trial for trial in trials if trial.is_control == is_control] for is_control in (False, True)]
    rates = [wilson_interval(sum(trial.flipped for trial in side), len(side)) for side in sides]
    margins = [sum(trial.margin for trial in side) / len(side) if side else math.nan for side in sides]
    strengths = [sum(trial.strength for trial in side) for side in sides]
    return SteeringResult(
        mlps=mlps,
        n=n,
        ablated=rates[0],
        control=rates[1],
        ablated_margin=margins[0],
        control_margin=margins[1],
        strength_ratio=strengths[1] / strengths[0] if strengths[0] else math.nan,
    )
