"""Watches the replacement model while its transcoder trains: agreement on held-out prompts, scores of a few graphs.

It needs the whole transcoder in one place. The shares travel to the first rank's CPU, which then works alone while the
others wait; they hear from it after every batch of prompts and every graph, so no wait is longer than one of these. The
first rank's memory takes the transcoder up to three times in the training dtype (as gathered, folded, and once more for
a graph) beside the model: a transcoder too large for that is measured by `clt evaluate` on its checkpoints instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from clt.attribution.evaluation.agreement import AgreementReport, Comparison, batched_prompts, partial_replacements
from clt.attribution.graphs.attribute import AttributionSettings, attribute
from clt.attribution.graphs.scores import GraphScores, score
from clt.attribution.replacement.replacement_model import ReplacementModel, require_same_model
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.capture.planning import CaptureConfig
from clt.capture.sources.examples import open_source
from clt.checkpoint.gather import gather_transcoder
from clt.config import load_config
from clt.distributed.mesh import Mesh
from clt.errors import CLTError, InputError
from clt.evaluation.store_evaluation import Evaluation
from clt.records import ModelIdentity
from clt.training.settings import ReplacementSettings
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
            settings: which.
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
                    "name a capture of prompts with answers"
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
    """Compares the replacement model with the model; a `clt.evaluation.store_evaluation.Evaluator`.

    Args:
        settings: sizes.
        prompts: what to compare on, for the first rank; None on the others.
    """

    def __init__(self, settings: ReplacementSettings, prompts: HeldOutPrompts | None) -> None:
        self._settings, self._prompts = settings, prompts

    def __call__(self, transcoder: CrossLayerTranscoder, mesh: Mesh, between: Callable[[], None]) -> Evaluation:
        """As `Evaluator`; the first rank's measures have the tags `replacement/...`, the others return none."""
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
        """None after each piece of work, and the measures in the end."""
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
