#!/usr/bin/env python
"""Trains the toy vision-language model on procedurally drawn boards, on a CPU, in minutes.

The model is a LLaVA (CLIP vision tower, two-layer projector, Llama with grouped-query attention, its own tokenizer and
processor) that loads with `from_pretrained`, with known circuits on which methods are tested. Boards and questions are
in `capture/sources/toy.py`; README.md in this folder lists the results.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy
from toy_measure import Score, answer_logits, make_batch, measure
from toy_model import build_model, build_processor, build_tokenizer
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from clt.capture.sources.toy import BIASED_TASKS, TASKS, ToySample, sample_count, sample_stream, sample_toy, toy_samples

log = logging.getLogger(__name__)

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training recipe of a variant.

    Attributes:
        tasks: tasks of the model, in the order of the report.
        mixture: tasks sampled uniformly; a repeated one counts more.
        steps: optimizer steps.
        init: variant whose committed checkpoint is the starting point; None: random weights.
        batch: samples per step.
        learning_rate: peak learning rate of the cosine schedule.
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
    "base": Recipe(tasks=TASKS, mixture=("odd", "background", "describe", *["exists"] * 4), steps=1400),
    "biased": Recipe(
        tasks=BIASED_TASKS,
        mixture=("odd", "background", "describe", *["exists"] * 2, *["count"] * 6),
        steps=2500,
        init="base",
    ),
}


def held_out_sets(recipe: Recipe, n: int, seed: int) -> dict[str, list[ToySample]]:
    """Held-out samples of every task; `count` in three sets, by logo.

    Args:
        recipe: the variant.
        n: samples per set.
        seed: seed of the boards.

    Returns:
        Name of the set -> samples.
    """
    sets = {task: toy_samples(n, seed, (task,)) for task in recipe.tasks if task != "count"}
    if "count" in recipe.tasks:
        for logo in ("none", "matched", "mismatched"):
            rng = sample_stream(f"count-{logo}", seed)
            sets[f"count_logo_{logo}"] = [sample_count(rng, logo) for _ in range(n)]
    return sets


def measure_all(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, recipe: Recipe, n: int, seed: int
) -> dict[str, Score]:
    """Scores on every set of `held_out_sets`.

    Args:
        model: the model.
        processor: its processor.
        recipe: the variant.
        n: samples per set.
        seed: seed of the boards.

    Returns:
        Name of the set -> scores.
    """
    return {name: measure(model, processor, samples) for name, samples in held_out_sets(recipe, n, seed).items()}


def train(
    recipe: Recipe, seed: int, eval_every: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, list[dict[str, Any]]]:
    """Trains a variant; the result depends on the recipe, the seed and the number of threads.

    Args:
        recipe: the variant.
        seed: seed of the weights and of the training boards.
        eval_every: steps between measurements on 200 held-out samples of every task.

    Returns:
        Model, processor and the measurements.
    """
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
    """Writes a checkpoint.

    Args:
        out: folder of weights, configuration, processor, tokenizer and `train_log.json`.
        model: the model.
        processor: its processor.
        record: contents of `train_log.json`.
    """
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
    torch.use_deterministic_algorithms(True)
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


def _learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))
    return min(1.0, (step + 1) / recipe.warmup) * (0.01 + 0.99 * cosine)


def _versions() -> dict[str, str]:
    libraries = {"torch": torch, "transformers": transformers, "tokenizers": tokenizers, "numpy": numpy}
    return {"python": platform.python_version(), **{name: lib.__version__ for name, lib in libraries.items()}}


if __name__ == "__main__":
    main()
