"""Reads and writes of files: the first three questions of the store's benchmark.

How fast are random blocks read that the system has in memory, how fast are blocks read that it has not, and how fast
are shards written, with and without fsync. Everyone moves the same bytes, and whoever reads a wrong one is not timed.

Writing also measures the allocator: zarr-python allocates a shard's buffers anew, glibc gives buffers of that size back
to the system, and touching fresh pages doubles its cost. With an allocator that keeps memory (MALLOC_MMAP_THRESHOLD_
and MALLOC_TRIM_THRESHOLD_ above the size of a shard) it writes about twice as fast, and ours as before.
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

from clt.capture.storage.local import LocalStorage
from clt.capture.store.shard_rows import write_rows
from clt.launch.bench.common.report import Row, Table, measured_row
from clt.launch.bench.common.timing import Rival, Timing, interleave
from clt.launch.bench.store.data import BenchStore, Bits, Layout, ReadBlock, arrays_of, in_blocks, random_bits
from clt.launch.bench.store.peers import Peer, sync_tree

OURS, OUR_STORE, MEMCPY = "clt shard", "clt store", "memcpy"
#: Blocks are read into a ring of this size: a window is larger than the caches, and so must its stand-in be.
_RING_BYTES = 64 << 20
_NOT_INSTALLED = "not installed"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Someone who reads blocks of a store.

    Attributes:
        name: who.
        checksums: whether checksums are verified.
        path: the file or folder that is read.
        open: gives the function that reads a block; None if the library is not installed.
    """

    name: str
    checksums: bool
    path: Path
    open: Callable[[], AbstractContextManager[ReadBlock]] | None


@contextmanager
def readers(store: BenchStore, peers: Sequence[Peer], folder: Path) -> Iterator[list[Reader]]:
    """Everyone who reads a store: ours first, then the peers, each checked to read the right bytes.

    Args:
        store: the store.
        peers: the rivals.
        folder: an existing folder for the copies of those who cannot read the store; they are removed at the end.

    Yields:
        The readers.
    """
    blocks = in_blocks(store.expected, store.layout)
    everyone = [
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
            everyone.append(Reader(name=peer.name, checksums=peer.checksums, path=path, open=opened))
        for reader in everyone:
            if reader.open is not None:
                with reader.open() as read:
                    _check(reader.name, read, blocks)
        yield everyone


def read_table(key: str, title: str, store: BenchStore, everyone: Sequence[Reader], rounds: int) -> Table:
    """Reads all blocks in a random order from the page cache into arrays that exist already.

    Args:
        key: of the table.
        title: of the table.
        store: the store.
        everyone: from `readers`.
        rounds: rounds.

    Returns:
        The table; its last row is the physical limit, memcpy of the same blocks.
    """
    layout = store.layout
    blocks, ring = in_blocks(store.expected, layout), _Ring(layout)

    def memcpy(block: int, out: Bits) -> None:
        np.copyto(out, blocks[block])

    with ExitStack() as stack:
        opened = {r.name: stack.enter_context(r.open()) for r in everyone if r.open is not None} | {MEMCPY: memcpy}
        rivals = [Rival(name=name, run=partial(ring.fill, read)) for name, read in opened.items()]
        timings = interleave(rivals, rounds)
    checksums = {reader.name: reader.checksums for reader in everyone} | {MEMCPY: False}
    return make_table(key, title, layout, rounds, checksums, timings)


def cold_table(key: str, title: str, store: BenchStore, everyone: Sequence[Reader], rounds: int) -> Table:
    """Opens and reads all blocks in a random order after the system has been told to forget them.

    Args:
        key: of the table.
        title: of the table.
        store: the store.
        everyone: from `readers`.
        rounds: rounds.

    Returns:
        The table, without measurements where the file system keeps its files in memory.
    """
    layout, ring = store.layout, _Ring(store.layout)

    def run(open_reader: Callable[[], AbstractContextManager[ReadBlock]]) -> None:
        with open_reader() as read:
            ring.fill(read)

    timings: dict[str, Timing] = {}
    possible = _forgets(store.array)
    if possible:
        rivals = [
            Rival(name=r.name, run=partial(run, r.open), before=partial(_evict, r.path))
            for r in everyone
            if r.open is not None
        ]
        timings = interleave(rivals, rounds)
    reason = _NOT_INSTALLED if possible else "the system cannot forget these files"
    checksums = {reader.name: reader.checksums for reader in everyone}
    return make_table(key, title, layout, rounds, checksums, timings, reason)


def write_table(
    key: str, title: str, layout: Layout, peers: Sequence[Peer], folder: Path, rounds: int, durable: bool
) -> Table:
    """Writes the same array, one shard after the other where the format has shards.

    Args:
        key: of the table.
        title: of the table.
        layout: the array.
        peers: the rivals.
        folder: an existing folder for what is written; everything is removed again after each round.
        rounds: rounds.
        durable: with fsync of every file and folder on all sides, else without any.

    Returns:
        The table.
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
    rivals = [Rival(name=OURS, run=partial(ours, path), after=partial(_remove, path))]
    writers = [peer for peer in peers if peer.writes]
    for peer in writers:
        if peer.installed:
            rivals.append(Rival(name=peer.name, run=partial(theirs, peer, path), after=partial(_remove, path)))
    timings = interleave(rivals, rounds)
    checksums = {OURS: True, **{peer.name: peer.checksums for peer in writers}}
    return make_table(key, title, layout, rounds, checksums, timings)


class _Ring:
    """Arrays that blocks are read into, again and again."""

    def __init__(self, layout: Layout) -> None:
        block_bytes = layout.nbytes // layout.blocks
        count = min(layout.blocks, max(1, _RING_BYTES // block_bytes))
        # Ones, not empty: pages that were never touched would be counted as reading.
        self._slots = np.ones((count, *layout.block_shape), np.uint16)
        self._order = np.random.default_rng(0).permutation(layout.blocks).tolist()

    def fill(self, read: ReadBlock) -> None:
        """Reads every block once."""
        for number, block in enumerate(self._order):
            read(block, self._slots[number % len(self._slots)])


def _check(name: str, read: ReadBlock, blocks: Bits) -> None:
    out = np.empty(blocks.shape[1:], np.uint16)
    for block, expected in enumerate(blocks):
        out[...] = 0xFFFF  # no stored value has these bits
        read(block, out)
        assert np.array_equal(out, expected), f"{name} reads block {block} wrongly"


def make_table(
    key: str,
    title: str,
    layout: Layout,
    rounds: int,
    checksums: dict[str, bool],
    timings: dict[str, Timing],
    absent: str = _NOT_INSTALLED,
) -> Table:
    """A table from timings.

    Args:
        key: of the table.
        title: of the table.
        layout: what was moved in every round.
        rounds: rounds.
        checksums: whether they are verified, by name, in the order of the rows.
        timings: by name; who has none is absent.
        absent: why.
    """
    rows = [
        measured_row(name, checks, timings[name], layout.nbytes)
        if name in timings
        else Row(name=name, checksums=checks, absent=absent)
        for name, checks in checksums.items()
    ]
    return Table(
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
    """Tells the system to forget what it holds of files; only clean pages that nobody maps are forgotten."""
    for file in _files(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _forgets(path: Path) -> bool:
    """Whether the first bytes of files below a folder have to be fetched once they were evicted."""
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
