"""Capture: runs a model over examples and writes what its MLPs read and add into a store.

`capture` is what `clt capture` and `launch/capture.py` call. Samples are packed into units by their token counts before
the first forward pass; a unit is run in batches of similar length, padded on the left, and padding is never stored.
A capture that is started again goes on with the units that are not committed, and any number of workers may be started
on the same store: each takes the next free unit, and whoever finds all of them committed completes the store.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields, replace

import torch
import transformers
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from clt.capture.adapter import ModelAdapter
from clt.capture.answers import Answer, Generation, make_answers
from clt.capture.arrays import Compression
from clt.capture.choice import ModelChoice
from clt.capture.examples import ExampleSource, SourceSettings, open_source, text_digest
from clt.capture.hooks import attach
from clt.capture.order import pack_units
from clt.capture.rows import TORCH_DTYPES
from clt.capture.schema import SCHEMA_VERSION, CapturePlan, SiteGroup, StoreDtype, StoreSpec
from clt.capture.workers import Schedule, assigned_units
from clt.capture.writer import StoreWriter, UnitData
from clt.config import STRICT, ReadSite
from clt.errors import ConfigError, NonFiniteError
from clt.records import TokenTable
from clt.version import code_version

log = logging.getLogger(__name__)

#: A block, which is read together, is at most so many bytes of activations; a unit, which is held in memory, so many.
_BLOCK_BYTES = 8 << 20
_UNIT_BYTES = 2 << 30
_CHUNK_TOKENS = (32, 1024)
_MAX_ROWS_PER_UNIT = 65_536
#: An int8 store standardises channels by the moments of so many tokens, or of unit 0 if it has fewer.
_CALIBRATION_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CaptureConfig(ModelChoice):
    """One capture job."""

    output: str
    """Folder or URL of the store; it is made, or gone on with if it holds an unfinished store of the same job."""
    source: SourceSettings
    """Where the examples come from."""
    generate: Generation | None = None
    """The model answers each prompt itself, and prompt and answer are captured; absent: the answers of the source."""
    read_site: ReadSite = "resid_mid"
    """What transcoders will read; stored for every layer beside `mlp_out`."""
    store_dtype: StoreDtype = "bfloat16"
    """Type of the stored values; int8 halves bfloat16, the error it makes is in the manifest."""
    compression: Compression = "none"
    """Lossless compression of the stored values; zstd saves a fifth of bfloat16 and reads several times slower."""
    batch_size: int = Field(default=32, gt=0)
    """Prompts per forward pass."""
    rows_per_unit: int | None = Field(default=None, gt=0)
    """Most tokens of a unit, the piece that is written and committed as a whole; absent: up to 65,536 in 2 GiB."""
    chunk_tokens: int | None = Field(default=None, gt=0)
    """Tokens that are read together; must divide rows_per_unit; absent: a power of two that makes up to 8 MiB."""
    seed: int = 0
    """Seed of the order of tokens within units."""
    workers: Schedule = Schedule()
    """Which units this process takes."""


@plain_dataclass(frozen=True, kw_only=True)
class CaptureJob:
    """A capture that has been planned.

    Attributes:
        adapter: the model.
        source: the examples.
        lengths: tokens of each example.
        answers: what the model answered to each; None: the answers of the source.
        spec: what the store will hold.
        plan: which samples each unit holds.
    """

    adapter: ModelAdapter
    source: ExampleSource
    lengths: tuple[int, ...]
    answers: tuple[Answer, ...] | None
    spec: StoreSpec
    plan: CapturePlan

    @property
    def bytes_per_token(self) -> int:
        """Bytes of stored activations per token."""
        return self.spec.bytes_per_token

    @property
    def memory_bytes(self) -> int:
        """Most memory that a unit takes: its activations as captured and, where they differ, as stored."""
        rows = min(self.spec.rows_per_unit, max(self.plan.unit_tokens))
        values = rows * sum(len(group.sites) * group.width for group in self.spec.groups)
        captured = _captured_dtype(self.adapter).itemsize
        stored = TORCH_DTYPES[self.spec.store_dtype]
        return values * (captured + (stored.itemsize if stored != _captured_dtype(self.adapter) else 0))

    def summary(self) -> str:
        """What the job will write, in one line."""
        tokens = sum(self.plan.unit_tokens)
        return (
            f"{len(self.lengths)} samples, {tokens} tokens, {self.plan.n_units} units of up to "
            f"{self.spec.rows_per_unit} tokens, {len(self.spec.sites)} sites of {self.spec.model.d_model}, "
            f"{tokens * self.bytes_per_token / 2**20:.1f} MiB"
        )


def plan_capture(
    config: CaptureConfig, adapter: ModelAdapter | None = None, *, longest_answers: bool = False
) -> CaptureJob:
    """Loads the model and decides what goes where; writes nothing, and runs the model only for `generate`.

    Args:
        config: the job.
        adapter: the model, if it is loaded already.
        longest_answers: take every answer that is to be generated for as long as it may be, and generate none; the job
            then tells sizes and cannot be run.

    Returns:
        The planned job.

    Raises:
        ModelError: the model cannot be loaded.
        InputError: the examples cannot be read, or do not fit the model.
        ConfigError: a sample does not fit into a unit, or chunk_tokens does not divide rows_per_unit.
    """
    adapter = adapter or config.load()
    source = open_source(config.source)
    lengths, answers = _lengths(config, adapter, source, longest_answers)
    sites = tuple(f"lm.{layer}.{kind}" for kind in (config.read_site, "mlp_out") for layer in range(adapter.n_layers))
    group = SiteGroup(name="lm", sites=sites, width=adapter.d_model)
    rows, chunk = _sizes(config, len(sites) * adapter.d_model * TORCH_DTYPES[config.store_dtype].itemsize)
    starts = pack_units(lengths, rows)
    plan = CapturePlan(
        sample_starts=starts,
        unit_tokens=tuple(sum(lengths[a:b]) for a, b in itertools.pairwise(starts)),
    )
    spec = StoreSpec(
        schema_version=SCHEMA_VERSION,
        created_by=f"clt {code_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        model=adapter.identity,
        model_dtype=str(adapter.dtype).removeprefix("torch."),
        groups=(group,),
        store_dtype=config.store_dtype,
        compression=config.compression,
        rows_per_unit=rows,
        chunk_tokens=chunk,
        batch_size=config.batch_size,
        seed=config.seed,
        source=source.digest() if answers is None else text_digest([source.digest(), repr(answers)]),
    )
    return CaptureJob(adapter=adapter, source=source, lengths=lengths, answers=answers, spec=spec, plan=plan)


def capture(config: CaptureConfig, *, adapter: ModelAdapter | None = None, progress: bool = False) -> str | None:
    """Runs a capture, going on where earlier runs of the same job stopped and beside others that run now.

    Args:
        config: the job.
        adapter: the model, if it is loaded already.
        progress: show a progress bar over samples.

    Returns:
        The id of the complete store at `config.output`; None if units are left that a static schedule gives to others.

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
    log.info("%s: %s; %d units to go", config.output, job.summary(), len(pending))
    if pending and not writer.calibrated:
        writer.calibrate(first_tokens(job))
    with tqdm(total=len(job.lengths), unit="sample", disable=not progress) as bar:
        bar.update(len(job.lengths) - sum(len(job.plan.samples(unit)) for unit in pending))
        with closing(assigned_units(writer, config.workers)) as units:
            for unit in units:
                writer.commit(unit, capture_samples(job, unit, job.plan.samples(unit), bar.update))
    return None if writer.pending() else writer.finalize()


def first_tokens(job: CaptureJob) -> dict[str, Tensor]:
    """Activations by which an int8 store is calibrated, whichever worker does: some thousand tokens of unit 0."""
    samples = job.plan.samples(0)
    ends = itertools.accumulate(job.lengths[sample] for sample in samples)
    n = next((i + 1 for i, end in enumerate(ends) if end >= _CALIBRATION_TOKENS), len(samples))
    return dict(capture_samples(job, 0, samples[:n]).acts)


def capture_samples(
    job: CaptureJob, unit: int, samples: range, done: Callable[[int], object] = lambda n: None
) -> UnitData:
    """Runs the model over samples of a unit.

    Args:
        job: the capture.
        unit: number of the unit, for error messages.
        samples: all samples of the unit or, for calibration, the first.
        done: called with the number of samples of each batch.

    Returns:
        Their activations and tokens, laid end to end.

    Raises:
        InputError: an example or an image cannot be read.
        NonFiniteError: an activation is NaN or infinite.
    """
    lengths = torch.tensor([job.lengths[sample] for sample in samples])
    first_row = torch.cumsum(lengths, 0) - lengths
    (group,) = job.spec.groups
    acts = torch.zeros(int(lengths.sum()), len(group.sites), group.width, dtype=_captured_dtype(job.adapter))
    rows, tables = [], []
    for batch in _batches(samples, job.lengths, job.spec.batch_size):
        values, tokens = _run_batch(job, unit, batch)
        rows.append(torch.cat([first_row[s - samples.start] + torch.arange(job.lengths[s]) for s in batch]))
        acts[rows[-1]] = values
        tables.append(tokens)
        done(len(batch))
    joined = {f.name: torch.cat([getattr(table, f.name) for table in tables]) for f in fields(TokenTable)}
    return UnitData(
        acts={group.name: acts},
        tokens=TokenTable(**joined).select(torch.argsort(torch.cat(rows))),
        sample_ids=tuple(job.source.texts[sample].example_id for sample in samples),
        sample_tokens=tuple(lengths.tolist()),
    )


def _run_batch(job: CaptureJob, unit: int, batch: Sequence[int]) -> tuple[Tensor, TokenTable]:
    """Activations [n, sites, D] and tokens [n] of some samples, sample by sample, without padding."""
    adapter, prepared = job.adapter, []
    for sample in batch:
        example = job.source.load(sample)
        answer = example.answer if job.answers is None else job.answers[sample]
        prepared.append(adapter.prepare(example.prompt, example.images, answer))
    inputs = adapter.collate(prepared)
    lengths = torch.tensor([job.lengths[sample] for sample in batch])
    assert torch.equal(inputs.real_mask.sum(1).cpu(), lengths), "count_tokens and prepare agree"
    with torch.no_grad(), attach(adapter, read=job.spec.sites) as recorded:
        # No logits are needed, and with a large vocabulary they would cost more than the layers.
        adapter.model(**inputs.model_inputs, use_cache=False, logits_to_keep=1)
    dtype = _captured_dtype(adapter)
    # On the CPU, because layers may lie on other devices than the inputs.
    real_mask = inputs.real_mask.cpu()
    kept = [recorded[site][real_mask].to(dtype).cpu() for site in job.spec.sites]
    tokens = TokenTable(**{n: value.cpu()[real_mask] for n, value in vars(inputs.tokens).items()})
    tokens = replace(tokens, sample=torch.tensor(batch).repeat_interleave(lengths))
    for site, values in zip(job.spec.sites, kept, strict=True):
        rounded = values.bfloat16() if job.spec.store_dtype == "bfloat16" else values
        if not bool(rounded.isfinite().all()):
            # The first bad row says which sample it is, not which token: attention spreads NaN over its whole sample.
            sample = int(tokens.sample[int((~rounded.isfinite()).any(1).nonzero()[0])])
            raise NonFiniteError(
                f"unit {unit}: {site} is not finite in sample {sample} ('{job.source.texts[sample].example_id}'); the "
                f"unit is not committed, remove the sample or use a wider dtype"
            )
    return torch.stack(kept, dim=1), tokens


def _batches(samples: range, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Samples of similar length together, so that little is padded; longest first, so that memory runs out early."""
    by_length = sorted(samples, key=lambda sample: (-lengths[sample], sample))
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def _lengths(
    config: CaptureConfig, adapter: ModelAdapter, source: ExampleSource, longest_answers: bool
) -> tuple[tuple[int, ...], tuple[Answer, ...] | None]:
    """Tokens of each sample, and the answers if the model gives them."""
    samples, generation = range(len(source.texts)), config.generate
    if generation is None:
        return tuple(_count_tokens(adapter, source, sample, True) for sample in samples), None
    lengths = tuple(_count_tokens(adapter, source, sample, False) for sample in samples)
    if longest_answers:
        return tuple(length + generation.max_new_tokens for length in lengths), None
    answers = make_answers(
        adapter,
        source,
        lengths,
        generation,
        batch_size=config.batch_size,
        output=config.output,
        schedule=config.workers,
    )
    return tuple(length + len(answer) for length, answer in zip(lengths, answers, strict=True)), answers


def _count_tokens(adapter: ModelAdapter, source: ExampleSource, sample: int, with_answer: bool) -> int:
    """Tokens of a sample, or of its prompt alone; its images are opened only if their sizes matter."""
    text = source.texts[sample]
    pictures = source.load(sample).images if adapter.size_matters else ()
    images = [(picture.height, picture.width) for picture in pictures] if adapter.size_matters else text.n_images
    return adapter.count_tokens(text.prompt, images, text.answer if with_answer else None)


def _captured_dtype(adapter: ModelAdapter) -> torch.dtype:
    """Type in which activations wait to be stored: the model's, so that what storing rounds off can be measured."""
    return torch.float32 if adapter.dtype == torch.float64 else adapter.dtype


def _sizes(config: CaptureConfig, bytes_per_token: int) -> tuple[int, int]:
    """Rows per unit and tokens per chunk, chosen where the configuration leaves them open."""
    low, high = _CHUNK_TOKENS
    chunk = min(max(_power_of_two(_BLOCK_BYTES // bytes_per_token), low), high)
    if config.rows_per_unit is None:
        chunk = config.chunk_tokens or chunk
        rows = chunk * _power_of_two(min(_UNIT_BYTES // bytes_per_token, _MAX_ROWS_PER_UNIT) // chunk)
    else:
        rows = config.rows_per_unit
        chunk = config.chunk_tokens or (rows if rows <= chunk else math.gcd(rows, chunk))
    if rows % chunk or chunk < min(low, rows):
        raise ConfigError(
            f"rows_per_unit={rows} must be a multiple of chunk_tokens={chunk}, which must be at least {low}"
        )
    return rows, chunk


def _power_of_two(n: int) -> int:
    """The largest power of two up to n, at least 1."""
    return 1 << max(n.bit_length() - 1, 0)
