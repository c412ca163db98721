"""The store's benchmark: ours against the usual ways to keep activations, on the same bytes, in one process.

`clt store bench` prints it; benchmarks/store.md is one run of it. Rivals take turns round after round, the best round
counts, and the promises of the project are judged by it. torch has one thread; libraries with threads of their own keep
them, which their CPU seconds show.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from clt.capture.capacity import MODELS
from clt.errors import StoreError
from clt.launch.bench.common.machine import this_machine
from clt.launch.bench.common.report import GB, BenchReport, Claim, ModelSpeed, Table, claim
from clt.launch.bench.store.data import BenchStore, Layout
from clt.launch.bench.store.delivery import LOADER, Delivery, delivery_table
from clt.launch.bench.store.files import OUR_STORE, OURS, cold_table, read_table, readers, write_table
from clt.launch.bench.store.peers import MEMMAP, PEERS, ZARR_OUT, ZARR_PYTHON, Peer

_MIB = 2**20
_Measure = Literal["gb_per_s", "cpu_s_per_gb"]
_WORDS: dict[_Measure, str] = {"gb_per_s": "GB/s", "cpu_s_per_gb": "CPU s/GB"}
_PACKAGES = ("torch", "numpy", "zarr", "zarrs", "tensorstore", "h5py", "safetensors", "awscrt", "google-crc32c")


@dataclass(frozen=True, kw_only=True)
class StoreBenchSettings:
    """Size of the benchmark.

    Attributes:
        folder: an existing folder on the disk that is measured; twice `size_mib` are used there for a while.
        size_mib: MiB of activations that are delivered in shuffled batches, rounded down to a power of two of tokens;
            the other tests move a sixteenth of it.
        rounds: rounds of every table; reads from memory, which are short, have three times as many, and reads from the
            disk at most three.
    """

    folder: Path
    size_mib: int = 2048
    rounds: int = 7


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """A layout to be compared, before its size is known."""

    key: str
    sites: int
    width: int
    chunk_tokens: int

    def layout(self, n_bytes: int) -> Layout:
        """Four shards of at least four blocks: a small benchmark has small chunks."""
        tokens = 1 << (n_bytes // (self.sites * self.width * 2)).bit_length() - 1
        chunk = min(self.chunk_tokens, tokens // 16)
        return Layout(tokens=tokens, sites=self.sites, width=self.width, chunk_tokens=chunk, shard_tokens=tokens // 4)


#: What capture chooses for the toy model, chunks of 512 KiB; and plain chunks of 1 MiB, what Zarr libraries prefer.
_BLOCKS = _Shape(key="blocks", sites=8, width=256, chunk_tokens=1024)
_CHUNKS = _Shape(key="chunks", sites=1, width=1024, chunk_tokens=512)
_SHAPES = (_BLOCKS, _CHUNKS)
_BATCH_TOKENS, _WINDOW_TOKENS = 4096, 65536


def bench_store(settings: StoreBenchSettings, peers: Sequence[Peer] = PEERS) -> BenchReport:
    """Runs the benchmark.

    Args:
        settings: its size.
        peers: the rivals.

    Returns:
        Tables, promises and what they mean for models.

    Raises:
        StoreError: the folder is missing or has too little space.
    """
    _check_space(settings)
    machine = this_machine(_PACKAGES, settings.folder)
    tables: list[Table] = []
    with _one_thread(), tempfile.TemporaryDirectory(prefix="clt-bench-", dir=settings.folder) as name:
        for shape in _SHAPES:
            tables += _file_tables(shape, settings, peers, Path(name))
        tables += _delivery_tables(settings, peers, Path(name))
    claims = _claims({table.key: table for table in tables})
    return BenchReport(machine=machine, tables=tuple(tables), claims=tuple(claims), models=_models(tables))


def _file_tables(shape: _Shape, settings: StoreBenchSettings, peers: Sequence[Peer], folder: Path) -> list[Table]:
    layout, rounds = shape.layout(settings.size_mib * _MIB // 16), settings.rounds
    tables = []
    for key, words, durable in (("write", "without fsync", False), ("write+fsync", "with fsync", True)):
        title = f"Write {words}: {_describe(layout)}."
        tables.append(write_table(f"{shape.key}/{key}", title, layout, peers, folder, rounds, durable))
    store = BenchStore.make(folder / shape.key, layout)
    with readers(store, peers, folder) as everyone:
        title = f"Read random blocks, in memory: {_describe(layout)}."
        tables.append(read_table(f"{shape.key}/read", title, store, everyone, 3 * rounds))
        title = f"Open and read random blocks, not in memory: {_describe(layout)}."
        tables.append(cold_table(f"{shape.key}/cold", title, store, everyone, min(rounds, 3)))
    shutil.rmtree(store.folder)
    return tables


def _delivery_tables(settings: StoreBenchSettings, peers: Sequence[Peer], folder: Path) -> list[Table]:
    layout = _BLOCKS.layout(settings.size_mib * _MIB)
    batch, window = min(_BATCH_TOKENS, layout.tokens // 8), min(_WINDOW_TOKENS, layout.tokens // 4)
    store = BenchStore.make(folder / "delivery", layout)
    chosen = [peer for peer in peers if peer.reads_store or peer.name == MEMMAP]
    tables = []
    with readers(store, chosen, folder) as everyone:
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(dtype).removeprefix("torch.")
            delivery = Delivery(batch_tokens=batch, window_tokens=window, dtype=dtype)
            title = f"Shuffled batches of {batch} tokens, all sites, {kind}, windows of {window}: {_describe(layout)}."
            # Of ours, the loader, and one who reads for the rivals' algorithm.
            rivals = [reader for reader in everyone if reader.name != OURS]
            tables.append(delivery_table(f"delivery/{kind}", title, store, rivals, delivery, settings.rounds))
    shutil.rmtree(store.folder)
    return tables


def _describe(layout: Layout) -> str:
    chunks = "1 chunk" if layout.sites == 1 else f"{layout.sites} chunks"
    size = layout.chunk_tokens * layout.width * 2 / 1024
    return f"{layout.sites} x {layout.width} channels, blocks of {chunks} of {size:g} KiB"


def _claims(tables: dict[str, Table]) -> list[Claim]:
    claims = []
    for shape in _SHAPES:
        read, write = tables[f"{shape.key}/read"], tables[f"{shape.key}/write"]
        for ours in (OURS, OUR_STORE):
            claims += [_promise(read, ours, zarr, "gb_per_s", ">=", 5) for zarr in (ZARR_PYTHON, ZARR_OUT)]
            claims.append(_promise(read, ours, MEMMAP, "gb_per_s", ">=", 0.5))
        claims.append(_promise(write, OURS, ZARR_PYTHON, "gb_per_s", ">=", 2))
        durable = tables[f"{shape.key}/write+fsync"]
        claims.append(_promise(durable, OURS, ZARR_PYTHON, "cpu_s_per_gb", "<=", 0.6))
    for kind in ("bfloat16", "float32"):
        table = tables[f"delivery/{kind}"]
        claims += [_promise(table, LOADER, zarr, "gb_per_s", ">=", 5) for zarr in (ZARR_PYTHON, ZARR_OUT)]
    return claims


def _promise(
    table: Table, ours: str, theirs: str, measure: _Measure, relation: Literal[">=", "<="], bound: float
) -> Claim:
    mine, other = (getattr(table.row(name), measure, None) for name in (ours, theirs))
    return claim(f"{table.key}: {ours} / {theirs}, {_WORDS[measure]}", mine, other, relation, bound)


def _models(tables: Sequence[Table]) -> tuple[ModelSpeed, ...]:
    """What ours, the first row of each table of whole blocks, means for models."""
    speeds = {
        table.key: table.rows[0].gb_per_s * GB
        for table in tables
        if table.rows[0].gb_per_s is not None and not table.key.startswith(_CHUNKS.key)
    }
    models = []
    for name, (n_layers, width) in MODELS.items():
        cost = 2 * n_layers * width * 2
        per_s = {key: speed / cost for key, speed in speeds.items()}
        models.append(ModelSpeed(model=name, bytes_per_token=cost, tokens_per_s=per_s))
    return tuple(models)


def _check_space(settings: StoreBenchSettings) -> None:
    if not settings.folder.is_dir():
        raise StoreError(f"{settings.folder}: no such folder; give --folder one on the disk to be measured")
    needed, free = 2 * settings.size_mib, shutil.disk_usage(settings.folder).free // _MIB
    if free < needed + 256:
        raise StoreError(
            f"{settings.folder}: {free} MiB free, the benchmark writes {needed} MiB; lower --size or choose another "
            f"--folder"
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
