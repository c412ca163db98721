"""Plans a capture: settings, sample lengths, and the assignment of samples to units.

Samples are packed into units by their token counts before the first forward pass, so that all workers agree on the
contents of each unit.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass as plain_dataclass

import torch
import transformers
from pydantic import Field
from pydantic.dataclasses import dataclass

from clt.capture.answers import Answer, GenerationSettings, make_answers
from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.model_settings import ModelChoice
from clt.capture.models.sites import decoder_sites
from clt.capture.sources.examples import ExampleSource, SourceSettings, open_source, text_digest
from clt.capture.store.arrays import Compression
from clt.capture.store.row_order import pack_units
from clt.capture.store.schema import SCHEMA_VERSION, CapturePlan, SiteGroup, StoreDtype, StoreSpec
from clt.capture.store.shard_rows import TORCH_DTYPES
from clt.capture.writing.workers import Schedule
from clt.config import STRICT
from clt.errors import ConfigError
from clt.transcoder.architecture import ReadSite
from clt.version import code_version

#: Most bytes of activations in a block, which is read at once, and in a unit, which is held in memory.
_BLOCK_BYTES = 8 << 20
_UNIT_BYTES = 2 << 30
_CHUNK_TOKENS = (32, 1024)
_MAX_ROWS_PER_UNIT = 65_536


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CaptureConfig(ModelChoice):
    """Settings of a capture."""

    output: str
    """Folder or URL of the store; an unfinished store of the same job is resumed."""
    source: SourceSettings
    """Source of the prompts and images."""
    generate: GenerationSettings | None = None
    """The model generates an answer to each prompt, which is captured too; default: the answers of the source."""
    read_site: ReadSite = "resid_mid"
    """Site that encoders of transcoders read; stored for every layer beside `mlp_out`."""
    store_dtype: StoreDtype = "bfloat16"
    """Type of the stored values; int8 takes half the space of bfloat16, its rounding error is in the manifest."""
    compression: Compression = "none"
    """Lossless compression of the stored values; zstd saves a fifth of bfloat16, reading is several times slower."""
    batch_size: int = Field(default=32, gt=0)
    """Prompts per forward pass."""
    rows_per_unit: int | None = Field(default=None, gt=0)
    """Most tokens of a unit, which is committed as a whole; default: the most that fit 2 GiB, up to 65,536."""
    chunk_tokens: int | None = Field(default=None, gt=0)
    """Tokens of a chunk, read at once; divides rows_per_unit; default: a power of two, up to 8 MiB and 1,024 tokens."""
    seed: int = 0
    """Seed of the order of tokens within a unit."""
    workers: Schedule = Schedule()
    """Assignment of units to this process."""


@plain_dataclass(frozen=True, kw_only=True)
class CaptureJob:
    """A planned capture.

    Attributes:
        adapter: the model.
        source: the examples.
        lengths: tokens of each example.
        answers: token ids of the generated answer to each; None: the answers of the source.
        spec: sites, types and sizes of the store.
        plan: samples of each unit.
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
        """Most memory of a unit: its activations as captured and, if the type differs, as stored."""
        rows = min(self.spec.rows_per_unit, max(self.plan.unit_tokens))
        values = rows * sum(len(group.sites) * group.width for group in self.spec.groups)
        captured = captured_dtype(self.adapter).itemsize
        stored = TORCH_DTYPES[self.spec.store_dtype]
        return values * (captured + (stored.itemsize if stored != captured_dtype(self.adapter) else 0))

    def summary(self) -> str:
        """Sizes of the job, in one line."""
        tokens = sum(self.plan.unit_tokens)
        return (
            f"samples={len(self.lengths)} tokens={tokens} units={self.plan.n_units} "
            f"rows_per_unit={self.spec.rows_per_unit} sites={len(self.spec.sites)} width={self.spec.model.d_model} "
            f"size={tokens * self.bytes_per_token / 2**20:.1f}MiB"
        )


def plan_capture(
    config: CaptureConfig, adapter: ModelAdapter | None = None, *, longest_answers: bool = False
) -> CaptureJob:
    """Loads the model and plans a capture; writes nothing, and runs the model only for `generate`.

    Args:
        config: the job.
        adapter: the model, if it is already loaded.
        longest_answers: assume the greatest length for each answer and generate none; the job then gives sizes and
            cannot be run.

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
    layers = range(adapter.n_layers)
    sites = (*decoder_sites(layers, config.read_site), *decoder_sites(layers, "mlp_out"))
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


def captured_dtype(adapter: ModelAdapter) -> torch.dtype:
    """Type of captured activations: the model's, so that the rounding of the stored type can be measured."""
    return torch.float32 if adapter.dtype == torch.float64 else adapter.dtype


def _lengths(
    config: CaptureConfig, adapter: ModelAdapter, source: ExampleSource, longest_answers: bool
) -> tuple[tuple[int, ...], tuple[Answer, ...] | None]:
    """Tokens of each sample, and the generated answers if any."""
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
    """Tokens of a sample or of its prompt alone; images are opened only where their size changes the count."""
    text = source.texts[sample]
    images = source.sizes(sample) if adapter.size_matters else text.n_images
    return adapter.count_tokens(text.prompt, images, text.answer if with_answer else None)


def _sizes(config: CaptureConfig, bytes_per_token: int) -> tuple[int, int]:
    """Rows per unit and tokens per chunk, with the defaults of keys that are not set."""
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
