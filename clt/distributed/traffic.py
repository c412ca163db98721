"""Bytes that a rank moves to and from other ranks, counted where collectives start."""

from __future__ import annotations

from collections import Counter
from typing import Literal

Collective = Literal["all_gather", "reduce_scatter", "all_reduce"]


class Traffic:
    """Bytes that this rank has sent, by axis and collective; it receives as many.

    What is counted is what every algorithm that needs the least bytes sends: of an all-gather and a reduce-scatter over
    n ranks n - 1 parts, of an all-reduce 2 (n - 1) / n of the tensor.
    """

    def __init__(self) -> None:
        self._sent: Counter[tuple[str, Collective]] = Counter()

    def count(self, axis: str, collective: Collective, part_bytes: int, ranks: int) -> None:
        """Adds a collective.

        Args:
            axis: whose ranks take part.
            collective: its kind.
            part_bytes: of one rank's part, or of the whole tensor of an all-reduce.
            ranks: how many take part.
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
