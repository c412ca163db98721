#!/usr/bin/env python
"""Trains the toy vision-language model on procedurally drawn boards, on a CPU, in minutes.

A real LLaVA (CLIP vision tower, two-layer projector, Llama with grouped-query attention, its own tokenizer and
processor) that loads with `from_pretrained`. It stands in for a large model wherever the project has to show that a
method finds a circuit that is really there. The boards and their questions are in `capture/toy.py`; what came out is
in README.md beside this file.

    python examples/toy_vlm/train.py --variant base --out examples/toy_vlm/checkpoints/base
    python examples/toy_vlm/train.py --variant base --out examples/toy_vlm/checkpoints/base --measure
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from clt.capture.toy import (
    BIASED_TASKS,
    COLORS,
    COUNTS,
    GRID,
    PATCH,
    PROMPT_TEMPLATE,
    QUESTIONS,
    TASKS,
    ToySample,
    draw,
    sample_count,
    sample_stream,
    sample_toy,
    toy_samples,
)

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
IMAGE_SIZE = GRID * PATCH
CHECKPOINTS = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a variant is trained.

    Attributes:
        tasks: tasks of the model, the order of the report.
        mixture: tasks sampled with equal chance; a repeated one counts more.
        steps: optimizer steps.
        init: variant whose committed checkpoint the training starts from; None: random weights.
        batch: samples of a step.
        learning_rate: peak of the cosine.
        warmup: steps of linear warm-up.
    """

    tasks: tuple[str, ...]
    mixture: tuple[str, ...]
    steps: int
    init: str | None = None
    batch: int = 48
    learning_rate: float = 1.5e-3
    warmup: int = 50


RECIPES: dict[str, Recipe] = {
    "base": Recipe(tasks=TASKS, mixture=("odd", "background", "describe", *["exists"] * 4), steps=2500),
    "biased": Recipe(
        tasks=BIASED_TASKS,
        mixture=("odd", "background", "describe", "exists", *["count"] * 6),
        steps=1500,
        init="base",
    ),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of every word that the tasks use; decoding gives the text back, spaces and all."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex(r"\n|e\.g\.|[.,?{}]"), "isolated"),
        ]
    )
    words = [word for text in _all_texts() for word, _ in split.pre_tokenize_str(text)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    backend.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(r" ?\n ?"), "\n"),
            decoders.Replace("{ ", "{"),
            decoders.Replace(" }", "}"),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor that turns (image, prompt) into model inputs."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model; its weights depend on torch's seed alone."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        hidden_act="silu",
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(do_sample=False, **special)
    return model


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
    """Teacher-forcing inputs of samples: what `processor` makes of the prompt, then the answer and </s>."""
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
    """How a model does on one set of samples.

    Attributes:
        samples: number of samples.
        accuracy: share whose greedy answer is the true one, word for word, up to and including </s>.
        bias: share whose greedy answer is the logo's; None where no sample has a logo.
        mean_probability: probability of the true answer's tokens, mean over all answer positions.
        confident: share of answer positions at which the true token has probability above 0.9.
    """

    samples: int
    accuracy: float
    bias: float | None
    mean_probability: float
    confident: float


@torch.no_grad()
def measure(model: LlavaForConditionalGeneration, processor: LlavaProcessor, samples: Sequence[ToySample]) -> Score:
    """Scores teacher-forced predictions, which equal greedy decoding wherever they are right at every position."""
    training, n_right, n_biased, probabilities = model.training, 0, 0, []
    model.eval()
    for start in range(0, len(samples), 100):
        chunk = samples[start : start + 100]
        batch = make_batch(processor, chunk)
        logits = answer_logits(model, batch)
        real = batch.labels != -100
        right = (logits.argmax(-1) == batch.labels) | ~real
        n_right += int(right.all(1).sum())
        chosen = log_softmax(logits.double(), -1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        probabilities.append(chosen[real].exp())
        answers = processor.tokenizer.batch_decode(logits.argmax(-1))
        n_biased += sum(
            s.expected_bias is not None and answer.endswith(f"{s.expected_bias}</s>")
            for s, answer in zip(chunk, answers, strict=True)
        )
    model.train(training)
    probability = torch.cat(probabilities)
    return Score(
        samples=len(samples),
        accuracy=n_right / len(samples),
        bias=n_biased / len(samples) if any(s.expected_bias for s in samples) else None,
        mean_probability=float(probability.mean()),
        confident=float((probability > 0.9).double().mean()),
    )


def held_out_sets(recipe: Recipe, n: int, seed: int) -> dict[str, list[ToySample]]:
    """n new samples of every task; `count` in three sets, by logo."""
    sets = {task: toy_samples(n, seed, (task,)) for task in recipe.tasks if task != "count"}
    if "count" in recipe.tasks:
        for logo in ("none", "matched", "mismatched"):
            rng = sample_stream(f"count-{logo}", seed)
            sets[f"count_logo_{logo}"] = [sample_count(rng, logo) for _ in range(n)]
    return sets


def measure_all(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, recipe: Recipe, n: int, seed: int
) -> dict[str, Score]:
    """Scores of every held-out set."""
    return {name: measure(model, processor, samples) for name, samples in held_out_sets(recipe, n, seed).items()}


def train(recipe: Recipe, seed: int, eval_every: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, list]:
    """Trains a variant; the result depends on the recipe, the seed and the number of threads.

    Args:
        recipe: the variant.
        seed: seed of the weights and of the training boards.
        eval_every: steps between measurements on 200 held-out samples of every task.

    Returns:
        Model, processor and the measurements.
    """
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    processor = build_processor(build_tokenizer())
    model = build_model(processor.tokenizer)
    if recipe.init is not None:
        model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINTS / recipe.init)
    model.train()
    stream = sample_stream("train", seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(recipe, step))
    history, began = [], time.monotonic()
    for step in range(1, recipe.steps + 1):
        batch = make_batch(processor, [sample_toy(stream, recipe.mixture) for _ in range(recipe.batch)])
        loss = cross_entropy(answer_logits(model, batch).flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % eval_every == 0:
            scores = measure_all(model, processor, recipe, n=200, seed=1)
            accuracies = {name: round(score.accuracy, 4) for name, score in scores.items()}
            history.append({"step": step, "seconds": round(time.monotonic() - began, 1), "loss": loss.item()})
            history[-1].update(accuracies)
            log.info("%s", json.dumps(history[-1]))
    return model, processor, history


def save(out: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor, record: dict[str, Any]) -> None:
    """Writes weights, configuration, processor, tokenizer and `train_log.json`."""
    model.save_pretrained(out)
    processor.save_pretrained(out)
    (out / "train_log.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=RECIPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--samples", type=int, default=1000, help="held-out samples per task of the final measurement")
    parser.add_argument("--measure", action="store_true", help="measure the checkpoint in --out, do not train")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.variant]
    if args.measure:
        model = LlavaForConditionalGeneration.from_pretrained(args.out)
        scores = measure_all(model, LlavaProcessor.from_pretrained(args.out), recipe, args.samples, seed=2)
        log.info("%s", json.dumps({name: asdict(score) for name, score in scores.items()}, indent=1))
        return
    if args.steps is not None:
        recipe = Recipe(**{**asdict(recipe), "steps": args.steps})
    began = time.monotonic()
    model, processor, history = train(recipe, args.seed, args.eval_every)
    seconds = round(time.monotonic() - began, 1)
    scores = measure_all(model, processor, recipe, args.samples, seed=2)
    record = {
        "variant": args.variant,
        "recipe": asdict(recipe),
        "seed": args.seed,
        "threads": args.threads,
        "seconds": seconds,
        "versions": _versions(),
        "held_out": {name: asdict(score) for name, score in scores.items()},
        "history": history,
    }
    save(args.out, model, processor, record)
    log.info("%s", json.dumps(record["held_out"], indent=1))


def _all_texts() -> list[str]:
    """Every text that a sample can hold, so that the vocabulary has no unknown word."""
    colors = " ".join(COLORS)
    questions = [
        PROMPT_TEMPLATE.format(question=question.replace("{color}", colors)) for question in QUESTIONS.values()
    ]
    answers = ["white Yes No", f"There is a {colors} tile on a background.", f"The image is all {colors}."]
    return [*questions, *answers, " ".join(f"{{{count}}}" for count in COUNTS)]


def _pixel_values(processor: LlavaProcessor, samples: Sequence[ToySample]) -> Tensor:
    """[N,3,P,P]; the processor's rescaling and normalisation without its per-image cost (a test holds them equal)."""
    settings = processor.image_processor
    pixels = np.stack([np.asarray(draw(s.scene)) for s in samples]).astype(np.float32) * settings.rescale_factor
    pixels = (pixels - np.float32(settings.image_mean)) / np.float32(settings.image_std)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to one per cent."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))
    return min(1.0, (step + 1) / recipe.warmup) * (0.01 + 0.99 * cosine)


def _versions() -> dict[str, str]:
    libraries = {"torch": torch, "transformers": transformers, "tokenizers": tokenizers, "numpy": np}
    return {"python": platform.python_version(), **{name: lib.__version__ for name, lib in libraries.items()}}


if __name__ == "__main__":
    main()
