"""Pure functions behind capture and reading: packing samples into units, permutations, and the read order of a store.

Nothing here touches a disk, so every property that a training run relies on can be tested directly: each row exactly
once in an epoch, the same global batch for every number of ranks, and random access to any step.

Words: a *unit* is a run of samples written together; a *block* is a run of rows of one unit that is read together; a
*stream* is one of V virtual readers, dealt to the ranks; a *window* is a run of blocks of a stream, shuffled in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clt.errors import ConfigError

#: Most virtual streams, hence most data ranks.
MAX_STREAMS = 64

_UNIT_ROWS, _BLOCKS, _WINDOW = range(3)
_MASK = 2**64 - 1


def permutation(n: int, seed: int, stream: tuple[int, int, int, int]) -> NDArray[np.int64]:
    """A pseudo-random order of n things that is the same on every machine and for every version of numpy.

    Args:
        n: how many things.
        seed: seed of the job.
        stream: four numbers that name the purpose; different names give independent orders.

    Returns:
        [n] int64, each of 0..n-1 once: the ranks of raw Philox words (numpy guarantees those, not `permutation`).
    """
    kind, *counter = stream
    key, start = np.array([seed & _MASK, kind], np.uint64), np.array([0, *counter], np.uint64)
    bits = np.random.Philox(key=key, counter=start).random_raw(n)
    return np.argsort(bits, kind="stable")


def unit_permutation(n_rows: int, seed: int, unit: int) -> NDArray[np.int64]:
    """Order in which a unit's rows are stored: row i of the unit is its natural row `result[i]`."""
    return permutation(n_rows, seed, (_UNIT_ROWS, unit, 0, 0))


def pack_units(lengths: Sequence[int], rows_per_unit: int) -> tuple[int, ...]:
    """Cuts a list of samples into units of at most `rows_per_unit` tokens, greedily and in order.

    Args:
        lengths: tokens of each sample, each > 0.
        rows_per_unit: capacity of a unit in tokens.

    Returns:
        First sample of each unit, and the number of samples at the end.

    Raises:
        ConfigError: a sample does not fit into a unit.
    """
    starts, filled = [0], 0
    for sample, length in enumerate(lengths):
        if length > rows_per_unit:
            raise ConfigError(
                f"sample {sample} has {length} tokens, rows_per_unit={rows_per_unit}; raise rows_per_unit"
            )
        if filled + length > rows_per_unit:
            starts.append(sample)
            filled = 0
        filled += length
    return (*starts, len(lengths))


@dataclass(frozen=True)
class Window:
    """A run of blocks of a stream that is shuffled in memory.

    Attributes:
        number: its number within the stream and the epoch.
        start: its first row, counted from the start of the stream.
        stop: one past its last row.
    """

    number: int
    start: int
    stop: int


class ReadOrder:
    """Order in which the rows of a store are read in one epoch; a pure function of its arguments.

    All blocks are permuted and laid end to end; V streams cut that line of N rows into V equal parts. A stream goes
    through its part window by window, each window's rows shuffled. Step t takes rows [t B/V, (t+1) B/V) of every
    stream, streams in order; rank r of W has the streams [r V/W, (r+1) V/W), so the ranks' batches joined in rank
    order are the batch of a single rank. V is the largest power of two up to 64 that divides B. An epoch has
    floor(N/B) steps; the N mod B rows left over differ from epoch to epoch.

    Args:
        block_rows: [blocks] rows of each block, >= 0.
        seed: seed of the order.
        epoch: number of the epoch.
        batch_rows: B, rows of a step over all ranks.
        window_rows: rows that are shuffled together, over all streams; at least one block per stream is.

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
        self._blocks = permutation(len(rows), seed, (_BLOCKS, epoch, 0, 0))
        self._ends = np.cumsum(rows[self._blocks])
        self._stream_rows = self.num_rows // self.streams
        largest = int(rows.max())
        self._window_blocks = max(1, window_rows // (self.streams * largest))

    @property
    def dropped_rows(self) -> int:
        """Rows that this epoch leaves out."""
        return self.num_rows - self.steps * self.batch_rows

    def streams_of(self, rank: int, world: int) -> range:
        """Streams of a rank.

        Raises:
            ConfigError: the ranks cannot share the streams evenly.
        """
        if self.streams % world:
            raise ConfigError(
                f"batch_tokens={self.batch_rows} is read as {self.streams} streams, which {world} data ranks cannot "
                f"share evenly; use a power of two of ranks and a batch_tokens that it divides"
            )
        share = self.streams // world
        return range(rank * share, (rank + 1) * share)

    def window_at(self, stream: int, position: int) -> Window:
        """The window that holds a row of a stream, counted from the stream's start; found in O(log blocks)."""
        base = stream * self._stream_rows
        first_block = self._block_at(base)
        number = (self._block_at(base + position) - first_block) // self._window_blocks
        block = first_block + number * self._window_blocks
        last_block = min(block + self._window_blocks, len(self._ends)) - 1
        stop = min(int(self._ends[last_block]) - base, self._stream_rows)
        return Window(number, max(self._start(block) - base, 0), stop)

    def window_segments(self, stream: int, window: Window) -> list[tuple[int, int, int]]:
        """Segments (block, first row, one past last row) that make up a window, in unshuffled order."""
        low, high = (stream * self._stream_rows + row for row in (window.start, window.stop))
        segments = []
        index = self._block_at(low)
        while index < len(self._ends) and self._start(index) < high:
            begin, end = self._start(index), int(self._ends[index])
            if begin < end:
                segments.append((int(self._blocks[index]), max(begin, low) - begin, min(end, high) - begin))
            index += 1
        return segments

    def window_permutation(self, stream: int, window: Window) -> NDArray[np.int64]:
        """Shuffled order of a window's rows: its i-th row is row `result[i]` of its segments laid end to end."""
        return permutation(window.stop - window.start, self.seed, (_WINDOW, self.epoch, stream, window.number))

    def rows(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """The (block, row within block) pairs of a rank's batch, in order; for tests and audits.

        Args:
            step: step within the epoch.
            rank: rank on the data axis.
            world: ranks on the data axis.

        Returns:
            [batch_rows / world, 2] int64.
        """
        parts = []
        for stream in self.streams_of(rank, world):
            position, stop = step * self.share, (step + 1) * self.share
            while position < stop:
                window = self.window_at(stream, position)
                line = [(block, row) for block, a, b in self.window_segments(stream, window) for row in range(a, b)]
                shuffled = np.array(line)[self.window_permutation(stream, window)]
                until = min(stop, window.stop)
                parts.append(shuffled[position - window.start : until - window.start])
                position = until
        return np.concatenate(parts)

    def _start(self, index: int) -> int:
        return int(self._ends[index - 1]) if index else 0

    def _block_at(self, row: int) -> int:
        """Position, in the permuted line, of the block that holds a row; empty blocks are passed over."""
        return int(np.searchsorted(self._ends, row, side="right"))
