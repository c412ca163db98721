"""The replacement model: every MLP that has a source is replaced by the transcoder, attention and norms stay live.

It stands between training and graphs: how far its answers agree with the model's says how far a graph can be believed
(`clt.attribution.evaluation.agreement`), and interventions on its features say whether a graph's claims hold
(`clt.attribution.features.steering`). Features of layer l are encoded when the running forward computes layer l's read
site; target t sums over its sources so far. What the transcoder never saw keeps its own MLP output: padding, the
beginning-of-sequence token under `drop_bos`, and layers without a source. Recorded error terms make the logits equal
the model's until an intervention moves them (Ameisen et al. 2025, "Circuit Tracing", section "From Cross-Layer
Transcoder to Replacement Model").

Interventions act on one of two models:

* `mlps="replaced"`: the replacement model. Later features respond; error terms, where given, stay as recorded.
* `mlps="original"`: the model itself, the change added to its own MLP outputs, as circuit-tracer's unconstrained
  interventions do. Everything live responds, so a later MLP may answer again what a cross-layer decoder already wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from clt.attribution.replacement.interventions import (
    Intervention,
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
from clt.errors import CheckpointError, ConfigError, GraphError
from clt.records import Modality, ModelIdentity, SparseCodes
from clt.transcoder.model import CrossLayerTranscoder

__all__ = ["Intervention", "MlpOutputs", "RecordedErrors", "ReplacementModel", "require_same_model"]

#: Which MLP outputs run; see the module's text.
MlpOutputs = Literal["replaced", "original"]


class ReplacementModel:
    """A model whose MLPs are replaced by a transcoder, with interventions on its features.

    Args:
        adapter: the model.
        transcoder: a whole transcoder trained on it, scaled or folded.

    Raises:
        CheckpointError: the transcoder belongs to another model, or its dimensions do not fit.
        ConfigError: the transcoder reads what its own MLP has yet to write.
    """

    def __init__(self, adapter: ModelAdapter, transcoder: CrossLayerTranscoder) -> None:
        config = transcoder.config
        require_same_model(transcoder.provenance.model, adapter.identity)
        if (config.n_layers, config.d_model) != (adapter.n_layers, adapter.d_model):
            raise CheckpointError(
                f"the transcoder is made for {config.n_layers} layers of width {config.d_model}, "
                f"{adapter.identity.name} has {adapter.n_layers} of width {adapter.d_model}; use one trained on it"
            )
        if config.read_site == "resid_post" and (config.first_offset == 0 or config.skip):
            raise ConfigError("read_site: resid_post comes after the layer's own MLP; use first_offset 1 without skip")
        self.adapter = adapter
        self.transcoder = transcoder.folded().to(adapter.device)

    @torch.no_grad()
    def forward(
        self,
        inputs: PromptInputs,
        interventions: Iterable[Intervention] = (),
        errors: RecordedErrors | None = None,
        *,
        mlps: MlpOutputs = "replaced",
    ) -> Tensor:
        """Logits of a batch of prompts.

        Args:
            inputs: the prompts.
            interventions: activations to change.
            errors: error terms of the same inputs; without interventions the logits then equal the model's.
            mlps: which MLP outputs run; "original" takes no errors, its own are live.

        Returns:
            [N,S,V] logits.

        Raises:
            GraphError: an intervention names a layer, feature, position or prompt that does not exist, or the errors
                do not fit the inputs or the mode.
        """
        with self._running(inputs, interventions, mlps, errors=errors):
            return self.adapter.forward(inputs)

    @torch.no_grad()
    def forward_partly(
        self, inputs: PromptInputs, targets: Sequence[int] | None = None, modalities: Sequence[Modality] | None = None
    ) -> Tensor:
        """Logits when MLP outputs are replaced in some layers or at some tokens only; elsewhere MLPs answer live.

        Args:
            inputs: the prompts.
            targets: target layers that are replaced; absent: all.
            modalities: tokens at which they are; absent: all.

        Returns:
            [N,S,V] logits.
        """
        columns = self._columns(inputs)
        if modalities is not None:
            chosen = torch.isin(inputs.tokens.modality, torch.tensor(modalities, device=columns.replaced.device))
            columns = replace(columns, replaced=columns.replaced & chosen)
        with attach(self.adapter, edit=ReplacedOutputs(self.transcoder, columns, {}, targets=targets).edits()):
            return self.adapter.forward(inputs)

    @torch.no_grad()
    def generate(
        self,
        inputs: PromptInputs,
        max_new_tokens: int,
        interventions: Iterable[Intervention] = (),
        *,
        mlps: MlpOutputs = "replaced",
    ) -> list[list[int]]:
        """Continues a batch of prompts greedily, with the key-value cache.

        Args:
            inputs: the prompts.
            max_new_tokens: most tokens to add.
            interventions: activations to change; one with a position acts in the call that computes this position (the
                prefill, or one decoding step), one without acts in every call.
            mlps: which MLP outputs run.

        Returns:
            New token ids of each prompt.

        Raises:
            GraphError: an intervention names a layer, feature, position or prompt that does not exist.
        """
        # The last new token is never fed back.
        with self._running(inputs, interventions, mlps, new_columns=max(0, max_new_tokens - 1)):
            return self.adapter.generate(inputs, max_new_tokens)

    @torch.no_grad()
    def record_errors(self, inputs: PromptInputs) -> RecordedErrors:
        """Records what the transcoder misses in a forward of the model itself.

        Args:
            inputs: the prompts.

        Returns:
            Error terms for `forward` of the same inputs.
        """
        run = RecordedOutputs(self.transcoder, self._columns(inputs))
        with attach(self.adapter, edit=run.edits()):
            self.adapter.forward(inputs)
        return RecordedErrors(by_target=run.errors)

    @torch.no_grad()
    def features(self, inputs: PromptInputs, *, mlps: MlpOutputs = "replaced") -> SparseCodes:
        """Features that are active in a forward without interventions.

        Args:
            inputs: the prompts.
            mlps: "replaced": as the replacement model computes them; "original": on the model's own residual stream.

        Returns:
            Codes [L,N*S,K] of the layers that have features, prompt by prompt; empty where the transcoder does not act.
        """
        columns = self._columns(inputs)
        run: LiveEdits = ReplacedOutputs(self.transcoder, columns, {})
        if mlps == "original":
            run = RecordedOutputs(self.transcoder, columns)
        with attach(self.adapter, edit=run.edits()):
            self.adapter.forward(inputs)
        codes = SparseCodes.stacked([run.codes[s] for s in run.sources], self.transcoder.config.n_features)
        seen = columns.replaced.reshape(1, -1, 1)
        return replace(codes, values=torch.where(seen, codes.values, 0), indices=torch.where(seen, codes.indices, 0))

    def _columns(self, inputs: PromptInputs, new_columns: int = 0) -> TokenColumns:
        return TokenColumns.of(inputs, self.transcoder.config.drop_bos, new_columns)

    def _running(
        self,
        inputs: PromptInputs,
        interventions: Iterable[Intervention],
        mlps: MlpOutputs,
        errors: RecordedErrors | None = None,
        new_columns: int = 0,
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """The model with its MLP outputs edited, for as long as the context lasts."""
        columns = self._columns(inputs, new_columns)
        plan = plan_interventions(interventions, self.transcoder, columns)
        if mlps == "replaced":
            return attach(self.adapter, edit=ReplacedOutputs(self.transcoder, columns, plan, errors).edits())
        if errors is not None:
            raise GraphError("error terms belong to replaced MLPs; leave them out with mlps='original'")
        return attach(self.adapter, edit=SteeredOutputs(self.transcoder, columns, plan).edits())


def require_same_model(trained_on: ModelIdentity | None, model: ModelIdentity) -> None:
    """Refuses a transcoder of another model; one made by hand carries no identity and fits any.

    Args:
        trained_on: the model in the transcoder's provenance.
        model: the model at hand.

    Raises:
        CheckpointError: the weights' fingerprints differ; names both models.
    """
    if trained_on is not None and trained_on.fingerprint != model.fingerprint:
        raise CheckpointError(
            f"the transcoder was trained on {trained_on.name} ({trained_on.architecture}, weights "
            f"{trained_on.fingerprint[:12]}), not on {model.name} ({model.architecture}, weights "
            f"{model.fingerprint[:12]}); load that model or train a transcoder for this one"
        )
