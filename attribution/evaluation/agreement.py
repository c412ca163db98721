"""Agreement of the replacement model with the model: top-1 agreement, KL, cross-entropy and FVU of the logits.

Every MLP with a source is replaced, without error terms; attention and norms are live. Prompts have answers (teacher
forcing). Answer positions predict a token of the answer or its end; text positions are defined in `text_mask`.

    top1_agreement  fraction of positions with the same most likely token
    kl              mean over positions of KL(model || replacement), in nats
    ce_gap          cross-entropy of the answer's tokens in the replacement model minus in the model, mean, in nats
    fvu_logits      sum |d - d'|^2 / sum |d - mean d|^2 over answer positions, d the logits minus their mean over the
                    vocabulary (softmax is invariant to it), mean d over the positions
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

import torch
from torch import Tensor

from clt.attribution.replacement.replacement_model import ReplacementModel
from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.errors import InputError, NonFiniteError
from clt.records import Modality
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import target_layers
from clt.transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class Part:
    """A partial replacement: only the MLPs of some layers, or only at the tokens of some modalities, are replaced.

    Attributes:
        name: key in the report.
        targets: layers whose MLPs are replaced; None for all.
        modalities: tokens at which they are replaced; None for all.
    """

    name: str
    targets: tuple[int, ...] | None = None
    modalities: tuple[Modality, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PartAgreement:
    """Agreement of a partial replacement at answer positions; definitions in the module's docstring.

    Attributes:
        top1_agreement: fraction of positions.
        kl: nats.
        ce_gap: nats.
    """

    top1_agreement: float
    kl: float
    ce_gap: float


@dataclass(frozen=True, kw_only=True)
class AgreementReport:
    """Agreement of the replacement model with the model; definitions in the module's docstring.

    Attributes:
        num_prompts: prompts evaluated.
        num_answer_positions: positions that predict a token of an answer or its end.
        num_text_positions: text positions.
        top1_agreement: at answer positions.
        kl: at answer positions, nats.
        ce_gap: at answer positions, nats.
        fvu_logits: at answer positions; NaN when the model's logits are the same at all of them.
        text_top1_agreement: at text positions.
        text_kl: at text positions, nats.
        parts: partial replacements by name.
    """

    num_prompts: int
    num_answer_positions: int
    num_text_positions: int
    top1_agreement: float
    kl: float
    ce_gap: float
    fvu_logits: float
    text_top1_agreement: float
    text_kl: float
    parts: dict[str, PartAgreement] = field(default_factory=dict)


def evaluate_replacement(
    adapter: ModelAdapter, transcoder: CrossLayerTranscoder, inputs: Iterable[PromptInputs], batch_size: int = 32
) -> AgreementReport:
    """Compares the replacement model with the model on prompts with answers.

    Args:
        adapter: the model.
        transcoder: a transcoder trained on it.
        inputs: prompts from `adapter.prepare(prompt, images, answer)`, held out from training.
        batch_size: prompts per forward.

    Returns:
        The report; sums are float64.

    Raises:
        InputError: there is no prompt, or one has no answer.
        NonFiniteError: a logit is NaN or infinite.
        CheckpointError: the transcoder belongs to another model.
    """
    comparison = Comparison(ReplacementModel(adapter, transcoder))
    for batch in batched_prompts(adapter, inputs, batch_size):
        comparison.add(batch)
    return comparison.report()


class Comparison:
    """Compares a replacement model with its model, batch by batch.

    Args:
        replacement: the replacement model.
        parts: partial replacements to compare too, one more forward each.
    """

    def __init__(self, replacement: ReplacementModel, parts: Sequence[Part] = ()) -> None:
        self._replacement, self._num_prompts = replacement, 0
        self._answers, self._text = _Agreement(), _Agreement()
        self._parts = {part: _Agreement() for part in parts}

    @torch.no_grad()
    def add(self, batch: PromptInputs) -> None:
        """Adds a batch of prompts with answers.

        Raises:
            InputError: one has no answer.
            NonFiniteError: a logit is NaN or infinite.
        """
        at_answer, at_text = batch.answer_mask, text_mask(batch)
        unanswered = (~at_answer.any(1)).nonzero()
        if len(unanswered):
            raise InputError(
                f"prompt {batch.prompts[int(unanswered[0])]!r} has no answer; pass its answer to adapter.prepare"
            )
        next_NS = batch.tokens.token_id.long().roll(-1, dims=1)
        original_NSV, replaced_NSV = self._replacement.adapter.forward(batch), self._replacement.forward(batch)
        for agreement, mask_NS in ((self._answers, at_answer), (self._text, at_text)):
            agreement.add(original_NSV[mask_NS], replaced_NSV[mask_NS], next_NS[mask_NS])
        for part, agreement in self._parts.items():
            partly_NSV = self._replacement.forward_partly(batch, part.targets, part.modalities)
            agreement.add(original_NSV[at_answer], partly_NSV[at_answer], next_NS[at_answer])
        self._num_prompts += len(batch.prompts)

    def report(self) -> AgreementReport:
        """The report of all batches; InputError if there was none."""
        if self._num_prompts == 0:
            raise InputError("no prompts to evaluate; give at least one with its answer")
        answers, text = self._answers, self._text
        return AgreementReport(
            num_prompts=self._num_prompts,
            num_answer_positions=answers.count,
            num_text_positions=text.count,
            top1_agreement=answers.top1 / answers.count,
            kl=answers.kl / answers.count,
            ce_gap=answers.ce_gap / answers.count,
            fvu_logits=answers.fvu(),
            text_top1_agreement=text.top1 / text.count,
            text_kl=text.kl / text.count,
            parts={
                part.name: PartAgreement(
                    top1_agreement=found.top1 / found.count,
                    kl=found.kl / found.count,
                    ce_gap=found.ce_gap / found.count,
                )
                for part, found in self._parts.items()
            },
        )


def partial_replacements(config: CLTConfig, layer_ranges: int, has_images: bool) -> tuple[Part, ...]:
    """Partial replacements that locate disagreement: each range of layers alone, each modality alone.

    Args:
        config: architecture.
        layer_ranges: number of ranges of similar size into which the target layers are divided; 1 gives none.
        has_images: whether the prompts have image tokens.

    Returns:
        `only_layers_00_07` and so on, then `only_text` and `only_image` where there are images.
    """
    targets, parts = target_layers(config), []
    count = min(layer_ranges, len(targets))
    if count > 1:
        bounds = [len(targets) * number // count for number in range(count + 1)]
        ranges = [targets[first:stop] for first, stop in pairwise(bounds)]
        parts += [Part(name=f"only_layers_{own[0]:02d}_{own[-1]:02d}", targets=own) for own in ranges]
    if has_images:
        parts.append(Part(name="only_text", modalities=(Modality.TEXT,)))
        parts.append(Part(name="only_image", modalities=(Modality.IMAGE, Modality.IMAGE_SPECIAL)))
    return tuple(parts)


def text_mask(inputs: PromptInputs) -> Tensor:
    """[N,S] bool: text tokens of prompt and answer that another token follows, and a prompt's last token; not BOS."""
    mask = inputs.tokens.modality == Modality.TEXT
    mask[:, -1] &= inputs.answer_start == mask.shape[1]
    return mask


def same_top1(original_PV: Tensor, replaced_PV: Tensor) -> Tensor:
    """[P] bool: positions at which both logits have the same largest entry."""
    return original_PV.argmax(-1) == replaced_PV.argmax(-1)


def kl_divergence(original_PV: Tensor, replaced_PV: Tensor) -> Tensor:
    """KL(original || replaced) of the next-token distributions.

    Args:
        original_PV: [P,V] logits of the model.
        replaced_PV: [P,V] logits of the replacement model.

    Returns:
        [P] float64, nats.
    """
    log_p, log_q = original_PV.double().log_softmax(-1), replaced_PV.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass
class _Agreement:
    """Sums over positions; float64."""

    count: int = 0
    top1: int = 0
    kl: float = 0.0
    ce_gap: float = 0.0
    squared_error: float = 0.0
    squared: float = 0.0
    total_V: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, original_PV: Tensor, replaced_PV: Tensor, next_P: Tensor) -> None:
        kl_P = kl_divergence(original_PV, replaced_PV)
        if not bool(kl_P.isfinite().all()):
            raise NonFiniteError("logits of the model or of the replacement model are not finite (NaN or inf)")
        demeaned, other = (x.double() - x.double().mean(-1, keepdim=True) for x in (original_PV, replaced_PV))
        self.count += len(kl_P)
        self.top1 += int(same_top1(original_PV, replaced_PV).sum())
        self.kl += float(kl_P.sum())
        log_p, log_q = (x.double().log_softmax(-1).gather(1, next_P[:, None]) for x in (original_PV, replaced_PV))
        self.ce_gap += float((log_p - log_q).sum())
        self.squared_error += float((demeaned - other).square().sum())
        self.squared += float(demeaned.square().sum())
        self.total_V = self.total_V.to(demeaned) + demeaned.sum(0)

    def fvu(self) -> float:
        variation = self.squared - float(self.total_V.square().sum()) / self.count
        # Below the rounding of the two sums there is no variance to explain.
        if variation <= 1e-12 * self.squared:
            return float("nan")
        return self.squared_error / variation


def batched_prompts(adapter: ModelAdapter, inputs: Iterable[PromptInputs], size: int) -> Iterator[PromptInputs]:
    """Joins prompts into batches, one forward each.

    Args:
        adapter: the model.
        inputs: prompts.
        size: most batches of `inputs` joined into one.

    Yields:
        Batches, padded on the left.
    """
    source = iter(inputs)
    while batch := list(islice(source, size)):
        yield adapter.collate(batch)
