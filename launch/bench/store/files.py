"""Store benchmark, files: random block reads from the page cache and from disk, shard writes with and without fsync.

All readers and writers move the same bytes, and a reader that returns a wrong byte is an error.

Writing also measures the allocator: zarr-python allocates new buffers per shard, glibc returns buffers of that size to
the system, and touching fresh pages doubles the cost. With an allocator that keeps memory (MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ above the shard size) zarr-python writes about twice as fast; our writer does not change.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from clt.capture.speeds import evict
from clt.capture.storage.local import LocalStorage
from clt.capture.store.shard_rows import write_rows
from clt.launch.bench.common.timing import TimedRun, Timing, interleave
from clt.launch.bench.store.data import BenchStore, Bits, Layout, ReadBlock, arrays_of, in_blocks, random_bits
from clt.launch.bench.store.peers import Peer, sync_tree
from clt.launch.bench.store.report import ThroughputRow, ThroughputTable, measured_row

OURS, OUR_STORE, MEMCPY = "clt shard", "clt store", "memcpy"
#: Blocks are read into a ring of this size, larger than the caches, as the windows of a loader are.
_RING_BYTES = 64 << 20
_NOT_INSTALLED = "not installed"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader of blocks of a store.

    Attributes:
        name: row of the tables.
        checksums: whether checksums are verified.
        path: file or folder that is read.
        open: returns the function that reads a block; None if the library is not installed.
    """

    name: str
    checksums: bool
    path: Path
    open: Callable[[], AbstractContextManager[ReadBlock]] | None


@contextmanager
def readers(store: BenchStore, peers: Sequence[Peer], folder: Path) -> Iterator[list[Reader]]:
    """All readers of a store, ours first, each checked to read the right bytes.

    Args:
        store: the store.
        peers: other formats and libraries.
        folder: existing folder for copies in other formats, which are removed at the end.

    Yields:
        The readers.
    """
    blocks = in_blocks(store.expected, store.layout)
    all_readers = [
        Reader(name=OURS, checksums=True, path=store.array, open=lambda: nullcontext(store.shard_reader())),
        Reader(name=OUR_STORE, checksums=True, path=store.array, open=lambda: nullcontext(store.store_reader())),
    ]
    with ExitStack() as stack:
        for number, peer in enumerate(peers):
            path = store.array if peer.reads_store else folder / f"copy{number}"
            if peer.installed and not peer.reads_store:
                stack.callback(_remove, path)
                peer.write(path, blocks, store.layout)
            opened = partial(peer.open, path, store.layout) if peer.installed else None
            all_readers.append(Reader(name=peer.name, checksums=peer.checksums, path=path, open=opened))
        for reader in all_readers:
            if reader.open is not None:
                with reader.open() as read:
                    _check(reader.name, read, blocks)
        yield all_readers


def read_table(key: str, title: str, store: BenchStore, all_readers: Sequence[Reader], rounds: int) -> ThroughputTable:
    """Times reads of all blocks in random order from the page cache into existing arrays.

    Args:
        key: of the table.
        title: of the table.
        store: the store.
        all_readers: from `readers`.
        rounds: rounds.

    Returns:
        The table; its last row is the limit, memcpy of the same blocks.
    """
    layout = store.layout
    blocks, ring = in_blocks(store.expected, layout), _Ring(layout)

    def memcpy(block: int, out: Bits) -> None:
        np.copyto(out, blocks[block])

    with ExitStack() as stack:
        opened = {r.name: stack.enter_context(r.open()) for r in all_readers if r.open is not None} | {MEMCPY: memcpy}
        runs = [TimedRun(name=name, run=partial(ring.fill, read)) for name, read in opened.items()]
        timings = interleave(runs, rounds)
    checksums = {reader.name: reader.checksums for reader in all_readers} | {MEMCPY: False}
    return make_table(key, title, layout, rounds, checksums, timings)


def cold_table(key: str, title: str, store: BenchStore, all_readers: Sequence[Reader], rounds: int) -> ThroughputTable:
    """Times opening and reading all blocks in random order after they were evicted from the page cache.

    Args:
        key: of the table.
        title: of the table.
        store: the store.
        all_readers: from `readers`.
        rounds: rounds.

    Returns:
        The table, without measurements where the file system cannot evict files.
    """
    layout, ring = store.layout, _Ring(store.layout)

    def run(open_reader: Callable[[], AbstractContextManager[ReadBlock]]) -> None:
        with open_reader() as read:
            ring.fill(read)

    timings: dict[str, Timing] = {}
    possible = _can_evict(store.array)
    if possible:
        runs = [
            TimedRun(name=r.name, run=partial(run, r.open), before=partial(_evict, r.path))
            for r in all_readers
            if r.open is not None
        ]
        timings = interleave(runs, rounds)
    reason = _NOT_INSTALLED if possible else "this file system cannot evict files"
    checksums = {reader.name: reader.checksums for reader in all_readers}
    return make_table(key, title, layout, rounds, checksums, timings, reason)


def write_table(
    key: str, title: str, layout: Layout, peers: Sequence[Peer], folder: Path, rounds: int, durable: bool
) -> ThroughputTable:
    """Times writes of the same array, shard by shard where the format has shards.

    Args:
        key: of the table.
        title: of the table.
        layout: of the array.
        peers: other formats and libraries.
        folder: existing folder for the files, which are removed after each round.
        rounds: rounds.
        durable: whether every file and folder is synced to disk (fsync).
    """
    bits, arrays = random_bits(layout), arrays_of(layout)
    array, size = arrays.acts(arrays.spec.groups[0]), layout.shard_tokens

    def ours(path: Path) -> None:
        storage = LocalStorage(path, durable)
        for unit in range(arrays.n_units):
            write_rows(storage, array, unit, bits[unit * size : (unit + 1) * size])

    def theirs(peer: Peer, path: Path) -> None:
        peer.write(path, bits, layout)
        if durable:
            sync_tree(path)

    path = folder / "written"
    runs = [TimedRun(name=OURS, run=partial(ours, path), after=partial(_remove, path))]
    writers = [peer for peer in peers if peer.writes]
    for peer in writers:
        if peer.installed:
            runs.append(TimedRun(name=peer.name, run=partial(theirs, peer, path), after=partial(_remove, path)))
    timings = interleave(runs, rounds)
    checksums = {OURS: True, **{peer.name: peer.checksums for peer in writers}}
    return make_table(key, title, layout, rounds, checksums, timings)


class _Ring:
    """Arrays that blocks are read into, reused in turn."""

    def __init__(self, layout: Layout) -> None:
        block_bytes = layout.nbytes // layout.blocks
        count = min(layout.blocks, max(1, _RING_BYTES // block_bytes))
        # Ones, not empty: the first touch of pages would count as reading.
        self._slots = np.ones((count, *layout.block_shape), np.uint16)
        self._order = np.random.default_rng(0).permutation(layout.blocks).tolist()

    def fill(self, read: ReadBlock) -> None:
        """Reads every block once in random order."""
        for number, block in enumerate(self._order):
            read(block, self._slots[number % len(self._slots)])


def _check(name: str, read: ReadBlock, blocks: Bits) -> None:
    out = np.empty(blocks.shape[1:], np.uint16)
    for block, expected in enumerate(blocks):
        out[...] = 0xFFFF  # no stored value has these bits
        read(block, out)
        assert np.array_equal(out, expected), f"{name}: block {block} is read wrongly"


def make_table(
    key: str,
    title: str,
    layout: Layout,
    rounds: int,
    checksums: dict[str, bool],
    timings: dict[str, Timing],
    absent: str = _NOT_INSTALLED,
) -> ThroughputTable:
    """A table from timings.

    Args:
        key: of the table.
        title: of the table.
        layout: of the array moved per round.
        rounds: rounds.
        checksums: whether they are verified, by name, in the order of the rows.
        timings: by name; a row without one is absent.
        absent: reason why a row was not measured.
    """
    rows = [
        measured_row(name, checks, timings[name], layout.nbytes)
        if name in timings
        else ThroughputRow(name=name, checksums=checks, absent=absent)
        for name, checks in checksums.items()
    ]
    return ThroughputTable(
        key=key,
        title=title,
        nbytes=layout.nbytes,
        bytes_per_token=layout.bytes_per_token,
        rounds=rounds,
        rows=tuple(rows),
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _evict(path: Path) -> None:
    for file in _files(path):
        evict(file)


def _can_evict(path: Path) -> bool:
    """True if reads of evicted files go to the disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    _evict(path)
    for file in _files(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
            return False
        except BlockingIOError:
            continue
        except OSError:  # a file system that cannot answer
            return False
        finally:
            os.close(descriptor)
    return True
