"""The replacement model: MLPs that have a source layer are replaced by the transcoder; attention and norms stay live.

Features of layer l are encoded when the running forward computes layer l's read site; target t sums over its sources so
far. The MLP output is kept at positions the transcoder was not trained on (padding, BOS under `drop_bos`) and in layers
without a source. With recorded error terms the logits equal the model's until an intervention changes them (Ameisen et
al. 2025, "Circuit Tracing", section "From Cross-Layer Transcoder to Replacement Model").

Interventions act with `mlps="replaced"` on the replacement model, or with `mlps="original"` on the model itself, where
the change is added to its own MLP outputs as in circuit-tracer's unconstrained interventions. In the latter a later MLP
may respond to what a cross-layer decoder already wrote. docs/python.md compares the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from clt.attribution.replacement.feature_table import FeatureTable
from clt.attribution.replacement.frozen_model import require_one_prompt
from clt.attribution.replacement.intervene import Frozen, InterventionResult, MlpOutputs, intervene, is_replaced
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
from clt.capture.sources.examples import ImageLike, load_images
from clt.errors import CheckpointError, ConfigError, GraphError, InputError
from clt.records import Modality, ModelIdentity, SparseCodes
from clt.transcoder.layers import source_layers
from clt.transcoder.lazy_decoder import MappedDecoder
from clt.transcoder.model import CrossLayerTranscoder

if TYPE_CHECKING:
    from clt.attribution.graphs.attribute import AttributionSettings
    from clt.attribution.graphs.graph import Graph

__all__ = ["Generation", "Intervention", "MlpOutputs", "RecordedErrors", "ReplacementModel", "require_same_model"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy continuations of N prompts.

    Attributes:
        ids: new token ids of each prompt, the token that ends an answer included.
        texts: the same as text, without special tokens.
    """

    ids: list[list[int]]
    texts: list[str]

    @property
    def text(self) -> str:
        """The continuation of the only prompt; GraphError where there are several."""
        if len(self.texts) != 1:
            raise GraphError(f"{len(self.texts)} prompts were continued; read texts")
        return self.texts[0]

    def __str__(self) -> str:
        return "\n".join(self.texts)


class ReplacementModel:
    """A model whose MLPs are replaced by a transcoder, with interventions on its features.

    A prompt is a question as text, which gets the model's chat format, or `PromptInputs` from `prepare`.

    Args:
        adapter: the model.
        transcoder: a whole transcoder trained on it, scaled or folded.

    Raises:
        CheckpointError: the transcoder belongs to another model, or its dimensions do not fit.
        ConfigError: the transcoder reads the residual stream after the MLP that it replaces.
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
        #: Architecture and hex digest of the transcoder as given, before folding.
        self.config, self.fingerprint = config, fingerprint(transcoder)
        self.transcoder = transcoder.folded().to(adapter.device)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | ModelAdapter,
        transcoder: str | Path | CrossLayerTranscoder,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
        transcoder_revision: str | None = None,
        lazy: bool = False,
    ) -> Self:
        """Loads a model and a transcoder trained on it.

        Args:
            model: folder or hub name of a Hugging Face model, or an adapter.
            transcoder: folder or hub name of the transcoder, or a loaded one.
            device: torch device of both.
            dtype: type the model runs in: float32, bfloat16, float16 or float64.
            revision: hub revision of the model.
            transcoder_revision: hub revision of the transcoder.
            lazy: keep the decoders in their memory-mapped files; slower, for transcoders larger than memory.

        Returns:
            The replacement model.

        Raises:
            ModelError: the model cannot be loaded.
            CheckpointError: the transcoder cannot be read, or belongs to another model.
            HubError: a repository is missing or refuses access.
            ConfigError: an argument is given that a loaded model or transcoder cannot follow.
        """
        if not isinstance(transcoder, CrossLayerTranscoder):
            transcoder = CrossLayerTranscoder.from_pretrained(transcoder, revision=transcoder_revision, lazy=lazy)
        elif lazy or transcoder_revision is not None:
            raise ConfigError("the transcoder is loaded already; leave out lazy and transcoder_revision")
        if isinstance(model, ModelAdapter):
            if (device, dtype, revision) != ("cpu", "float32", None):
                raise ConfigError("the model is loaded already; leave out device, dtype and revision")
        else:
            model = ModelAdapter.from_pretrained(model, revision, dtype, device)
        return cls(model, transcoder)

    def __repr__(self) -> str:
        return f"ReplacementModel(\n  {self.adapter!r},\n  {self.transcoder!r},\n)"

    def prepare(
        self, prompt: str | PromptInputs, images: ImageLike | Sequence[ImageLike] = (), answer: str | None = None
    ) -> PromptInputs:
        """Turns a question and its images into model inputs, in the model's chat format.

        Args:
            prompt: the question; text that already has image placeholders or chat markers is used as it is. Inputs
                that were prepared before are returned unchanged.
            images: files or pictures, in order.
            answer: text whose tokens follow the prompt's.

        Returns:
            A batch of one prompt.

        Raises:
            InputError: the prompt is no text, an image cannot be read, or images and placeholders differ in number.
        """
        if isinstance(prompt, PromptInputs):
            if images or answer is not None:
                raise InputError("prepared inputs have their own images and answer; give them to prepare")
            return prompt
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise InputError(f"prompt is of type {kind}; give one question as text, or inputs from prepare")
        pictures = load_images(images)
        return self.adapter.prepare(self.adapter.format_prompt(prompt, len(pictures)), pictures, answer)

    def attribute(
        self,
        prompt: str | PromptInputs,
        *,
        images: ImageLike | Sequence[ImageLike] = (),
        settings: AttributionSettings | None = None,
    ) -> Graph:
        """Computes the attribution graph of one prompt; see `clt.attribution.graphs.attribute`.

        Args:
            prompt: see `prepare`.
            images: see `prepare`.
            settings: targets and limits; by default the most likely next tokens and all features.

        Returns:
            The unpruned graph.

        Raises:
            GraphError: a target does not exist, or there is more than one prompt.
            ModelError: the model's architecture cannot be linearised.
        """
        from clt.attribution.graphs.attribute import attribute_model

        return attribute_model(self, self.prepare(prompt, images), settings)

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
            mlps: MLP outputs to use; "original" takes no errors, since its MLPs are live.

        Returns:
            [N,S,V] logits.

        Raises:
            GraphError: an intervention names a layer, feature, position or prompt that does not exist, or the errors
                do not fit the inputs or the mode.
        """
        with attach(self.adapter, edit=self._run(inputs, interventions, mlps, errors=errors).edits()):
            return self.adapter.forward(inputs)

    @torch.no_grad()
    def forward_partly(
        self, inputs: PromptInputs, targets: Sequence[int] | None = None, modalities: Sequence[Modality] | None = None
    ) -> Tensor:
        """Logits when MLP outputs are replaced in some layers or at some tokens only; all other MLPs are live.

        Args:
            inputs: the prompts.
            targets: target layers that are replaced; default: all.
            modalities: tokens at which they are replaced; default: all.

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
        prompt: str | PromptInputs,
        max_new_tokens: int = 32,
        interventions: Iterable[Intervention] = (),
        *,
        images: ImageLike | Sequence[ImageLike] = (),
        mlps: MlpOutputs = "replaced",
    ) -> Generation:
        """Continues prompts greedily, with the key-value cache.

        Args:
            prompt: one question, or a prepared batch; see `prepare`.
            max_new_tokens: most tokens to add.
            interventions: activations to change; one with a position acts in the call that computes this position (the
                prefill, or one decoding step), one without acts in every call.
            images: see `prepare`.
            mlps: MLP outputs to use.

        Returns:
            New token ids of each prompt, and their text.

        Raises:
            GraphError: an intervention names a layer, feature, position or prompt that does not exist.
        """
        inputs = self.prepare(prompt, images)
        # The last new token is never fed back.
        run = self._run(inputs, interventions, mlps, new_columns=max(0, max_new_tokens - 1))
        with attach(self.adapter, edit=run.edits()):
            ids = self.adapter.generate(inputs, max_new_tokens)
        run.log_ineffective()
        return Generation(ids=ids, texts=self.adapter.tokenizer.batch_decode(ids, skip_special_tokens=True))

    @torch.no_grad()
    def record_errors(self, inputs: PromptInputs) -> RecordedErrors:
        """Records the transcoder's errors in a forward of the model itself.

        Args:
            inputs: the prompts.

        Returns:
            Error terms for `forward` of the same inputs.
        """
        run = RecordedOutputs(self.transcoder, self._columns(inputs))
        with attach(self.adapter, edit=run.edits()):
            self.adapter.forward(inputs)
        return RecordedErrors(by_target=run.errors)

    def features(
        self,
        prompt: str | PromptInputs,
        *,
        images: ImageLike | Sequence[ImageLike] = (),
        mlps: MlpOutputs = "original",
    ) -> FeatureTable:
        """Features that are active on one prompt.

        Args:
            prompt: see `prepare`.
            images: see `prepare`.
            mlps: "original": encoded from the model's own residual stream, as the nodes of a graph are; "replaced": as
                the replacement model computes them.

        Returns:
            One row per layer, position and feature.

        Raises:
            GraphError: there is more than one prompt, or padding.
        """
        inputs = self.prepare(prompt, images)
        require_one_prompt(inputs)
        layers = source_layers(self.transcoder.config)
        tokens = [self.adapter.token_text(token) for token in inputs.tokens.token_id[0].tolist()]
        return FeatureTable.from_codes(self.codes(inputs, mlps=mlps), layers, tokens)

    def intervene(
        self,
        prompt: str | PromptInputs,
        interventions: Iterable[Intervention],
        *,
        images: ImageLike | Sequence[ImageLike] = (),
        freeze: Frozen | Collection[Frozen] = "attention",
        mlps: MlpOutputs = "replaced",
    ) -> InterventionResult:
        """Runs one prompt with and without interventions on features.

        Args:
            prompt: see `prepare`.
            interventions: activations to change, at least one.
            images: see `prepare`.
            freeze: parts that keep their values of the run without interventions: "attention" (patterns), "norms"
                (denominators), "features" (activations of all others). All three leave direct effects only, which are
                the edges of an attribution graph.
            mlps: "replaced": later features respond; "original": the model's own MLPs respond.

        Returns:
            Logits of both runs, and the features whose activations changed.

        Raises:
            GraphError: there is no intervention, one names what does not exist, or there is more than one prompt.
            ModelError: norms are to be frozen, and one is not an RMSNorm.
        """
        inputs = self.prepare(prompt, images)
        return intervene(self.adapter, self.transcoder, inputs, interventions, freeze=freeze, mlps=mlps)

    @torch.no_grad()
    def codes(self, inputs: PromptInputs, *, mlps: MlpOutputs = "replaced") -> SparseCodes:
        """Features that are active in a forward of a batch without interventions.

        Args:
            inputs: the prompts.
            mlps: "replaced": as the replacement model computes them; "original": on the model's own residual stream.

        Returns:
            Codes [L,N*S,K] of the layers that have features, prompt by prompt; empty where the transcoder does not act.
        """
        columns = self._columns(inputs)
        run: LiveEdits = ReplacedOutputs(self.transcoder, columns, {})
        if not is_replaced(mlps):
            run = RecordedOutputs(self.transcoder, columns)
        with attach(self.adapter, edit=run.edits()):
            self.adapter.forward(inputs)
        codes = SparseCodes.stacked([run.codes[s] for s in run.sources], self.transcoder.config.n_features)
        seen = columns.replaced.reshape(1, -1, 1)
        return replace(codes, values=torch.where(seen, codes.values, 0), indices=torch.where(seen, codes.indices, 0))

    def _columns(self, inputs: PromptInputs, new_columns: int = 0) -> TokenColumns:
        return TokenColumns.of(inputs, self.transcoder.config.drop_bos, new_columns)

    def _run(
        self,
        inputs: PromptInputs,
        interventions: Iterable[Intervention],
        mlps: MlpOutputs,
        errors: RecordedErrors | None = None,
        new_columns: int = 0,
    ) -> LiveEdits:
        """The edits of MLP outputs, for one forward or generation."""
        columns = self._columns(inputs, new_columns)
        plan = plan_interventions(interventions, self.transcoder, columns)
        if is_replaced(mlps):
            return ReplacedOutputs(self.transcoder, columns, plan, errors)
        if errors is not None:
            raise GraphError("error terms belong to replaced MLPs; leave them out with mlps='original'")
        return SteeredOutputs(self.transcoder, columns, plan)


def fingerprint(transcoder: CrossLayerTranscoder) -> str:
    """Hex digest of a strided sample of every weight of a transcoder and of its scaling."""
    digest = hashlib.sha256()
    # Decoders that stay in their files are in no state dict.
    decoders = {f"W_dec.{name}": W_SFD for name, W_SFD in transcoder.W_dec.items()}
    tensors: dict[str, Any] = {**transcoder.state_dict(), **decoders, **transcoder.scaling.tensors()}
    for name, tensor in sorted(tensors.items()):
        step = max(1, tensor.shape.numel() // 4096)
        flat = tensor.every(step) if isinstance(tensor, MappedDecoder) else tensor.detach().reshape(-1)[::step]
        sample = flat.to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def require_same_model(trained_on: ModelIdentity | None, model: ModelIdentity) -> None:
    """Refuses a transcoder of another model; one without a recorded identity fits any.

    Args:
        trained_on: the model in the transcoder's provenance.
        model: the model to be used with it.

    Raises:
        CheckpointError: the weights' fingerprints differ; names both models.
    """
    if trained_on is not None and trained_on.fingerprint != model.fingerprint:
        raise CheckpointError(
            f"the transcoder was trained on {trained_on.name} ({trained_on.architecture}, weights "
            f"{trained_on.fingerprint[:12]}), not on {model.name} ({model.architecture}, weights "
            f"{model.fingerprint[:12]}); load that model, in the dtype of the capture, "
            "or train a transcoder for this one"
        )
