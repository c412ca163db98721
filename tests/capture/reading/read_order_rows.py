"""The rows of a batch, step by step from the definition of the read order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clt.capture.reading.read_order import ReadOrder


def rows_of_batch(order: ReadOrder, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
    """The (block, row within block) pairs of a rank's batch, in order.

    Args:
        order: of the epoch.
        step: step within the epoch.
        rank: rank on the data axis.
        world: ranks on the data axis.

    Returns:
        [batch_rows / world, 2] int64.
    """
    parts = []
    for stream in order.streams_of(rank, world):
        taken, stop = step * order.share, (step + 1) * order.share
        while taken < stop:
            visit = order._visit(stream, taken)
            segments = order.window_segments(stream, visit.window)
            line = np.array([(block, row) for block, first, last in segments for row in range(first, last)])
            shuffled = line[order.window_permutation(stream, visit.window)]
            parts.append(shuffled[visit.first : visit.stop][: stop - taken])
            taken += len(parts[-1])
    return np.concatenate(parts)
