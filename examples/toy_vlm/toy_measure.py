"""Teacher-forcing batches of toy samples, and accuracy of a model on them.

Used by `train.py` for the loss and for the accuracies in the README.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from clt.capture.sources.toy import GRID, ToySample, draw


@dataclass(frozen=True, kw_only=True)
class Batch:
    """N samples, padded on the left so that all answers end in the last column.

    Attributes:
        inputs: input_ids and attention_mask [N,T] int64, pixel_values [N,3,P,P] float32.
        labels: [N,A] int64, the answer and the end-of-sequence token in the last A columns, -100 elsewhere.
    """

    inputs: dict[str, Tensor]
    labels: Tensor


def make_batch(processor: LlavaProcessor, samples: Sequence[ToySample]) -> Batch:
    """Teacher-forcing inputs of samples: the prompt as processed by `processor`, then the answer and </s>."""
    tokenizer = processor.tokenizer
    expanded = [s.prompt.replace("<image>", "<image>" * (GRID * GRID)) for s in samples]
    prompts = tokenizer(expanded)["input_ids"]
    answers = tokenizer([s.answer for s in samples], add_special_tokens=False)["input_ids"]
    answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width, kept = max(map(len, rows)), max(map(len, answers))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), kept), -100)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids[i, width - len(row) :] = torch.tensor(row)
        labels[i, kept - len(answer) :] = torch.tensor(answer)
    mask = (ids != tokenizer.pad_token_id).long()
    pixels = _pixel_values(processor, samples)
    return Batch(inputs={"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, labels=labels)


def answer_logits(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """Logits [N,A,V] that predict the columns of `batch.labels`."""
    kept = batch.labels.shape[1]
    return model(**batch.inputs, use_cache=False, logits_to_keep=kept + 1).logits[:, :-1]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of a model on a set of samples.

    Attributes:
        samples: number of samples.
        accuracy: share whose greedy answer is exactly the correct one, up to and including </s>.
        bias: share whose greedy answer is that of the logo; None if no sample has a logo.
        mean_probability: probability of the correct token, mean over all answer positions.
        confident: share of answer positions at which the correct token has probability above 0.9.
    """

    samples: int
    accuracy: float
    bias: float | None
    mean_probability: float
    confident: float


@torch.no_grad()
def answer_probabilities(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, samples: Sequence[ToySample]
) -> tuple[Tensor, Tensor]:
    """Probabilities of given answers.

    Args:
        model: in evaluation mode.
        processor: its processor.
        samples: questions with answers.

    Returns:
        [N] bool, whether greedy decoding gives exactly the answer and </s>; and the conditional probability of each
        answer token, float64, samples concatenated.
    """
    exact, probabilities = [], []
    for start in range(0, len(samples), 100):
        batch = make_batch(processor, samples[start : start + 100])
        logits = answer_logits(model, batch)
        real = batch.labels != -100
        exact.append(((logits.argmax(-1) == batch.labels) | ~real).all(1))
        of_label = log_softmax(logits.double(), -1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        probabilities.append(of_label[real].exp())
    return torch.cat(exact), torch.cat(probabilities)


def measure(model: LlavaForConditionalGeneration, processor: LlavaProcessor, samples: Sequence[ToySample]) -> Score:
    """Scores of a model on samples.

    Args:
        model: the model; its training mode is restored afterwards.
        processor: its processor.
        samples: questions with correct answers.

    Returns:
        Accuracy, bias and probabilities.
    """
    training = model.training
    model.eval()
    exact, probability = answer_probabilities(model, processor, samples)
    biased = [replace(sample, answer=sample.expected_bias) for sample in samples if sample.expected_bias is not None]
    bias = float(answer_probabilities(model, processor, biased)[0].double().mean()) if biased else None
    model.train(training)
    return Score(
        samples=len(samples),
        accuracy=float(exact.double().mean()),
        bias=bias,
        mean_probability=float(probability.mean()),
        confident=float((probability > 0.9).double().mean()),
    )


def _pixel_values(processor: LlavaProcessor, samples: Sequence[ToySample]) -> Tensor:
    """[N,3,P,P]; rescaled and normalised as by the processor, without its cost per image (a test compares them)."""
    settings = processor.image_processor
    pixels = np.stack([np.asarray(draw(s.scene)) for s in samples]).astype(np.float32) * settings.rescale_factor
    pixels = (pixels - np.float32(settings.image_mean)) / np.float32(settings.image_std)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
