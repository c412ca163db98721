"""Windows of a store in memory, prefetched by reading threads, and the batches gathered from them.

Each window has a slot. The windows are known in the order in which batches need them, so a free slot is immediately
assigned to the next window, and a batch is one gather over all slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.reading.batch_buffers import BatchBuffers, BufferSizes, HostBuffers
from clt.capture.reading.blocks import BlockSource
from clt.capture.store.arrays import TOKEN_DTYPES
from clt.records import TokenTable

_TOKEN_DTYPES = {field.name: np.dtype(TOKEN_DTYPES[field.name]) for field in fields(TokenTable)}


@dataclass(frozen=True, kw_only=True)
class WindowRead:
    """A window to read, and the rows of it that a stream takes.

    Attributes:
        stream: number of the stream.
        segments: (block, first row, one past the last row), counting the rows of each block that pass the filter.
        picks: returns the rows of the concatenated segments that the stream takes, in order; called by a reading
            thread.
    """

    stream: int
    segments: Sequence[tuple[int, int, int]]
    picks: Callable[[], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class GatheredRows:
    """A gathered batch, streams in order.

    Attributes:
        acts: [S,B,D].
        tokens: [B], on the host.
        ready: on a CUDA device, the event after which `acts` may be read.
    """

    acts: Tensor
    tokens: TokenTable
    ready: torch.cuda.Event | None


def pool_bytes(source: BlockSource, sizes: BufferSizes) -> int:
    """Bytes of a pool: the slots with their token columns, one batch as stored, and the batches kept for reuse."""
    return sizes.memory_bytes(source) + sizes.rows * sum(dtype.itemsize for dtype in _TOKEN_DTYPES.values())


class WindowPool:
    """Prefetches windows and gathers batches from them; used by one thread.

    With at least one slot per stream it cannot deadlock: slots are assigned in the order of need, so when the next
    window has none, all slots hold windows needed before it; once finished windows have freed theirs, that is at most
    one per other stream, which leaves one slot. A batch that has to wait for a window first gathers the rows it has, so
    that finished windows always free their slots.

    Args:
        source: source of the rows.
        sizes: sizes of the buffers; at least one slot per stream. A slot has room for a whole block behind the rows of
            a window's other blocks, because blocks are read whole.
        readings: the windows to read, in the order in which batches need them.
        reader_threads: number of reading threads.
        slots: the buffers; default: in host memory.
    """

    def __init__(
        self,
        source: BlockSource,
        sizes: BufferSizes,
        readings: Iterator[WindowRead],
        reader_threads: int,
        slots: BatchBuffers | None = None,
    ) -> None:
        self._source, self._slot_rows, self._readings = source, sizes.slot_rows, readings
        self._slots = HostBuffers(source, sizes) if slots is None else slots
        self._tokens = {name: np.empty(sizes.rows, dtype) for name, dtype in _TOKEN_DTYPES.items()}
        self._free = deque(range(sizes.slots))
        self._coming: deque[_PendingWindow] = deque()
        self._open: dict[int, _OpenWindow] = {}
        self._spent: list[int] = []
        self._readers = ThreadPoolExecutor(reader_threads, thread_name_prefix="activation-reader")

    def batch(self, takes: Iterable[tuple[int, int]]) -> GatheredRows:
        """The next batch.

        Args:
            takes: (stream, number of rows) in the order of the batch, which `readings` must follow.

        Returns:
            The batch.

        Raises:
            StoreError: a shard is missing, truncated or damaged.
        """
        takes = list(takes)
        n_rows = sum(rows for _, rows in takes)
        tokens = {name: np.empty(n_rows, dtype) for name, dtype in _TOKEN_DTYPES.items()}
        self._slots.begin(n_rows)
        gathered = 0
        parts: list[NDArray[np.int64]] = []
        for stream, rows in takes:
            while rows:
                window = self._open.get(stream)
                if window is None:
                    if not self._is_next_there():
                        gathered, parts = self._gather(parts, tokens, gathered), []
                    window = self._enter(stream)
                part = window.rows[window.taken : window.taken + rows]
                parts.append(part)
                window.taken += len(part)
                rows -= len(part)
                if window.taken == len(window.rows):
                    self._spent.append(self._open.pop(stream).slot)
        self._gather(parts, tokens, gathered)
        acts, ready = self._slots.finish()
        table = TokenTable(**{name: torch.from_numpy(column) for name, column in tokens.items()})
        return GatheredRows(acts=acts, tokens=table, ready=ready)

    def close(self) -> None:
        """Stops the reading threads after their current reads."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _is_next_there(self) -> bool:
        return bool(self._coming) and self._coming[0].rows.done()

    def _gather(self, parts: list[NDArray[np.int64]], tokens: dict[str, NDArray[Any]], first: int) -> int:
        """Gathers the batch's rows from `first` on, then assigns free slots to the next windows; returns the end."""
        stop = first
        if parts:
            index = np.concatenate(parts)
            stop += len(index)
            self._slots.add(first, index)
            for name, column in self._tokens.items():
                np.take(column, index, out=tokens[name][first:stop], mode="clip")
        self._free.extend(self._spent)
        self._spent.clear()
        while self._free:
            reading = next(self._readings, None)
            if reading is None:
                break
            slot = self._free.popleft()
            rows = self._readers.submit(self._read, slot, reading)
            self._coming.append(_PendingWindow(reading.stream, slot, rows))
        return stop

    def _enter(self, stream: int) -> _OpenWindow:
        """Waits for the next window and opens it for its stream."""
        window = self._coming.popleft()
        assert window.stream == stream, "readings are not in the order in which batches need them"
        entered = self._open[stream] = _OpenWindow(window.slot, window.rows.result())
        return entered

    def _read(self, slot: int, reading: WindowRead) -> NDArray[np.int64]:
        rows = slice(slot * self._slot_rows, (slot + 1) * self._slot_rows)
        tokens = {name: column[rows] for name, column in self._tokens.items()}
        return self._slots.fill(slot, partial(_fill, self._source, reading, tokens))


@dataclass(frozen=True)
class _PendingWindow:
    """A window with a slot, possibly still being read."""

    stream: int
    slot: int
    rows: Future[NDArray[np.int64]]


@dataclass
class _OpenWindow:
    """A window that a stream is reading: its rows in the pool, in order, and the number already taken."""

    slot: int
    rows: NDArray[np.int64]
    taken: int = 0


def _fill(
    source: BlockSource,
    reading: WindowRead,
    tokens: dict[str, NDArray[Any]],
    acts: NDArray[Any],
    scales: NDArray[np.float32] | None,
) -> tuple[NDArray[np.int64], int]:
    """Reads a window's blocks consecutively into a slot.

    A block needs C rows; the next one starts right behind the n rows of it that pass the filter. Passing rows beyond
    the first n are first moved into the places of dropped ones, so few rows move when few are dropped.

    Returns:
        The slot's rows that the stream takes, in order, and the number of filled rows.
    """
    places, base = [], 0
    for block, first, stop in reading.segments:
        kept = source.kept(block)
        rows = np.arange(first, stop) if kept is None else kept[first:stop]
        area = slice(base, base + source.chunk_tokens)
        block_acts, block_scales = acts[:, area], None if scales is None else scales[:, area]
        source.read_into(block, block_acts, block_scales)
        place = _compact(rows, block_acts, block_scales)
        columns = source.tokens(block)
        for name, column in tokens.items():
            if kept is None and first == 0:  # slices are several times faster
                column[base : base + stop] = columns[name][:stop]
            else:
                column[area][place] = columns[name][rows]
        places.append(place + base)
        base += len(rows)
    return np.concatenate(places)[reading.picks()], base


def _compact(rows: NDArray[np.int64], acts: NDArray[Any], scales: NDArray[np.float32] | None) -> NDArray[np.int64]:
    """Moves the n passing rows (ascending) of a block among its first n; returns the place of each."""
    n = len(rows)
    stay = int(np.searchsorted(rows, n))
    if stay == n:
        return rows
    vacant = np.ones(n, np.bool_)
    vacant[rows[:stay]] = False
    place = np.concatenate([rows[:stay], np.flatnonzero(vacant)])
    for site_acts in acts:
        site_acts[place[stay:]] = site_acts[rows[stay:]]
    if scales is not None:
        scales[:, place[stay:]] = scales[:, rows[stay:]]
    return place
