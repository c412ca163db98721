"""Timing of several implementations in turns, so that other load of the machine affects all of them alike.

Wall time varies with that load, so the best round is reported beside the median. CPU seconds, of all threads of the
process and of the kernel on its behalf, vary far less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

#: Written before each run on a GPU; several times the size of its L2 cache.
_FLUSH_BYTES = 512 * 2**20


def nothing() -> None:
    """Default of set-up and clean-up."""


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """Work to be timed.

    Attributes:
        name: row of the table.
        run: the work.
        before: sets up a run; not timed.
        after: cleans up after a run; not timed.
    """

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = nothing
    after: Callable[[], object] = nothing


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Durations of the same work, one per round.

    Attributes:
        wall_s: wall-clock seconds.
        cpu_s: CPU seconds of all threads of this process, user and system.
    """

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    @property
    def best_s(self) -> float:
        """Wall-clock seconds of the shortest round."""
        return min(self.wall_s)

    @property
    def median_s(self) -> float:
        """Wall-clock seconds of the median round."""
        return statistics.median(self.wall_s)

    @property
    def best_cpu_s(self) -> float:
        """Least CPU seconds of a round."""
        return min(self.cpu_s)

    @property
    def median_cpu_s(self) -> float:
        """CPU seconds of the median round."""
        return statistics.median(self.cpu_s)


def interleave(
    runs: Sequence[TimedRun],
    rounds: int,
    *,
    wall: Callable[[], float] = time.perf_counter,
    cpu: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Times everything once per round; each round starts with another run, so that the order changes.

    Args:
        runs: runs to compare, with distinct names.
        rounds: rounds, > 0.
        wall: clock, in seconds.
        cpu: CPU seconds spent so far.

    Returns:
        One timing per name, in the order of the runs.
    """
    walls: dict[str, list[float]] = {run.name: [] for run in runs}
    cpus: dict[str, list[float]] = {run.name: [] for run in runs}
    for number in range(rounds):
        shift = number % len(runs)
        for timed in (*runs[shift:], *runs[:shift]):
            timed.before()
            started, spent = wall(), cpu()
            timed.run()
            spent, ended = cpu() - spent, wall()
            timed.after()
            walls[timed.name].append(ended - started)
            cpus[timed.name].append(spent)
    return {name: Timing(wall_s=tuple(walls[name]), cpu_s=tuple(cpus[name])) for name in walls}


def time_runs(run: Callable[[], Any], device: torch.device, rounds: int) -> Timing:
    """Times warmed-up work alone, on a GPU by device events with its L2 cache overwritten before each run.

    Args:
        run: the work.
        device: device of the work.
        rounds: rounds, > 0.

    Returns:
        The rounds; no CPU seconds on a GPU.
    """
    if device.type != "cuda":
        return interleave([TimedRun(name="", run=run)], rounds)[""]
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    pairs = []
    for _ in range(rounds):
        # Keeps the device busy while the launches of the run queue up behind it.
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return Timing(wall_s=tuple(start.elapsed_time(end) / 1e3 for start, end in pairs), cpu_s=())


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Sets the number of PyTorch's threads while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
