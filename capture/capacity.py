"""Estimates of a planned capture: size of the store, duration on this machine, and read rate of training.

Sizes follow from token counts alone; speeds are measured by `clt.capture.speeds`.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import numpy as np

from clt.capture.storage.open_storage import open_storage
from clt.capture.store.arrays import ArraySpec
from clt.capture.store.layout import StoreArrays
from clt.capture.store.moments import Moments

if TYPE_CHECKING:
    from clt.capture.planning import CaptureJob
    from clt.capture.speeds import Speeds

GB, GIB = 1e9, 2**30
#: Bytes per second of the links that usually limit training.
NVME, PCIE = 7 * GB, 25 * GB
#: Model -> decoder layers, width.
MODELS = {
    "toy": (4, 256),
    "GPT-2": (12, 768),
    "Gemma-2-2B": (26, 2304),
    "Qwen2-VL-7B": (28, 3584),
    "LLaVA-1.5-7B": (32, 4096),
}


@dataclass(frozen=True, kw_only=True)
class StoreSize:
    """Size of the store of a capture.

    Attributes:
        samples: number of samples.
        tokens: number of tokens, without padding.
        shortest: tokens of the shortest sample.
        longest: tokens of the longest sample.
        units: number of units.
        rows_per_unit: most tokens of a unit.
        chunk_tokens: tokens of a chunk, read at once.
        sites: number of stored sites.
        store_dtype: type of the stored values.
        compression: compression of the stored values.
        bytes_per_token: bytes of activations per token, scales included, before compression.
        total_bytes: bytes of the store, before compression.
        memory_bytes: most memory of the activations of a unit during capture.
    """

    samples: int
    tokens: int
    shortest: int
    longest: int
    units: int
    rows_per_unit: int
    chunk_tokens: int
    sites: int
    store_dtype: str
    compression: str
    bytes_per_token: int
    total_bytes: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class ReadRate:
    """Rate at which a disk, cache or link feeds training on all stored sites.

    Attributes:
        source: the disk, cache or link.
        bytes_per_s: its bytes per second.
        tokens_per_s: tokens of this store per second.
    """

    source: str
    bytes_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Cost of the activations of a model: one read site and the MLP output of every layer, in bfloat16.

    Attributes:
        model: name of the model.
        bytes_per_token: 2 sites x layers x width x 2 bytes.
        bytes_per_s: bytes per second at a million tokens per second.
        nvme_tokens_per_s: tokens per second at 7 GB/s.
        pcie_tokens_per_s: tokens per second at 25 GB/s.
        terabytes: terabytes of a hundred million tokens.
    """

    model: str
    bytes_per_token: int
    bytes_per_s: float
    nvme_tokens_per_s: float
    pcie_tokens_per_s: float
    terabytes: float


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Report on a planned capture: whether it fits, how long it takes, and how fast it can be read.

    Attributes:
        output: folder or URL of the store.
        size: size of the store.
        committed_tokens: tokens committed by earlier runs.
        needed_bytes: bytes still to be written, before compression.
        free_bytes: free space at the output; None if unknown.
        speeds: speeds of this machine; None if not measured.
        capture_tokens_per_s: tokens per second of one worker; None if not measured.
        capture_s: seconds that one worker needs for the remaining tokens; None if not measured.
        limited_by: the part of the work that takes longest; None if not measured.
        readings: read rates of training on this store.
        models: cost of the activations of some models.
    """

    output: str
    size: StoreSize
    committed_tokens: int
    needed_bytes: int
    free_bytes: int | None
    speeds: Speeds | None
    capture_tokens_per_s: float | None
    capture_s: float | None
    limited_by: str | None
    readings: tuple[ReadRate, ...]
    models: tuple[ModelCost, ...]

    @property
    def fits(self) -> bool:
        """True if the free space is sufficient or unknown."""
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


def capacity(job: CaptureJob, output: str | Path, *, measure: bool = True) -> Capacity:
    """Estimates sizes, speeds and durations of a planned capture; leaves nothing on disk.

    Args:
        job: the capture.
        output: folder or URL of the store; it may be unfinished.
        measure: measure speeds, with the model on two batches and a probe store beside the output.

    Returns:
        The report.

    Raises:
        InputError: an example or an image cannot be read.
        NonFiniteError: an activation is NaN or infinite.
        StoreError: nothing can be written at the output.
    """
    from clt.capture.speeds import measure_speeds

    size = store_size(job)
    storage = open_storage(output)
    committed = {entry.key.rpartition("/")[2] for entry in storage.list("units/commits/")}
    tokens = [n for unit, n in enumerate(job.plan.unit_tokens) if f"{unit:06d}.json" in committed]
    speeds = measure_speeds(job, output) if measure else None
    rate = seconds = limit = None
    if speeds is not None:
        rate = 1 / (1 / speeds.model + 1 / speeds.commit)
        seconds = (size.tokens - sum(tokens)) / rate
        disk = size.bytes_per_token / speeds.write
        shares = {
            "the model": 1 / speeds.model,
            "the disk": disk,
            "moments, checksums and copies": max(0.0, 1 / speeds.commit - disk),
        }
        limit = max(shares, key=lambda name: shares[name])
    sources = {"an NVMe disk": NVME, "PCIe 4.0 x16": PCIE}
    if speeds is not None:
        sources = {"this disk, one thread": speeds.read, "this page cache, one thread": speeds.read_cached, **sources}
    return Capacity(
        output=str(output),
        size=size,
        committed_tokens=sum(tokens),
        needed_bytes=math.ceil(size.total_bytes * (1 - sum(tokens) / size.tokens)),
        free_bytes=free_bytes(output),
        speeds=speeds,
        capture_tokens_per_s=rate,
        capture_s=seconds,
        limited_by=limit,
        readings=tuple(
            ReadRate(source=name, bytes_per_s=speed, tokens_per_s=speed / size.bytes_per_token)
            for name, speed in sources.items()
        ),
        models=tuple(model_cost(name, *shape) for name, shape in MODELS.items()),
    )


def store_size(job: CaptureJob) -> StoreSize:
    """Size of a planned store before compression; exact except for the metadata, which is small."""
    spec, plan = job.spec, job.plan
    arrays = StoreArrays(spec, plan.n_units).per_unit()
    shards = sum(_shard_bytes(array, n) for array in arrays for n in plan.unit_tokens)
    moments = sum(_moment_bytes(len(group.sites), group.width) for group in spec.groups)
    return StoreSize(
        samples=len(job.lengths),
        tokens=sum(plan.unit_tokens),
        shortest=min(job.lengths),
        longest=max(job.lengths),
        units=plan.n_units,
        rows_per_unit=spec.rows_per_unit,
        chunk_tokens=spec.chunk_tokens,
        sites=len(spec.sites),
        store_dtype=spec.store_dtype,
        compression=spec.compression,
        bytes_per_token=spec.bytes_per_token,
        total_bytes=shards + moments * (plan.n_units + 1),
        memory_bytes=job.memory_bytes,
    )


def model_cost(name: str, layers: int, width: int) -> ModelCost:
    """Cost of the activations of a model.

    Args:
        name: name of the model.
        layers: number of decoder layers.
        width: width of the residual stream.

    Returns:
        Bytes and rates for one read site and the MLP output of every layer in bfloat16.
    """
    cost = 2 * layers * width * 2
    return ModelCost(
        model=name,
        bytes_per_token=cost,
        bytes_per_s=cost * 1e6,
        nvme_tokens_per_s=NVME / cost,
        pcie_tokens_per_s=PCIE / cost,
        terabytes=cost * 1e8 / 1e12,
    )


def free_bytes(location: str | Path) -> int | None:
    """Free bytes on the disk of a folder, which need not exist; None for object stores."""
    folder = local_folder(location)
    return None if folder is None else shutil.disk_usage(existing_folder(folder)).free


def local_folder(location: str | Path) -> Path | None:
    """Folder of a location, which need not exist; None for object stores."""
    text = str(location)
    if isinstance(location, Path) or "://" not in text:
        return Path(location)
    return Path(unquote(urlsplit(text).path)) if urlsplit(text).scheme == "file" else None


def existing_folder(folder: Path) -> Path:
    """The folder itself if it exists, else its nearest existing parent."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def _shard_bytes(array: ArraySpec, n_rows: int) -> int:
    """Bytes of an uncompressed shard: whole chunks with a checksum each, the index and its checksum."""
    chunk = int(np.prod(array.chunk)) * np.dtype(array.dtype).itemsize + 4
    return -(-n_rows // array.chunk_rows) * array.chunks_per_row * chunk + array.chunks * 16 + 4


def _moment_bytes(n_sites: int, width: int) -> int:
    moments = Moments.zeros(n_sites, width)
    return sum(getattr(moments, field.name).nbytes for field in fields(Moments))
