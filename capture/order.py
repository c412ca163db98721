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
class WindowSlice:
    """Rows of one window that a batch takes.

    Attributes:
        stream: virtual stream.
        window: number of the window within its stream and epoch.
        start: first row, counted in the window's shuffled order.
        stop: one past the last row.
    """

    stream: int
    window: int
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

    def slices(self, step: int, stream: int) -> list[WindowSlice]:
        """What a step takes from a stream, in order; found in O(log blocks)."""
        share = self.batch_rows // self.streams
        position, stop = step * share, (step + 1) * share
        found = []
        while position < stop:
            window = self._window_at(stream, position)
            first, last = self._window_bounds(stream, window)
            until = min(stop, last)
            found.append(WindowSlice(stream, window, position - first, until - first))
            position = until
        return found

    def window_blocks(self, stream: int, window: int) -> list[tuple[int, int, int]]:
        """Segments (block, first row, one past last row) that make up a window, in unshuffled order."""
        base = stream * self._stream_rows
        first, last = self._window_bounds(stream, window)
        segments = []
        index = self._block_at(base + first)
        while index < len(self._ends) and self._start(index) < base + last:
            begin, end = self._start(index), int(self._ends[index])
            low, high = max(begin, base + first), min(end, base + last)
            if low < high:
                segments.append((int(self._blocks[index]), low - begin, high - begin))
            index += 1
        return segments

    def window_permutation(self, stream: int, window: int) -> NDArray[np.int64]:
        """Shuffled order of a window's rows: its i-th row is row `result[i]` of its segments laid end to end."""
        first, last = self._window_bounds(stream, window)
        return permutation(last - first, self.seed, (_WINDOW, self.epoch, stream, window))

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
            for piece in self.slices(step, stream):
                segments = self.window_blocks(stream, piece.window)
                line = np.concatenate(
                    [np.stack([np.full(b - a, block), np.arange(a, b)], axis=1) for block, a, b in segments]
                )
                parts.append(line[self.window_permutation(stream, piece.window)][piece.start : piece.stop])
        return np.concatenate(parts)

    def _start(self, index: int) -> int:
        return int(self._ends[index - 1]) if index else 0

    def _block_at(self, row: int) -> int:
        """Position, in the permuted line, of the block that holds a row; empty blocks are passed over."""
        return int(np.searchsorted(self._ends, row, side="right"))

    def _window_at(self, stream: int, position: int) -> int:
        base = stream * self._stream_rows
        return (self._block_at(base + position) - self._block_at(base)) // self._window_blocks

    def _window_bounds(self, stream: int, window: int) -> tuple[int, int]:
        """First row and one past the last row of a window, counted from the start of its stream."""
        base = stream * self._stream_rows
        index = self._block_at(base) + window * self._window_blocks
        last_block = min(index + self._window_blocks, len(self._ends)) - 1
        return max(self._start(index) - base, 0), min(int(self._ends[last_block]) - base, self._stream_rows)
