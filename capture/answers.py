"""Answers that the model itself gives, made before a capture is planned, because their lengths decide the plan.

They lie beside the store, in `<output>.answers/<hash of what decides them>`, one file per batch of prompts; workers
share the batches through leases as they share the units of a store, and a file that is there is never made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from dataclasses import dataclass as plain_dataclass

from pydantic import Field
from pydantic.dataclasses import dataclass

from clt.capture.models.adapter import ModelAdapter
from clt.capture.sources.examples import ExampleSource
from clt.capture.storage.base import Storage
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.committed_units import committed_units
from clt.capture.store.json_files import sealed, unsealed
from clt.capture.store.layout import commit_path
from clt.capture.writing.workers import Schedule, assigned_units
from clt.config import STRICT

#: Token ids of an answer, the end-of-sequence token included where it came.
Answer = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Generation:
    """How the model answers: greedily, so that the same job has the same answers."""

    max_new_tokens: int = Field(gt=0)
    """Most tokens of an answer."""


@plain_dataclass(frozen=True, kw_only=True)
class AnswerBatch:
    """Answers to some prompts.

    Attributes:
        samples: numbers of the examples.
        answers: token ids of each.
    """

    samples: tuple[int, ...]
    answers: tuple[Answer, ...]


@plain_dataclass(frozen=True, kw_only=True)
class _Batches:
    """The batches of a job, of which a file each is to be made."""

    storage: Storage
    n: int

    def pending(self) -> list[int]:
        return sorted(set(range(self.n)) - committed_units(self.storage))


def make_answers(
    adapter: ModelAdapter,
    source: ExampleSource,
    prompt_tokens: Sequence[int],
    generation: Generation,
    *,
    batch_size: int,
    output: str,
    schedule: Schedule,
) -> tuple[Answer, ...]:
    """Answers all prompts of a source, beside other workers and going on where earlier runs stopped.

    Args:
        adapter: the model.
        source: the examples; their own answers are not looked at.
        prompt_tokens: tokens of each prompt; prompts of similar length are run together.
        generation: how the model answers.
        batch_size: prompts that are run together.
        output: folder or URL of the store, beside which the answers are kept.
        schedule: this worker among others; each takes what is left, whatever its kind.

    Returns:
        Token ids of each answer. An image placeholder ends an answer and is left out: it cannot be read back.

    Raises:
        InputError: an example or an image cannot be read.
        StoreError: the answers cannot be read or written.
    """
    by_length = sorted(range(len(prompt_tokens)), key=lambda sample: (-prompt_tokens[sample], sample))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    model = (asdict(adapter.identity), str(adapter.dtype), adapter.end_ids)
    origin = repr((model, source.digest(), asdict(generation), batch_size))
    place = f"{output.rstrip('/')}.answers/{hashlib.sha256(origin.encode()).hexdigest()[:16]}"
    work = _Batches(storage=open_storage(place), n=len(batches))
    with closing(assigned_units(work, replace(schedule, kind="lease"))) as assigned:
        for number in assigned:
            record = _answer(adapter, source, batches[number], generation)
            work.storage.put(commit_path(number), sealed(record)[1])
    answers: dict[int, Answer] = {}
    for path in map(commit_path, range(work.n)):
        _, batch = unsealed(AnswerBatch, work.storage.read(path), work.storage.name(path))
        answers |= zip(batch.samples, batch.answers, strict=True)
    return tuple(answers[sample] for sample in range(len(prompt_tokens)))


def _answer(
    adapter: ModelAdapter, source: ExampleSource, samples: Sequence[int], generation: Generation
) -> AnswerBatch:
    examples = [source.load(sample) for sample in samples]
    inputs = adapter.collate([adapter.prepare(example.prompt, example.images) for example in examples])
    answers = adapter.generate(inputs, generation.max_new_tokens)
    image = adapter.image_token_id
    return AnswerBatch(
        samples=tuple(samples),
        answers=tuple(tuple(ids[: ids.index(image)] if image in ids else ids) for ids in answers),
    )
