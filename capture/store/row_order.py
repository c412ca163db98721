"""Packing of samples into units and permutation of rows: pure functions with equal results on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clt.errors import ConfigError

_UNIT_ROWS = 0  # names this use among the permutations of a seed; 1 and 2 are those of `clt.capture.reading.read_order`
_MASK = 2**64 - 1


def permutation(n: int, seed: int, stream: tuple[int, int, int, int]) -> NDArray[np.int64]:
    """A pseudo-random permutation that is the same on every machine and with every version of numpy.

    Args:
        n: number of items.
        seed: seed of the job.
        stream: four numbers that identify the purpose; different ones give independent permutations.

    Returns:
        [n] int64, each of 0..n-1 once, in the order of raw Philox words (numpy guarantees those, not `permutation`).
    """
    kind, *counter = stream
    key, start = np.array([seed & _MASK, kind], np.uint64), np.array([0, *counter], np.uint64)
    words = np.random.Philox(key=key, counter=start).random_raw(n)
    # Sorting is several times faster than argsort: the lowest bits of each word hold its position.
    places = np.uint64((1 << n.bit_length()) - 1)
    words = (words & ~places) | np.arange(n, dtype=np.uint64)
    words.sort()
    return (words & places).astype(np.int64)


def unit_permutation(n_rows: int, seed: int, unit: int) -> NDArray[np.int64]:
    """Order in which a unit's rows are stored.

    Args:
        n_rows: rows of the unit.
        seed: seed of the store.
        unit: number of the unit.

    Returns:
        [n_rows] int64: stored row i is row `result[i]` of the unit's samples laid end to end.
    """
    return permutation(n_rows, seed, (_UNIT_ROWS, unit, 0, 0))


def pack_units(lengths: Sequence[int], rows_per_unit: int) -> tuple[int, ...]:
    """Packs samples into units of at most `rows_per_unit` tokens, greedily and in order.

    Args:
        lengths: tokens of each sample, each > 0.
        rows_per_unit: capacity of a unit in tokens.

    Returns:
        First sample of each unit, followed by the number of samples.

    Raises:
        ConfigError: a sample has more tokens than a unit.
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
