"""Test processes forked from a server that has imported everything, so that one starts in milliseconds.

A module of workers calls `serve` when it is run; a test starts it with `WorkerServer`. A worker is a process like any
other, and what kills it is a real SIGKILL, at a point of its work (`KillPoint`) or after some time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]


class WorkerServer:
    """Starts worker processes, waits for them and kills them.

    Args:
        module: module that calls `serve` when it is run.
        folder: for the log of what all workers print.
        environment: variables of the workers, besides those of this process.

    Attributes:
        log: output of the workers.
        alive: process ids of workers that have not been waited for.
    """

    def __init__(self, module: str, folder: Path, **environment: str) -> None:
        self.log, self.alive = folder / "workers.log", set[int]()
        with self.log.open("wb") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
            )

    def fork(self, **job: Any) -> int:
        """Process id of a new worker, which does the job."""
        process: int = self._ask(fork=job)
        self.alive.add(process)
        return process

    def wait(self, process: int = -1, options: int = 0, timeout: float = 240) -> tuple[int, int]:
        """Process id and exit code of the next worker that ends; negative: the signal that ended or stopped it.

        Args:
            process: wait for this one alone; -1: for any.
            options: of `os.waitpid`; `os.WUNTRACED`: a worker that stops counts as well.
            timeout: seconds after which all workers are killed and the test fails.
        """
        timer = threading.Timer(timeout, self.kill_all)
        timer.start()
        try:
            found, status = self._ask(wait=[process, options])
            assert timer.is_alive(), f"workers hang; see {self.log}"
        finally:
            timer.cancel()
        if os.WIFSTOPPED(status):
            return found, -os.WSTOPSIG(status)
        self.alive.discard(found)
        return found, os.waitstatus_to_exitcode(status)

    def kill(self, process: int) -> None:
        """Kills a worker, unless it has just been waited for."""
        if process in self.alive:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def kill_all(self) -> None:
        """Kills the workers that are alive."""
        for process in list(self.alive):
            self.kill(process)

    def close(self) -> None:
        """Ends the workers and the server."""
        self.kill_all()
        self._server.communicate()

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def serve(work: Callable[..., int], prepare: Callable[[], None] = lambda: None) -> None:
    """Forks a worker for each request of a `WorkerServer`, and answers when one ends.

    Args:
        work: does a job, given its fields; returns the exit code. The process then ends at once: tearing down an
            interpreter of this size takes more than a second.
        prepare: imports, before any worker is forked, what all of them need.
    """
    # Output of libraries goes to the log; only answers use the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer: Any = os.waitpid(*request["wait"])
        else:
            answer = os.fork()
            if answer == 0:
                status = 1
                try:
                    status = work(**request["fork"])
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Time at which a process is killed: at a point of its work, or some seconds after its start.

    Attributes:
        point: name of a point, or "random".
        arrival: kill at this arrival at the point, counted from 1.
        delay: seconds, of "random".
    """

    point: str
    arrival: int = 1
    delay: float = 0.0

    def sooner(self) -> Self:
        """An earlier one, which a process is likelier to live to see."""
        return replace(self, arrival=(self.arrival + 1) // 2, delay=self.delay / 2)


class KillPoint:
    """The point of a process's work at which the process, or another, is killed; every step is noted in a file.

    Args:
        trace: file that holds the last step.
        point: a step, and a pattern of the files with which it is taken; None: no kill.
        arrival: kill at this arrival at the point, counted from 1.
    """

    def __init__(self, trace: Path, point: tuple[str, str] | None, arrival: int) -> None:
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._point, self._left = point, arrival

    def reached(self, step: str, file: str) -> bool:
        """Notes a step; true at the one at which to kill."""
        os.pwrite(self._trace, f"{step} {file}".ljust(120).encode(), 0)
        if self._point is None or step != self._point[0] or not re.fullmatch(self._point[1], file):
            return False
        self._left -= 1
        return self._left == 0
