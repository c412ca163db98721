"""Measures how fast this machine captures, writes and reads, on two batches of a job and a temporary store."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from clt.capture.capacity import existing_folder, local_folder
from clt.capture.planning import CaptureJob
from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.run import capture_samples
from clt.capture.storage.base import Storage
from clt.capture.storage.local import LocalStorage
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.layout import StoreArrays
from clt.capture.store.schema import CapturePlan, StoreSpec
from clt.capture.store.shard_rows import TORCH_DTYPES, bits_of, write_rows
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.errors import StoreError

_PROBE_BYTES = 64 << 20
_ROUNDS = 2
_MOST_UNITS = 8
_CALIBRATION_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Speeds of this machine, each the best of two rounds; bytes are counted before compression.

    Attributes:
        model: tokens per second of preparing inputs, the forward pass and recording.
        commit: tokens per second of commits: moments, permutation, checksums, write, fsync.
        write: bytes per second of writing a shard with fsync, without the rest of a commit.
        read: bytes per second of one thread from disk, checksums verified, page cache dropped where possible.
        read_cached: bytes per second of one thread from the page cache.
        stored_fraction: bytes on disk per byte of activations.
    """

    model: float
    commit: float
    write: float
    read: float
    read_cached: float
    stored_fraction: float


def measure_speeds(job: CaptureJob, output: str | Path) -> Speeds:
    """Runs the model on two batches of a job, then writes and reads a temporary store of about 64 MiB.

    Args:
        job: the capture.
        output: folder or URL of its store; the temporary store is beside the folder, or below the URL.

    Returns:
        The speeds.

    Raises:
        InputError: an example or an image cannot be read.
        NonFiniteError: an activation is NaN or infinite.
        StoreError: nothing can be written there.
    """
    samples = job.plan.samples(0)[: 2 * job.spec.batch_size]
    model, data = 0.0, None
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        data = capture_samples(job, 0, samples)
        model = max(model, len(data.tokens.sample) / (time.perf_counter() - started))
    assert data is not None
    spec, unit = _probe_unit(job.spec, data)
    n = len(unit.tokens.sample)
    nbytes = n * spec.bytes_per_token
    with _probe(output, "commit") as storage:
        commit_s = _commit(storage, spec, unit)
        store = open_store(storage)
        stored = sum(file.bytes for u in store.units for file in u.files if "/acts/" in file.path)
        read_s = min(_read(store, forget=True) for _ in range(_ROUNDS))
        cached_s = min(_read(store, forget=False) for _ in range(_ROUNDS))
        units = len(store.units)
    with _probe(output, "write") as storage:
        write_s = min(_write(storage, spec, unit, number) for number in range(units))
    values = units * n * sum(len(g.sites) * g.width for g in spec.groups) * TORCH_DTYPES[spec.store_dtype].itemsize
    return Speeds(
        model=model,
        commit=n / commit_s,
        write=nbytes / write_s,
        read=units * nbytes / read_s,
        read_cached=units * nbytes / cached_s,
        stored_fraction=stored / values,
    )


def _probe_unit(spec: StoreSpec, data: UnitData) -> tuple[StoreSpec, UnitData]:
    """Spec and contents of a unit of the temporary store, at most 64 MiB.

    Captured rows are repeated, each scaled by a random factor, so that compression finds no repetition that a real
    capture would not have.
    """
    chunk = spec.chunk_tokens
    rows = chunk * max(1, min(spec.rows_per_unit, _PROBE_BYTES // spec.bytes_per_token) // chunk)
    pick = torch.arange(rows) % len(data.tokens.sample)
    noise = 1 + 0.1 * torch.rand(rows, 1, 1, generator=torch.Generator().manual_seed(0))
    acts = {name: (values[pick] * noise).to(values.dtype) for name, values in data.acts.items()}
    unit = UnitData(acts=acts, tokens=data.tokens.select(pick), sample_ids=("probe",), sample_tokens=(rows,))
    return replace(spec, rows_per_unit=rows), unit


def _commit(storage: Storage, spec: StoreSpec, unit: UnitData) -> float:
    """Writes a store of copies of a unit; returns the seconds of the fastest commit."""
    n = len(unit.tokens.sample)
    units = max(_ROUNDS, min(_MOST_UNITS, _PROBE_BYTES // (n * spec.bytes_per_token)))
    plan = CapturePlan(sample_starts=tuple(range(units + 1)), unit_tokens=(n,) * units)
    writer = StoreWriter(storage, spec, plan)
    if not writer.calibrated:
        writer.calibrate({name: values[:_CALIBRATION_ROWS] for name, values in unit.acts.items()})
    seconds = []
    for number in range(units):
        started = time.perf_counter()
        writer.commit(number, unit)
        seconds.append(time.perf_counter() - started)
    writer.finalize()
    return min(seconds)


def _write(storage: Storage, spec: StoreSpec, unit: UnitData, number: int) -> float:
    """Seconds to write the activations of a unit alone, with fsync."""
    arrays = [(StoreArrays(spec, number + 1).acts(group), group.name) for group in spec.groups]
    stored = TORCH_DTYPES[spec.store_dtype]
    bits = {name: bits_of(values.to(stored)) for name, values in unit.acts.items()}
    started = time.perf_counter()
    for array, name in arrays:
        write_rows(storage, array, number, bits[name])
    return time.perf_counter() - started


def _read(store: ActivationStore, forget: bool) -> float:
    """Seconds to read all activations of a store, block by block, into one buffer."""
    if forget:
        _forget(store)
    seconds = 0.0
    size = store.spec.chunk_tokens
    dtype = {"bfloat16": np.uint16, "float32": np.float32, "int8": np.int8}[store.spec.store_dtype]
    for group in store.spec.groups:
        sites = range(len(group.sites))
        out = np.zeros((len(sites), size, group.width), dtype)
        started = time.perf_counter()
        for unit in store.units:
            for block in range(-(-unit.n_tokens // size)):
                store.read_block_into(unit.unit, block, group.name, sites, out)
        seconds += time.perf_counter() - started
    return seconds


def _forget(store: ActivationStore) -> None:
    """Asks the system to drop the files of a store, which are on disk, from its page cache."""
    if not isinstance(store.storage, LocalStorage) or not hasattr(os, "posix_fadvise"):
        return
    for unit in store.units:
        for file in unit.files:
            evict(store.storage.name(file.path))


def evict(file: str | Path) -> None:
    """Evicts a file from the page cache; the system only drops clean pages that no process maps."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@contextmanager
def _probe(output: str | Path, purpose: str) -> Iterator[Storage]:
    """A temporary storage on the disk of the output."""
    folder = local_folder(output)
    if folder is not None:
        place = _beside(folder.absolute())
        try:
            probe = tempfile.TemporaryDirectory(prefix=f".clt-plan-{purpose}-", dir=place)
        except OSError as error:
            raise StoreError(f"{place}: cannot be written ({error.strerror}); choose another output") from None
        with probe as name:
            yield open_storage(Path(name))
        return
    storage = open_storage(f"{str(output).rstrip('/')}/.clt-plan-{purpose}-{uuid.uuid4().hex}")
    try:
        yield storage
    finally:
        for entry in storage.list(""):
            storage.delete(entry.key)


def _beside(folder: Path) -> Path:
    """Nearest existing parent of a folder, or the folder itself if it is the root of its disk."""
    above = existing_folder(folder.parent)
    return folder if folder.is_dir() and folder.stat().st_dev != above.stat().st_dev else above
