"""Counts of the bytes that a rank exchanges with other ranks, taken where collectives start."""

from __future__ import annotations

from collections import Counter
from typing import Literal

Collective = Literal["all_gather", "reduce_scatter", "all_reduce"]


class Traffic:
    """Bytes that this rank has sent, by axis and collective; it receives as many.

    The counts are those of bandwidth-optimal algorithms: n - 1 parts for an all-gather or reduce-scatter over n ranks,
    2 (n - 1) / n of the tensor for an all-reduce.
    """

    def __init__(self) -> None:
        self._sent: Counter[tuple[str, Collective]] = Counter()

    def count(self, axis: str, collective: Collective, part_bytes: int, ranks: int) -> None:
        """Adds a collective.

        Args:
            axis: of the mesh.
            collective: its kind.
            part_bytes: bytes of one rank's part, or of the whole tensor of an all-reduce.
            ranks: number of ranks that take part.
        """
        whole = 2 * (ranks - 1) * part_bytes // ranks if collective == "all_reduce" else (ranks - 1) * part_bytes
        self._sent[axis, collective] += whole

    def sent(self, axis: str, collective: Collective) -> int:
        """Bytes sent so far."""
        return self._sent[axis, collective]

    def by_axis(self) -> Counter[str]:
        """Bytes sent so far on each axis."""
        totals: Counter[str] = Counter()
        for (axis, _), sent in self._sent.items():
            totals[axis] += sent
        return totals
