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

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass as settings_dataclass
from torch import Tensor

from clt.attribution.attribute import AttributionSettings, attribute
from clt.attribution.graph import Graph, NodeKind
from clt.attribution.replacement import Intervention, MlpOutputs, RecordedErrors, ReplacementModel
from clt.attribution.scores import influence
from clt.attribution.statistics import Proportion, wilson_interval
from clt.attribution.targets import LogitTargets
from clt.capture.adapter import ModelAdapter, PromptInputs
from clt.capture.examples import Example
from clt.config import STRICT
from clt.errors import InputError
from clt.model import CrossLayerTranscoder


@settings_dataclass(frozen=True, kw_only=True, config=STRICT)
class SteeringSettings:
    """What a user chooses about the experiment."""

    num_prompts: int = Field(default=100, gt=0)
    """Correctly answered prompts to steer."""
    sizes: tuple[PositiveInt, ...] = (1, 5, 10, 20)
    """Numbers of pairs to ablate."""
    mlps: tuple[MlpOutputs, ...] = ("original", "replaced")
    """Ablate in the model itself, in the replacement model with error terms, or in both."""
    max_feature_nodes: int | None = Field(default=256, gt=0)
    """Rows of each prompt's graph; absent: all. A feature without a row counts where it acts on one that has a row."""


@dataclass(frozen=True, kw_only=True)
class SteeringResult:
    """Flips when n pairs are ablated.

    Attributes:
        mlps: what the ablation acted on.
        n: pairs ablated.
        ablated: prompts whose first answer token flips when the most influential pairs are ablated.
        control: prompts whose first answer token flips when the matched pairs are ablated.
        strength_ratio: what the control pairs write over what the chosen pairs write, summed over prompts; 1 is a
            perfect match.
    """

    mlps: MlpOutputs
    n: int
    ablated: Proportion
    control: Proportion
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


@dataclass(frozen=True, kw_only=True)
class FeaturePairs:
    """The P distinct (layer, feature) pairs that are active in a prompt, most influential first.

    Attributes:
        layer: [P] int64.
        feature: [P] int64.
        influence: [P] float64, summed over positions.
        strength: [P] float64, decoder norm times activation, summed over positions.
    """

    layer: Tensor
    feature: Tensor
    influence: Tensor
    strength: Tensor


def steer(
    adapter: ModelAdapter,
    clt: CrossLayerTranscoder,
    examples: Iterable[Example],
    settings: SteeringSettings | None = None,
) -> SteeringReport:
    """Runs the experiment on the first correctly answered examples.

    Args:
        adapter: the model.
        clt: a transcoder trained on it.
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
    model = ReplacementModel(adapter, clt)
    trials: list[_Trial] = []
    num_prompts = num_examples = 0
    for example in examples:
        num_examples += 1
        answered = _answered(adapter, example)
        if answered is None:
            continue
        trials += _steer_prompt(model, *answered, settings)
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


def rank_pairs(graph: Graph, clt: CrossLayerTranscoder) -> FeaturePairs:
    """The active (layer, feature) pairs of a graph, most influential first; ties by layer, then feature number.

    Args:
        graph: a graph whose only targets are what the influence is on.
        clt: its transcoder, folded, so that strengths are in the model's units.

    Returns:
        The pairs, on the CPU.
    """
    nodes, n_features = graph.nodes, clt.config.n_features
    columns = nodes.is_kind(NodeKind.FEATURE)
    keys, pair_of_column = torch.unique(
        nodes.layer[columns].long() * n_features + nodes.feature[columns], return_inverse=True
    )

    def over_positions(values: Tensor) -> Tensor:
        return torch.zeros(len(keys), dtype=torch.float64).index_add_(0, pair_of_column, values.double())

    layer, feature = keys // n_features, keys % n_features
    norm = torch.cat([decoder_norms(clt, source)[feature[layer == source]] for source in layer.unique().tolist()])
    total = over_positions(influence(graph)[columns])
    order = total.argsort(descending=True, stable=True)
    return FeaturePairs(
        layer=layer[order],
        feature=feature[order],
        influence=total[order],
        strength=(over_positions(nodes.activation[columns]) * norm)[order],
    )


def decoder_norms(clt: CrossLayerTranscoder, source: int) -> Tensor:
    """[F] float64 on the CPU: length of each feature's decoder vectors, over all targets of its layer together."""
    squares = torch.zeros(clt.config.n_features, dtype=torch.float64)
    for target in clt.targets_of(source):
        W_FD = clt.W_dec[str(target)][source - clt.sources_of(target).start]
        squares += W_FD.detach().double().square().sum(1).cpu()
    return squares.sqrt()


def match_controls(pairs: FeaturePairs, n: int) -> Tensor | None:
    """Finds for each of the first n pairs another one of the same layer that writes about as much.

    The strongest pair is served first, for it has the fewest likenesses; each takes the free pair whose strength has
    the ratio to its own closest to 1.

    Args:
        pairs: the pairs; the first n are the chosen ones and are no controls.
        n: how many to match.

    Returns:
        [n] int64 indices into `pairs`, or None when a layer has too few other pairs.
    """
    log_strength = pairs.strength.log()
    free = torch.arange(len(pairs.layer)) >= n
    controls = torch.empty(n, dtype=torch.int64)
    for chosen in log_strength[:n].argsort(descending=True, stable=True).tolist():
        candidates = (free & (pairs.layer == pairs.layer[chosen])).nonzero()[:, 0]
        if len(candidates) == 0:
            return None
        nearest = candidates[(log_strength[candidates] - log_strength[chosen]).abs().argmin()]
        controls[chosen] = nearest
        free[nearest] = False
    return controls


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One prompt at one size: whether the answer flipped, and how much the ablated pairs write."""

    mlps: MlpOutputs
    n: int
    ablated: bool
    control: bool
    ablated_strength: float
    control_strength: float


def _answered(adapter: ModelAdapter, example: Example) -> tuple[PromptInputs, int] | None:
    """The prompt without answer and its first answer token, if greedy decoding gives exactly the answer."""
    if example.answer is None:
        raise InputError(f"example {example.example_id} has no answer; steering needs one")
    whole = adapter.prepare(example.prompt, example.images, example.answer)
    with torch.no_grad():
        predicted = adapter.forward(whole)[0].argmax(-1)
    asked = whole.answer_mask[0].nonzero()[:, 0]
    wanted = whole.tokens.token_id[0, asked + 1]
    if not torch.equal(predicted[asked], wanted.long()):
        return None
    return adapter.prepare(example.prompt, example.images), int(wanted[0])


def _steer_prompt(
    model: ReplacementModel, inputs: PromptInputs, token: int, settings: SteeringSettings
) -> list[_Trial]:
    """Ablates the most influential and the matched pairs, every size and side a row of one batch."""
    attribution = AttributionSettings(
        targets=(LogitTargets(tokens=(token,)),), max_feature_nodes=settings.max_feature_nodes
    )
    pairs = rank_pairs(attribute(model.adapter, model.clt, inputs, attribution), model.clt)
    sides: list[tuple[int, Tensor]] = []
    for n in settings.sizes:
        control = match_controls(pairs, n) if n <= len(pairs.layer) else None
        if control is not None:
            sides += [(n, torch.arange(n)), (n, control)]
    if not sides:
        return []
    batch = model.adapter.collate([inputs] * len(sides))
    interventions = [
        Intervention(layer=int(pairs.layer[i]), feature=int(pairs.feature[i]), value=0.0, prompt=row)
        for row, (_, ablated) in enumerate(sides)
        for i in ablated
    ]
    strength = [float(pairs.strength[ablated].sum()) for _, ablated in sides]
    trials = []
    for mlps in settings.mlps:
        errors = _repeated(model.record_errors(inputs), len(sides)) if mlps == "replaced" else None
        logits_NSV = model.forward(batch, interventions, errors, mlps=mlps)
        flipped = (logits_NSV[:, -1].argmax(-1) != token).tolist()
        for row in range(0, len(sides), 2):
            trial = _Trial(
                mlps=mlps,
                n=sides[row][0],
                ablated=flipped[row],
                control=flipped[row + 1],
                ablated_strength=strength[row],
                control_strength=strength[row + 1],
            )
            trials.append(trial)
    return trials


def _repeated(errors: RecordedErrors, times: int) -> RecordedErrors:
    """The error terms of one prompt for a batch of its copies."""
    return RecordedErrors(by_target={layer: e.expand(times, -1, -1) for layer, e in errors.by_target.items()})


def _summarise(mlps: MlpOutputs, n: int, trials: list[_Trial]) -> SteeringResult:
    trials = [trial for trial in trials if (trial.mlps, trial.n) == (mlps, n)]
    written = sum(trial.ablated_strength for trial in trials)
    return SteeringResult(
        mlps=mlps,
        n=n,
        ablated=wilson_interval(sum(trial.ablated for trial in trials), len(trials)),
        control=wilson_interval(sum(trial.control for trial in trials), len(trials)),
        strength_ratio=sum(trial.control_strength for trial in trials) / written if written else float("nan"),
    )
