"""Interventions on one prompt: logits and feature activations with and without them, parts of the model frozen.

The run without interventions is the model itself: with replaced MLPs, recorded error terms are added. Frozen parts keep
the values of that run (Ameisen et al. 2025, "Circuit Tracing", section "Validating Attribution Graph Hypotheses with
Interventions"; circuit-tracer's `feature_intervention` freezes attention by default, too).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from clt.attribution.replacement.feature_table import FeatureChanges, FeatureTable
from clt.attribution.replacement.frozen_model import FrozenModel, FrozenPart, record
from clt.attribution.replacement.interventions import (
    Intervention,
    LayerCodes,
    LiveEdits,
    RecordedErrors,
    RecordedOutputs,
    ReplacedOutputs,
    SteeredOutputs,
    TokenColumns,
    plan_interventions,
)
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.capture.models.hooks import attach
from clt.capture.models.prompts import token_text
from clt.errors import GraphError
from clt.records import SparseCodes
from clt.transcoder.layers import source_layers
from clt.transcoder.model import CrossLayerTranscoder

#: MLP outputs are the transcoder's, or the model's own.
MlpOutputs = Literal["replaced", "original"]
#: Values that are frozen: attention patterns; denominators of the decoder's norms; activations of all features without
#: interventions and, where the transcoder does not act, MLP outputs.
Frozen = Literal["attention", "norms", "features"]


class TokenChange(NamedTuple):
    """Probability of one next token with and without interventions."""

    token_id: int
    text: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True, repr=False)
class InterventionResult:
    """Effects of interventions on one prompt.

    Attributes:
        logits: [S,V] with the interventions.
        logits_before: [S,V] without.
        changed: features that the encoders give another activation, the values set by the interventions themselves
            left out.
        token_text: text of a vocabulary id; holds the tokenizer and not the model.
    """

    logits: Tensor
    logits_before: Tensor
    changed: FeatureChanges
    token_text: Callable[[int], str]

    def next_tokens(self, n: int = 5, position: int = -1) -> list[TokenChange]:
        """The n most likely next tokens with the interventions and the n most likely without, merged.

        Args:
            n: tokens of each run, > 0.
            position: position of the prompt that predicts them.

        Returns:
            Probabilities, largest first.
        """
        before_V, after_V = (logits[position].float().softmax(-1) for logits in (self.logits_before, self.logits))
        ids = torch.cat([before_V.topk(n).indices, after_V.topk(n).indices]).unique().tolist()
        changes = [TokenChange(i, self.token_text(i), float(before_V[i]), float(after_V[i])) for i in ids]
        return sorted(changes, key=lambda change: -max(change.before, change.after))

    def __repr__(self) -> str:
        tokens = ", ".join(f"{t.text!r} {t.before:.3f} -> {t.after:.3f}" for t in self.next_tokens(3))
        return f"InterventionResult: next token {tokens}\n{self.changed!r}"


@torch.no_grad()
def intervene(
    adapter: ModelAdapter,
    transcoder: CrossLayerTranscoder,
    inputs: PromptInputs,
    interventions: Iterable[Intervention],
    *,
    freeze: Frozen | Collection[Frozen] = "attention",
    mlps: MlpOutputs = "replaced",
) -> InterventionResult:
    """Runs one prompt with and without interventions on features.

    Args:
        adapter: the model.
        transcoder: its folded transcoder.
        inputs: one prompt without padding.
        interventions: activations to change, at least one.
        freeze: parts that keep their values. All three leave direct effects only, the edges of an attribution graph.
        mlps: "replaced": MLP outputs are the transcoder's plus recorded errors, so later features respond; "original":
            the model's own MLPs run, and the change is added to their outputs.

    Returns:
        Logits and changed features, on the CPU.

    Raises:
        GraphError: there is no intervention, one names a layer, feature or position that does not exist, a part to
            freeze is unknown, or there is more than one prompt.
        ModelError: norms are to be frozen, and one is not an RMSNorm.
    """
    parts = frozen_parts(freeze)
    columns = TokenColumns.of(inputs, transcoder.config.drop_bos)
    plan = plan_interventions(interventions, transcoder, columns)
    if not plan:
        raise GraphError("interventions is empty; name at least one, such as Intervention(layer=0, feature=0, value=0)")
    recorded = RecordedOutputs(transcoder, columns)
    with attach(adapter, edit=recorded.edits()):
        recording = record(adapter, inputs, transcoder.config.read_site)
    kept: LayerCodes = recorded.codes if "features" in parts else {}
    run: LiveEdits
    if is_replaced(mlps):
        run = ReplacedOutputs(transcoder, columns, plan, RecordedErrors(by_target=recorded.errors), kept_codes=kept)
    else:
        run = SteeredOutputs(transcoder, columns, plan, kept, encodes_all=True)
    held = [part for part in get_args(FrozenPart) if part in parts or (part == "mlps" and kept)]
    logits = FrozenModel(adapter, recording, freeze=held).forward(run.edits())
    run.log_ineffective()
    tokens = [adapter.token_text(token) for token in inputs.tokens.token_id[0].tolist()]
    before, after = (feature_table(transcoder, codes, columns, tokens) for codes in (recorded.encoded, run.encoded))
    return InterventionResult(
        logits=logits.cpu(),
        logits_before=recording.logits.to(logits.dtype).cpu(),
        changed=FeatureChanges.between(before, after),
        token_text=partial(token_text, adapter.tokenizer),
    )


def is_replaced(mlps: MlpOutputs) -> bool:
    """True if MLP outputs are the transcoder's; GraphError for a value other than "replaced" and "original"."""
    if mlps not in get_args(MlpOutputs):
        raise GraphError(f"mlps={mlps!r}: unknown; choose among {', '.join(get_args(MlpOutputs))}")
    return mlps == "replaced"


def frozen_parts(freeze: Frozen | Collection[Frozen]) -> set[Frozen]:
    """The parts to freeze as a set; GraphError where one is unknown."""
    parts: set[Frozen] = {freeze} if isinstance(freeze, str) else set(freeze)
    if unknown := parts - set(get_args(Frozen)):
        raise GraphError(f"freeze={sorted(unknown)}: unknown; choose among {', '.join(get_args(Frozen))}")
    return parts


def feature_table(
    transcoder: CrossLayerTranscoder, codes: LayerCodes, columns: TokenColumns, tokens: Sequence[str]
) -> FeatureTable:
    """The active features of one prompt.

    Args:
        transcoder: the transcoder that encoded them.
        codes: codes [S,K] of every source layer.
        columns: positions at which the transcoder acts; features at others do not count.
        tokens: the S tokens as text.

    Returns:
        The table, on the CPU.
    """
    layers = source_layers(transcoder.config)
    stacked = SparseCodes.stacked([codes[layer] for layer in layers], transcoder.config.n_features)
    values = torch.where(columns.replaced[0, : len(tokens), None], stacked.values, 0)
    return FeatureTable.from_codes(
        SparseCodes(values=values, indices=stacked.indices, n_features=stacked.n_features), layers, tokens
    )
