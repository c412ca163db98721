"""Store benchmark: the store against other formats and libraries, on the same bytes, in one process.

`clt store bench` prints it; benchmarks/store.md is a committed run. All of them run in turns, and claims compare the
best rounds. PyTorch uses one thread; other libraries keep their threads, which shows in their CPU seconds.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from clt.capture.capacity import MODELS
from clt.errors import StoreError
from clt.launch.bench.common.machine import this_machine
from clt.launch.bench.common.report import Claim, claim
from clt.launch.bench.common.timing import torch_threads
from clt.launch.bench.store.data import BenchStore, Layout
from clt.launch.bench.store.delivery import LOADER, Delivery, delivery_table
from clt.launch.bench.store.files import OUR_STORE, OURS, cold_table, read_table, readers, write_table
from clt.launch.bench.store.peers import MEMMAP, PEERS, ZARR_OUT, ZARR_PYTHON, Peer
from clt.launch.bench.store.report import GB, ModelSpeed, StoreBenchReport, ThroughputTable

_MIB = 2**20
_Measure = Literal["gb_per_s", "cpu_s_per_gb"]
_WORDS: dict[_Measure, str] = {"gb_per_s": "GB/s", "cpu_s_per_gb": "CPU s/GB"}
_PACKAGES = ("torch", "numpy", "zarr", "zarrs", "tensorstore", "h5py", "safetensors", "awscrt", "google-crc32c")


@dataclass(frozen=True, kw_only=True)
class StoreBenchSettings:
    """Settings of the store benchmark.

    Attributes:
        folder: existing folder on the disk to be measured; needs twice `size_mib` temporarily.
        size_mib: MiB of activations delivered in shuffled batches, rounded down to a power of two of tokens; the other
            tables move a sixteenth of it.
        rounds: rounds of every table; reads from memory, which are short, have three times as many, and reads from
            disk at most three.
    """

    folder: Path
    size_mib: int = 2048
    rounds: int = 7


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """A layout without its number of tokens."""

    key: str
    sites: int
    width: int
    chunk_tokens: int

    def layout(self, n_bytes: int) -> Layout:
        """Four shards of at least four blocks; a small benchmark has small chunks."""
        tokens = 1 << (n_bytes // (self.sites * self.width * 2)).bit_length() - 1
        chunk = min(self.chunk_tokens, tokens // 16)
        return Layout(tokens=tokens, sites=self.sites, width=self.width, chunk_tokens=chunk, shard_tokens=tokens // 4)


#: Layout of a toy model capture, in chunks of 512 KiB; and plain chunks of 1 MiB, which Zarr libraries prefer.
_BLOCKS = _Cut(key="blocks", sites=8, width=256, chunk_tokens=1024)
_CHUNKS = _Cut(key="chunks", sites=1, width=1024, chunk_tokens=512)
_CUTS = (_BLOCKS, _CHUNKS)
_BATCH_TOKENS, _WINDOW_TOKENS = 4096, 65536


def bench_store(settings: StoreBenchSettings, peers: Sequence[Peer] = PEERS) -> StoreBenchReport:
    """Runs the benchmark.

    Args:
        settings: folder, size and rounds.
        peers: other formats and libraries.

    Raises:
        StoreError: the folder is missing or has too little space.
    """
    _check_space(settings)
    machine = this_machine(_PACKAGES, settings.folder)
    tables: list[ThroughputTable] = []
    with torch_threads(1), tempfile.TemporaryDirectory(prefix="clt-bench-", dir=settings.folder) as name:
        for cut in _CUTS:
            tables += _file_tables(cut, settings, peers, Path(name))
        tables += _delivery_tables(settings, peers, Path(name))
    claims = _claims({table.key: table for table in tables})
    return StoreBenchReport(machine=machine, tables=tuple(tables), claims=tuple(claims), models=_models(tables))


def _file_tables(cut: _Cut, settings: StoreBenchSettings, peers: Sequence[Peer], folder: Path) -> list[ThroughputTable]:
    layout, rounds = cut.layout(settings.size_mib * _MIB // 16), settings.rounds
    tables = []
    for key, words, durable in (("write", "without fsync", False), ("write+fsync", "with fsync", True)):
        title = f"Write {words}: {_describe(layout)}."
        tables.append(write_table(f"{cut.key}/{key}", title, layout, peers, folder, rounds, durable))
    store = BenchStore.make(folder / cut.key, layout)
    with readers(store, peers, folder) as all_readers:
        title = f"Read random blocks, in memory: {_describe(layout)}."
        tables.append(read_table(f"{cut.key}/read", title, store, all_readers, 3 * rounds))
        title = f"Open and read random blocks, not in memory: {_describe(layout)}."
        tables.append(cold_table(f"{cut.key}/cold", title, store, all_readers, min(rounds, 3)))
    shutil.rmtree(store.folder)
    return tables


def _delivery_tables(settings: StoreBenchSettings, peers: Sequence[Peer], folder: Path) -> list[ThroughputTable]:
    layout = _BLOCKS.layout(settings.size_mib * _MIB)
    batch, window = min(_BATCH_TOKENS, layout.tokens // 8), min(_WINDOW_TOKENS, layout.tokens // 4)
    store = BenchStore.make(folder / "delivery", layout)
    chosen = [peer for peer in peers if peer.reads_store or peer.name == MEMMAP]
    tables = []
    with readers(store, chosen, folder) as all_readers:
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(dtype).removeprefix("torch.")
            delivery = Delivery(batch_tokens=batch, window_tokens=window, dtype=dtype)
            title = f"Shuffled batches of {batch} tokens, all sites, {kind}, windows of {window}: {_describe(layout)}."
            # The loader of the store, and one of its readers with the algorithm of the others.
            others = [reader for reader in all_readers if reader.name != OURS]
            tables.append(delivery_table(f"delivery/{kind}", title, store, others, delivery, settings.rounds))
    shutil.rmtree(store.folder)
    return tables


def _describe(layout: Layout) -> str:
    chunks = "1 chunk" if layout.sites == 1 else f"{layout.sites} chunks"
    size = layout.chunk_tokens * layout.width * 2 / 1024
    return f"{layout.sites} x {layout.width} channels, blocks of {chunks} of {size:g} KiB"


def _claims(tables: dict[str, ThroughputTable]) -> list[Claim]:
    claims = []
    for cut in _CUTS:
        read, write = tables[f"{cut.key}/read"], tables[f"{cut.key}/write"]
        for ours in (OURS, OUR_STORE):
            claims += [_claim(read, ours, zarr, "gb_per_s", ">=", 5) for zarr in (ZARR_PYTHON, ZARR_OUT)]
            claims.append(_claim(read, ours, MEMMAP, "gb_per_s", ">=", 0.5))
        claims.append(_claim(write, OURS, ZARR_PYTHON, "gb_per_s", ">=", 2))
        durable = tables[f"{cut.key}/write+fsync"]
        claims.append(_claim(durable, OURS, ZARR_PYTHON, "cpu_s_per_gb", "<=", 0.6))
    for kind in ("bfloat16", "float32"):
        table = tables[f"delivery/{kind}"]
        claims += [_claim(table, LOADER, zarr, "gb_per_s", ">=", 5) for zarr in (ZARR_PYTHON, ZARR_OUT)]
    return claims


def _claim(
    table: ThroughputTable, ours: str, theirs: str, measure: _Measure, relation: Literal[">=", "<="], bound: float
) -> Claim:
    mine, other = (getattr(table.row(name), measure, None) for name in (ours, theirs))
    return claim(f"{table.key}: {ours} / {theirs}, {_WORDS[measure]}", mine, other, relation, bound)


def _models(tables: Sequence[ThroughputTable]) -> tuple[ModelSpeed, ...]:
    """Tokens per second of models from the store's row, the first, of each table of whole blocks."""
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
            "--folder"
        )
