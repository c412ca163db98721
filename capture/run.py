"""Runs a model over examples and writes the inputs and outputs of its MLPs to a store.

`clt capture` and `launch/capture.py` call `capture_store`. The samples of a unit (`clt.capture.planning`) are run in batches
of similar length, padded on the left; padding is not stored. A restarted capture resumes with the units that are not
committed. Any number of workers may run on the same store: each takes the next free unit, and the first that finds all
of them committed completes the store.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from tqdm import tqdm

from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.hooks import attach
from clt.capture.planning import CaptureConfig, CaptureJob, captured_dtype, plan_capture
from clt.capture.writing.workers import assigned_units
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.errors import NonFiniteError
from clt.records import TokenTable

log = logging.getLogger(__name__)

#: Tokens whose moments standardise the channels of an int8 store; all of unit 0 if it has fewer.
_CALIBRATION_TOKENS = 8192


def capture_store(config: CaptureConfig, *, adapter: ModelAdapter | None = None, progress: bool = False) -> str | None:
    """Runs a capture, alone or together with other workers; resumes earlier runs of the same job.

    Args:
        config: the job.
        adapter: the model, if it is already loaded.
        progress: show a progress bar over samples.

    Returns:
        The id of the complete store; None if units are left that a static schedule assigns to others.

    Raises:
        ModelError: the model cannot be loaded.
        InputError: an example or an image cannot be read; its unit is not committed.
        NonFiniteError: an activation is NaN or infinite; its unit is not committed.
        StoreError: the output holds something else, or a committed file is missing.
        ConfigError: a sample does not fit into a unit, or chunk_tokens does not divide rows_per_unit.
    """
    job = plan_capture(config, adapter)
    writer = StoreWriter(config.output, job.spec, job.plan)
    pending = writer.pending()
    log.info("output=%s %s pending_units=%d", config.output, job.summary(), len(pending))
    if pending and not writer.calibrated:
        writer.calibrate(first_tokens(job))
    with tqdm(total=len(job.lengths), unit="sample", disable=not progress) as bar:
        bar.update(len(job.lengths) - sum(len(job.plan.samples(unit)) for unit in pending))
        with closing(assigned_units(writer, config.workers)) as units:
            for unit in units:
                writer.commit(unit, capture_samples(job, unit, job.plan.samples(unit), bar.update))
    return None if writer.pending() else writer.finalize()


def first_tokens(job: CaptureJob) -> dict[str, Tensor]:
    """Activations that calibrate an int8 store: the first tokens of unit 0, the same for every worker."""
    samples = job.plan.samples(0)
    ends = itertools.accumulate(job.lengths[sample] for sample in samples)
    n = next((i + 1 for i, end in enumerate(ends) if end >= _CALIBRATION_TOKENS), len(samples))
    return dict(capture_samples(job, 0, samples[:n]).acts)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Activations of a batch, its samples concatenated without padding.

    Attributes:
        acts: [n, sites, D], in the captured dtype.
        tokens: [n].
        answer_tokens: [samples] int64.
    """

    acts: Tensor
    tokens: TokenTable
    answer_tokens: Tensor


def capture_samples(
    job: CaptureJob, unit: int, samples: range, done: Callable[[int], object] = lambda n: None
) -> UnitData:
    """Runs the model over samples of a unit.

    Args:
        job: the capture.
        unit: number of the unit, for error messages.
        samples: samples of the unit: all or, for calibration, the first.
        done: called with the number of samples of each batch.

    Returns:
        Their activations [n, sites, D] and tokens [n], concatenated in the order of samples.

    Raises:
        InputError: an example or an image cannot be read.
        NonFiniteError: an activation is NaN or infinite.
    """
    lengths = torch.tensor([job.lengths[sample] for sample in samples])
    first_row = torch.cumsum(lengths, 0) - lengths
    (group,) = job.spec.groups
    acts = torch.zeros(int(lengths.sum()), len(group.sites), group.width, dtype=captured_dtype(job.adapter))
    answer_tokens = torch.zeros_like(lengths)
    rows, tables = [], []
    for batch in _batches(samples, job.lengths, job.spec.batch_size):
        ran, places = _run_batch(job, unit, batch), torch.tensor(batch) - samples.start
        rows.append(torch.cat([first_row[i] + torch.arange(int(lengths[i])) for i in places.tolist()]))
        acts[rows[-1]] = ran.acts
        answer_tokens[places] = ran.answer_tokens
        tables.append(ran.tokens)
        done(len(batch))
    joined = {f.name: torch.cat([getattr(table, f.name) for table in tables]) for f in fields(TokenTable)}
    return UnitData(
        acts={group.name: acts},
        tokens=TokenTable(**joined).select(torch.argsort(torch.cat(rows))),
        sample_ids=tuple(job.source.texts[sample].example_id for sample in samples),
        sample_tokens=tuple(lengths.tolist()),
        answer_tokens=tuple(answer_tokens.tolist()) if bool(answer_tokens.any()) else (),
    )


def _run_batch(job: CaptureJob, unit: int, batch: Sequence[int]) -> _Batch:
    adapter, prepared = job.adapter, []
    for sample in batch:
        example = job.source.load(sample)
        answer = example.answer if job.answers is None else job.answers[sample]
        prepared.append(adapter.prepare(example.prompt, example.images, answer))
    inputs = adapter.collate(prepared)
    lengths = torch.tensor([job.lengths[sample] for sample in batch])
    assert torch.equal(inputs.real_mask.sum(1).cpu(), lengths), "count_tokens and prepare agree"
    with torch.no_grad(), attach(adapter, read=job.spec.sites) as recorded:
        # Logits are not needed; with a large vocabulary they would cost more than the layers.
        adapter.model(**inputs.model_inputs, use_cache=False, logits_to_keep=1)
    dtype = captured_dtype(adapter)
    # On the CPU, since layers may be on other devices than the inputs.
    real_mask = inputs.real_mask.cpu()
    kept = [recorded[site][real_mask].to(dtype).cpu() for site in job.spec.sites]
    tokens = TokenTable(**{n: value.cpu()[real_mask] for n, value in vars(inputs.tokens).items()})
    tokens = replace(tokens, sample=torch.tensor(batch).repeat_interleave(lengths))
    for site, values in zip(job.spec.sites, kept, strict=True):
        rounded = values.bfloat16() if job.spec.store_dtype == "bfloat16" else values
        if not bool(rounded.isfinite().all()):
            # The first such row identifies the sample, not the token: attention spreads NaN over the whole sample.
            sample = int(tokens.sample[int((~rounded.isfinite()).any(1).nonzero()[0])])
            raise NonFiniteError(
                f"unit {unit}: {site} is not finite in sample {sample} ('{job.source.texts[sample].example_id}'); the "
                f"unit is not committed, remove the sample or use a wider dtype"
            )
    answers = inputs.tokens.modality.shape[1] - inputs.answer_start.cpu()
    return _Batch(acts=torch.stack(kept, dim=1), tokens=tokens, answer_tokens=answers)


def _batches(samples: range, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of similar length, to pad little; longest first, so that memory runs out at the start if at all."""
    by_length = sorted(samples, key=lambda sample: (-lengths[sample], sample))
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]
