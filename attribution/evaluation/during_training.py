"""Evaluators of a training job: held-out activations, and the replacement model on held-out prompts.

The replacement model needs the whole transcoder in one place. The shares are gathered on the first rank's CPU, which
works alone while the other ranks wait; they meet after every batch of prompts and every graph, so that no wait is
longer than one of these. Beside the model, the first rank's memory holds the transcoder up to three times in the
training dtype (as gathered, folded, and once more for a graph): evaluate the checkpoints of a larger transcoder with
`clt evaluate` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from clt.attribution.evaluation.agreement import AgreementReport, Comparison, batched_prompts, partial_replacements
from clt.attribution.graphs.attribute import AttributionSettings, attribute
from clt.attribution.graphs.scores import GraphScores, score
from clt.attribution.replacement.replacement_model import ReplacementModel, require_same_model
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.capture.models.sites import decoder_sites
from clt.capture.planning import CaptureConfig
from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.blocks import StoreBlocks
from clt.capture.reading.loader import iterate_store
from clt.capture.reading.open_store import open_store
from clt.capture.reading.token_filter import TokenFilter
from clt.capture.sources.examples import open_source
from clt.checkpoint.gather import gather_transcoder
from clt.config import load_config
from clt.distributed.mesh import Mesh, input_layers
from clt.errors import CLTError, ConfigError, InputError, StoreError
from clt.evaluation.evaluator import Evaluation, Evaluator, StoreEvaluator
from clt.kernels import ops
from clt.records import ActivationBatch, ModelIdentity
from clt.training.settings import DataSettings, EvaluationSettings, ReplacementSettings, TrainConfig
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare
from clt.transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class HeldOutPrompts:
    """A model and prompts that its transcoder does not train on.

    Attributes:
        adapter: the model.
        answered: prompts with their answers.
        questions: the first of them without, for graphs.
    """

    adapter: ModelAdapter
    answered: tuple[PromptInputs, ...]
    questions: tuple[PromptInputs, ...]

    @classmethod
    def load(cls, settings: ReplacementSettings, trained_on: ModelIdentity) -> HeldOutPrompts:
        """Loads the model and prepares the prompts.

        Args:
            settings: model and prompts.
            trained_on: the model whose activations train.

        Raises:
            ConfigError: the capture's file is wrong.
            ModelError: the model cannot be loaded.
            CheckpointError: it is not the one whose activations train.
            InputError: a prompt cannot be read, or has no answer.
        """
        job = replace(load_config(CaptureConfig, settings.capture), device=settings.device)
        source = open_source(job.source)
        count = min(settings.prompts, len(source.texts))
        for text in source.texts[:count]:
            if text.answer is None:
                raise InputError(
                    f"evaluation.replacement.capture={settings.capture}: example {text.example_id} has no answer; "
                    "give a capture config whose prompts have answers"
                )
        adapter = (replace(job, model=settings.model) if settings.model is not None else job).load()
        require_same_model(trained_on, adapter.identity)
        examples = [source.load(index) for index in range(count)]
        return cls(
            adapter=adapter,
            answered=tuple(adapter.prepare(e.prompt, e.images, e.answer) for e in examples),
            questions=tuple(adapter.prepare(e.prompt, e.images) for e in examples[: settings.graphs]),
        )


class ReplacementEvaluator:
    """Compares the replacement model with the model; implements `clt.evaluation.evaluator.Evaluator`.

    Args:
        settings: sizes.
        prompts: held-out prompts on the first rank; None on the others.
    """

    def __init__(self, settings: ReplacementSettings, prompts: HeldOutPrompts | None) -> None:
        self._settings, self._prompts = settings, prompts

    def __call__(self, transcoder: CrossLayerTranscoder, mesh: Mesh, between: Callable[[], None]) -> Evaluation:
        """See `Evaluator`; the first rank returns measures with tags `replacement/...`, the others an empty result."""
        whole = gather_transcoder(transcoder, mesh)
        steps = None if whole is None or self._prompts is None else self._steps(whole, self._prompts)
        # Only the generator holds the transcoder from here on.
        del whole
        while True:
            between()
            found = None
            with mesh.together(CLTError):
                if steps is not None:
                    found = next(steps)
            if int(mesh.all_reduce(torch.tensor(int(found is not None)), "world", dist.ReduceOp.MAX)):
                return found or Evaluation()

    def _steps(self, transcoder: CrossLayerTranscoder, prompts: HeldOutPrompts) -> Iterator[Evaluation | None]:
        """Yields None after each piece of work, then the measures."""
        settings, adapter = self._settings, prompts.adapter
        has_images = any(images for inputs in prompts.answered for images in inputs.images)
        parts = partial_replacements(transcoder.config, settings.layer_ranges, has_images)
        replacement = ReplacementModel(adapter, transcoder)
        del transcoder
        comparison = Comparison(replacement, parts)
        for batch in batched_prompts(adapter, prompts.answered, settings.batch_size):
            comparison.add(batch)
            yield None
        limits, scores = AttributionSettings(max_feature_nodes=settings.graph_features), []
        for question in prompts.questions:
            scores.append(score(attribute(adapter, replacement.transcoder, question, limits)))
            yield None
        yield Evaluation(scalars=_scalars(comparison.report(), scores))


def _scalars(report: AgreementReport, scores: Sequence[GraphScores]) -> dict[str, float]:
    measures: dict[str, float] = {
        "prompts": report.num_prompts,
        "top1_agreement": report.top1_agreement,
        "kl": report.kl,
        "ce_gap": report.ce_gap,
        "fvu_logits": report.fvu_logits,
        "text_top1_agreement": report.text_top1_agreement,
        "text_kl": report.text_kl,
    }
    for name, part in report.parts.items():
        measures |= {
            f"{name}/top1_agreement": part.top1_agreement,
            f"{name}/kl": part.kl,
            f"{name}/ce_gap": part.ce_gap,
        }
    if scores:
        measures["completeness_score"] = sum(item.completeness for item in scores) / len(scores)
        measures["replacement_score"] = sum(item.replacement for item in scores) / len(scores)
    return {f"replacement/{name}": value for name, value in measures.items()}


def open_heldout(config: TrainConfig, trained_on: ModelIdentity, activations_id: str) -> ActivationStore | None:
    """Opens the held-out store of a job, if it has one.

    Args:
        config: the job.
        trained_on: the model whose activations train.
        activations_id: hash of the activations that train.

    Raises:
        StoreError: the store is missing or damaged.
        ConfigError: the job trains on it.
        CheckpointError: it holds activations of another model.
    """
    settings = config.evaluation
    if settings is None or settings.store is None:
        return None
    store = open_store(settings.store)
    require_same_model(trained_on, store.model)
    if store.id == activations_id:
        raise ConfigError(
            f"evaluation.store={settings.store} is the store that the job trains on; capture held-out prompts into "
            "another store"
        )
    return store


def make_evaluators(
    config: TrainConfig,
    trained_on: ModelIdentity,
    heldout: ActivationStore | None,
    architecture: CLTConfig,
    share: LayerShare,
    mesh: Mesh,
) -> tuple[Evaluator, ...]:
    """The evaluators of this rank; all ranks call this together.

    Args:
        config: the job.
        trained_on: the model whose activations train.
        heldout: from `open_heldout`.
        architecture: of the transcoder.
        share: of this rank.
        mesh: the processes.

    Raises:
        CLTError: the model or the prompts cannot be read, or do not belong to the activations; the same on all ranks.
    """
    settings, evaluators = config.evaluation, list[Evaluator]()
    if settings is None:
        return ()
    if heldout is not None:
        evaluators.append(_store_evaluator(heldout, settings, config.data, architecture, share, mesh))
    if settings.replacement is not None:
        prompts = None
        with mesh.together(CLTError):
            if mesh.is_first:
                _check_kernels(config, settings.replacement)
                prompts = HeldOutPrompts.load(settings.replacement, trained_on)
        evaluators.append(ReplacementEvaluator(settings.replacement, prompts))
    return tuple(evaluators)


def _store_evaluator(
    store: ActivationStore,
    settings: EvaluationSettings,
    data: DataSettings,
    architecture: CLTConfig,
    share: LayerShare,
    mesh: Mesh,
) -> StoreEvaluator:
    # The filter of training, but without beginning-of-sequence tokens, which no measure of the project counts.
    where = TokenFilter(modalities=data.modalities, drop_bos=True, norm_cap=data.norm_cap)
    x_sites = decoder_sites(input_layers(architecture, share), architecture.read_site)
    y_sites = decoder_sites(share.targets, "mlp_out")
    with mesh.together(StoreError):
        if not StoreBlocks(store, x_sites, y_sites, where).rows.any():
            raise StoreError(f"evaluation.store={settings.store}: no token passes the filter {where}; loosen it")

    def batches() -> Iterable[ActivationBatch]:
        rank, world = mesh.data_rank, mesh.data_size
        return iterate_store(
            store, x_sites, y_sites, settings.batch_tokens, where, settings.tokens, data_rank=rank, data_world=world
        )

    return StoreEvaluator(batches)


def _check_kernels(config: TrainConfig, settings: ReplacementSettings) -> None:
    """ConfigError unless the kernels that the job names can run where the replacement model does."""
    try:
        ops.use_backend(config.kernels)
        ops.backend_of(torch.empty(0, device=settings.device))
    except RuntimeError as error:
        raise ConfigError(f"evaluation.replacement.device={settings.device}: {error}") from None
