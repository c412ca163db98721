"""Times rivals side by side: round after round, everyone once a round, so that a busy moment strikes all of them.

Wall time swings with whatever else the machine does, so the best round is reported beside the median. CPU seconds, of
all threads of the process and of the kernel on its behalf, swing far less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def _nothing() -> None:
    return


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Something to be timed.

    Attributes:
        name: what the table calls it.
        run: the work.
        before: puts things in place for a run; not timed.
        after: removes what a run left; not timed.
    """

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Durations of the same work, one per round.

    Attributes:
        wall_s: seconds by the clock.
        cpu_s: CPU seconds of all threads of this process, user and system.
    """

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    @property
    def best_s(self) -> float:
        """The shortest round by the clock."""
        return min(self.wall_s)

    @property
    def median_s(self) -> float:
        """The median round by the clock."""
        return statistics.median(self.wall_s)

    @property
    def best_cpu_s(self) -> float:
        """CPU seconds of the most frugal round."""
        return min(self.cpu_s)

    @property
    def median_cpu_s(self) -> float:
        """CPU seconds of the median round."""
        return statistics.median(self.cpu_s)


def interleave(
    rivals: Sequence[Rival],
    rounds: int,
    *,
    wall: Callable[[], float] = time.perf_counter,
    cpu: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Runs every rival once a round; each round starts with another one, so that nobody always follows the same one.

    Args:
        rivals: what is compared, names distinct.
        rounds: how often each of them runs, > 0.
        wall: clock, in seconds.
        cpu: CPU seconds spent so far.

    Returns:
        One timing per name, in the order of the rivals.
    """
    walls: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    cpus: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for number in range(rounds):
        shift = number % len(rivals)
        for rival in (*rivals[shift:], *rivals[:shift]):
            rival.before()
            started, spent = wall(), cpu()
            rival.run()
            spent, ended = cpu() - spent, wall()
            rival.after()
            walls[rival.name].append(ended - started)
            cpus[rival.name].append(spent)
    return {name: Timing(wall_s=tuple(walls[name]), cpu_s=tuple(cpus[name])) for name in walls}
