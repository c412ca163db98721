"""How far the replacement model agrees with the model: top-1 agreement, KL and FVU of the logits.

Every MLP with a source is replaced, there are no error terms, attention and norms are live: the demanding reading of
"the transcoder explains the model". Prompts carry their answers (teacher forcing). A position counts at its prediction:

* answer positions predict the answer's tokens and the end of sequence;
* text positions are all text tokens, of prompt and answer, that another token follows; the last token of a prompt
  without answer counts too, and a beginning-of-sequence token does not.

    top1_agreement  share of positions with the same most likely token
    kl              mean over positions of KL(model || replacement), in nats
    fvu_logits      sum |d - d'|^2 / sum |d - mean d|^2 over answer positions, d the logits minus their mean over the
                    vocabulary (softmax does not see that mean), mean d over the positions
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from clt.attribution.replacement import ReplacementModel
from clt.capture.adapter import ModelAdapter, PromptInputs
from clt.errors import InputError, NonFiniteError
from clt.model import CrossLayerTranscoder
from clt.records import Modality


@dataclass(frozen=True, kw_only=True)
class AgreementReport:
    """Agreement of the replacement model with the model; definitions in the module's text.

    Attributes:
        num_prompts: prompts evaluated.
        num_answer_positions: positions that predict an answer's token or its end.
        num_text_positions: text positions.
        top1_agreement: at answer positions.
        kl: at answer positions, nats.
        fvu_logits: at answer positions; NaN when the model's logits are the same at all of them.
        text_top1_agreement: at text positions.
        text_kl: at text positions, nats.
    """

    num_prompts: int
    num_answer_positions: int
    num_text_positions: int
    top1_agreement: float
    kl: float
    fvu_logits: float
    text_top1_agreement: float
    text_kl: float


def evaluate_replacement(
    adapter: ModelAdapter, clt: CrossLayerTranscoder, inputs: Iterable[PromptInputs], batch_size: int = 32
) -> AgreementReport:
    """Compares the replacement model with the model on prompts with answers.

    Args:
        adapter: the model.
        clt: a transcoder trained on it.
        inputs: prompts from `adapter.prepare(prompt, images, answer)`, held out from training.
        batch_size: batches from `inputs` joined for one forward.

    Returns:
        The report; sums are float64.

    Raises:
        InputError: there is no prompt, or one has no answer.
        NonFiniteError: a logit is NaN or infinite.
        CheckpointError: the transcoder belongs to another model.
    """
    replacement = ReplacementModel(adapter, clt)
    answers, text, num_prompts = _Agreement(), _Agreement(), 0
    for batch in _batches(adapter, inputs, batch_size):
        at_answer = batch.answer_mask
        unanswered = (~at_answer.any(1)).nonzero()
        if len(unanswered):
            raise InputError(f"prompt {batch.prompts[int(unanswered[0])]!r} has no answer; prepare it with its answer")
        with torch.no_grad():
            original_NSV, replaced_NSV = adapter.forward(batch), replacement.forward(batch)
        for agreement, mask_NS in ((answers, at_answer), (text, text_mask(batch))):
            agreement.add(original_NSV[mask_NS], replaced_NSV[mask_NS])
        num_prompts += len(batch.prompts)
    if num_prompts == 0:
        raise InputError("no prompts to evaluate; give at least one with its answer")
    return AgreementReport(
        num_prompts=num_prompts,
        num_answer_positions=answers.count,
        num_text_positions=text.count,
        top1_agreement=answers.top1 / answers.count,
        kl=answers.kl / answers.count,
        fvu_logits=answers.fvu(),
        text_top1_agreement=text.top1 / text.count,
        text_kl=text.kl / text.count,
    )


def text_mask(inputs: PromptInputs) -> Tensor:
    """[N,S] bool: text tokens whose prediction is used, all but the end of an answer."""
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
    squared_error: float = 0.0
    squared: float = 0.0
    total_V: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, original_PV: Tensor, replaced_PV: Tensor) -> None:
        kl_P = kl_divergence(original_PV, replaced_PV)
        if not bool(kl_P.isfinite().all()):
            raise NonFiniteError("logits of the model or of the replacement model are not finite")
        demeaned, other = (x.double() - x.double().mean(-1, keepdim=True) for x in (original_PV, replaced_PV))
        self.count += len(kl_P)
        self.top1 += int(same_top1(original_PV, replaced_PV).sum())
        self.kl += float(kl_P.sum())
        self.squared_error += float((demeaned - other).square().sum())
        self.squared += float(demeaned.square().sum())
        self.total_V = self.total_V.to(demeaned) + demeaned.sum(0)

    def fvu(self) -> float:
        variation = self.squared - float(self.total_V.square().sum()) / self.count
        # Below rounding of the two sums there is no variation to explain.
        if variation <= 1e-12 * self.squared:
            return float("nan")
        return self.squared_error / variation


def _batches(adapter: ModelAdapter, inputs: Iterable[PromptInputs], size: int) -> Iterator[PromptInputs]:
    source = iter(inputs)
    while batch := list(islice(source, size)):
        yield adapter.collate(batch)
