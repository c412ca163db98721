"""The parent of ranks that are killed: starts them from one process that has imported everything, and waits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kill_worker import POINTS, Job
from launched import free_port


@dataclass(frozen=True, kw_only=True)
class Blow:
    """When a rank is killed: when a rank comes to a point, or so many seconds after training began.

    Attributes:
        point: one of `POINTS`, or "random".
        victim: rank that is killed.
        striker: rank that comes to the point.
        arrival: for the so-manieth time.
        delay: seconds, of "random".
        alone: whether the other rank is left to find out and end by itself.
    """

    point: str
    victim: int = 0
    striker: int = 0
    arrival: int = 1
    delay: float = 0.0
    alone: bool = False

    def sooner(self) -> Blow:
        """One that is likelier to come in time."""
        return replace(self, arrival=(self.arrival + 1) // 2, delay=self.delay / 2)


def draw_blows(points: Sequence[str], at_random: int, world: int, writers: int, rng: random.Random) -> list[Blow]:
    """Blows at points and at random moments, in random order, on random ranks.

    Args:
        points: of `POINTS`.
        at_random: how many at random moments.
        world: ranks of the job.
        writers: ranks that write layer files; everything else is written by the first.
        rng: draws.
    """
    blows = []
    for point in points:
        layers = "weights" in point or "optimizer" in point
        striker, arrival = rng.randrange(writers if layers else 1), rng.randint(1, 5 if layers else 2)
        blows.append(Blow(point=point, victim=rng.randrange(world), striker=striker, arrival=arrival))
    blows += [Blow(point="random", victim=rng.randrange(world), delay=rng.uniform(0, 0.6)) for _ in range(at_random)]
    blows = [replace(blow, alone=world > 1 and rng.random() < 0.25) for blow in blows]
    rng.shuffle(blows)
    return blows


class Nursery:
    """Starts ranks, waits for them, and kills them at random moments."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "ranks.log"
        self._folder = folder
        self._jobs = 0
        self._alive: set[int] = set()
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": ""}
        with self.log.open("wb") as errors:
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("kill_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **quiet},
            )

    def start(self, output: Path, mesh: dict[str, Any], world: int, dooms: Mapping[int, Any]) -> tuple[list[int], Path]:
        """Starts the ranks of a job; returns their processes, and the folder in which they note what they do.

        Args:
            output: folder of the job.
            mesh: keys of `mesh`.
            world: ranks.
            dooms: by rank, further fields of its `Job`; None: the rank does not come.
        """
        self._jobs += 1
        scratch, port = self._folder / f"job-{self._jobs}", free_port()
        scratch.mkdir()
        common = {"output": str(output), "scratch": str(scratch), "world": world, "port": port, "mesh": mesh}
        jobs = [
            Job(rank=rank, **common, **dooms.get(rank, {})) for rank in range(world) if dooms.get(rank, {}) is not None
        ]
        processes = [self._ask(fork=asdict(job)) for job in jobs]
        self._alive = set(processes)
        return processes, scratch

    def wait(self) -> tuple[int, int]:
        """Process and exit code of the next rank that ends; negative: the signal that did it."""
        watchdog = threading.Timer(180, self.kill_all)
        watchdog.start()
        process, status = self._ask(wait=-1)
        assert watchdog.is_alive(), f"ranks hang; see {self.log}"
        watchdog.cancel()
        self._alive.discard(process)
        return process, os.waitstatus_to_exitcode(status)

    def run(self, output: Path, mesh: dict[str, Any], world: int, blow: Blow | None) -> list[int]:
        """Runs a job to its end or to the blow; returns the exit codes of its ranks, negative for signals."""
        named = blow is not None and blow.point in POINTS
        dooms = {blow.striker: {"point": blow.point, "arrival": blow.arrival, "victim": blow.victim}} if named else {}
        processes, scratch = self.start(output, mesh, world, dooms)
        killer = threading.Thread(target=self._kill_later, args=(scratch, processes, blow), daemon=True)
        killer.start()
        codes = dict.fromkeys(processes, 0)
        for _ in processes:
            process, code = self.wait()
            codes[process] = code
            if code and not (blow is not None and blow.alone):
                self.kill_all()
        killer.join()
        return [codes[process] for process in processes]

    def trains(self, scratch: Path, rank: int, process: int) -> bool:
        """Waits until a rank trains; False if it has ended before that."""
        while process in self._alive and not (scratch / f"trains_{rank}").exists():
            time.sleep(0.002)
        return process in self._alive

    def kill_all(self) -> None:
        """Kills what still runs."""
        for process in list(self._alive):
            self._kill(process)

    def close(self) -> None:
        """Ends the server."""
        self.kill_all()
        self._server.communicate()

    def _kill_later(self, scratch: Path, processes: list[int], blow: Blow | None) -> None:
        if blow is None or blow.point in POINTS:
            return
        victim = processes[blow.victim]
        if self.trains(scratch, blow.victim, victim):
            time.sleep(blow.delay)
        if victim in self._alive:
            self._kill(victim)

    def _kill(self, process: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())
