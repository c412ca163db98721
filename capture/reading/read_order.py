"""Shuffled read order of a store: a pure function of seed, epoch, step, rank and world size.

Each row is read once per epoch, the global batch is the same for any number of ranks, and any step is accessible
directly. A *unit* is a run of samples written together, a *block* a run of rows of one unit that is read together, a
*stream* one of V virtual readers assigned to the ranks, a *window* a run of blocks of a stream that is shuffled in
memory, and a *visit* the consecutive rows that a stream takes from a window.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clt.capture.store.row_order import permutation
from clt.errors import ConfigError

#: Largest number of virtual streams, and therefore of data ranks.
MAX_STREAMS = 64

_BLOCKS, _WINDOW = 1, 2  # name these uses among the permutations of a seed; 0 is that of `clt.capture.store.row_order`


@dataclass(frozen=True)
class Window:
    """A run of blocks of a stream that is shuffled in memory.

    Attributes:
        number: number within the stream and the epoch; ascending, with possible gaps.
        start: its first row, counted from the start of the stream's part.
        stop: one past its last row.
    """

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Visit:
    """Consecutive rows of a shuffled window that a stream takes.

    Attributes:
        stream: number of the stream.
        window: the window.
        first: first row, counted in the window's shuffled order.
        stop: one past the last row.
    """

    stream: int
    window: Window
    first: int
    stop: int


class ReadOrder:
    """Order in which the rows of a store are read in one epoch; a pure function of its arguments.

    All blocks are permuted and concatenated into a line of N rows, which is divided into V equal parts, one per stream.
    A part is divided into windows of whole blocks whose rows are shuffled: window k of stream v holds the blocks that
    begin at rows [k w - v w/V, (k+1) w - v w/V) of the part, that is fewer than w rows plus one block. A stream reads
    its windows in order. A stream whose part begins with a whole block starts v/V of that block's rows late and reads
    those rows at the end of the epoch, so that, even with equal blocks, streams reach new windows at different steps
    and the disk load is even.

    Step t takes B/V rows of every stream, streams in order; rank r of W has the streams [r V/W, (r+1) V/W), so the
    ranks' batches joined in rank order are the batch of a single rank. V is the largest power of two up to 64 that
    divides B. An epoch has floor(N/B) steps; the N mod B dropped rows differ from epoch to epoch.

    Args:
        block_rows: [blocks] rows of each block, >= 0.
        seed: random seed of the order.
        epoch: number of the epoch.
        batch_rows: B, rows of a step over all ranks.
        window_rows: largest number of rows of the windows of all streams together, which determines w; at least one
            block per window.

    Attributes:
        num_rows: N.
        streams: V.
        share: B/V, rows of a step of one stream.
        steps: steps of the epoch.
        window_rows: w; all blocks of a window except the last have fewer rows together.

    Raises:
        ConfigError: the store has fewer rows than a batch.
    """

    def __init__(
        self, block_rows: Sequence[int] | NDArray[np.int64], *, seed: int, epoch: int, batch_rows: int, window_rows: int
    ) -> None:
        rows = np.asarray(block_rows, dtype=np.int64)
        self.num_rows = int(rows.sum())
        if self.num_rows < batch_rows:
            raise ConfigError(f"batch_tokens={batch_rows} exceeds the {self.num_rows} tokens of the store; lower it")
        self.seed, self.epoch, self.batch_rows = seed, epoch, batch_rows
        self.streams = math.gcd(batch_rows, MAX_STREAMS)
        self.share = batch_rows // self.streams
        self.steps = self.num_rows // batch_rows
        largest = int(rows.max())
        self.window_rows = max(1, window_rows // self.streams - largest + 1)
        self._blocks = permutation(len(rows), seed, (_BLOCKS, epoch, 0, 0))
        edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows[self._blocks])])
        self._starts, self._ends = edges[:-1], edges[1:]
        self._part_rows = self.num_rows // self.streams
        self._entries = [self._entry(stream) for stream in range(self.streams)]

    @property
    def dropped_rows(self) -> int:
        """Rows that are not read in this epoch."""
        return self.num_rows - self.steps * self.batch_rows

    def streams_of(self, rank: int, world: int) -> range:
        """Streams of a rank.

        Raises:
            ConfigError: the ranks cannot share the streams evenly.
        """
        if self.streams % world:
            raise ConfigError(
                f"batch_tokens={self.batch_rows} is read as {self.streams} streams, which {world} data ranks cannot "
                f"share evenly; use a power of two of data ranks that divides batch_tokens"
            )
        share = self.streams // world
        return range(rank * share, (rank + 1) * share)

    def visits(self, streams: Iterable[int], step: int = 0) -> Iterator[Visit]:
        """Visits from a step to the end of the epoch, in the order in which they are needed.

        Args:
            streams: numbers of the streams to read.
            step: first step.

        Yields:
            Visits ordered by step and, within a step, by stream.
        """
        heap = [(step, stream, step * self.share) for stream in streams if step < self.steps]
        heapq.heapify(heap)
        while heap:
            _, stream, taken = heap[0]
            visit = self._visit(stream, taken)
            taken += visit.stop - visit.first
            if taken < self.steps * self.share:
                heapq.heapreplace(heap, (taken // self.share, stream, taken))
            else:
                heapq.heappop(heap)
            yield visit

    def window_at(self, stream: int, row: int) -> Window:
        """The window that holds a row of a stream's part; found in O(log blocks)."""
        base = stream * self._part_rows
        first = max(int(self._starts[self._block_at(base + row)]) - base, 0)
        number = (first + self._phase(stream)) // self.window_rows
        return Window(number, self._window_start(stream, number), self._window_start(stream, number + 1))

    def window_segments(self, stream: int, window: Window) -> list[tuple[int, int, int]]:
        """Segments (block, first row, one past the last row) of a window, in unshuffled order."""
        low, high = (stream * self._part_rows + row for row in (window.start, window.stop))
        run = slice(self._block_at(low), self._block_at(high - 1) + 1)
        blocks = zip(self._blocks[run].tolist(), self._starts[run].tolist(), self._ends[run].tolist(), strict=True)
        return [(block, max(start, low) - start, min(end, high) - start) for block, start, end in blocks if start < end]

    def window_permutation(self, stream: int, window: Window) -> NDArray[np.int64]:
        """Shuffled order of a window's rows: its i-th row is row `result[i]` of its segments laid end to end."""
        return permutation(window.stop - window.start, self.seed, (_WINDOW, self.epoch, stream, window.number))

    def _phase(self, stream: int) -> int:
        return stream * self.window_rows // self.streams

    def _entry(self, stream: int) -> int:
        """Row of its part at which a stream starts."""
        base = stream * self._part_rows
        block = self._block_at(base)
        if self._starts[block] < base:
            return 0
        return min(int(self._ends[block]) - base, self._part_rows) * stream // self.streams

    def _visit(self, stream: int, taken: int) -> Visit:
        """Next visit of a stream that has taken `taken` rows, up to the end of the window, the part or the epoch."""
        row = (self._entries[stream] + taken) % self._part_rows
        window = self.window_at(stream, row)
        stop = min(window.stop, row + self.steps * self.share - taken)
        return Visit(stream, window, row - window.start, stop - window.start)

    def _window_start(self, stream: int, number: int) -> int:
        """First row, within the stream's part, of the first block that window `number` may hold."""
        base, row = stream * self._part_rows, number * self.window_rows - self._phase(stream)
        if row <= 0:
            return 0
        index = int(self._starts.searchsorted(base + row))
        line_row = int(self._starts[index]) if index < len(self._starts) else self.num_rows
        return min(line_row - base, self._part_rows)

    def _block_at(self, row: int) -> int:
        """Position in the permuted line of the block that holds a row; skips empty blocks."""
        return int(self._ends.searchsorted(row, side="right"))
