"""The parent of crash-test workers: starts them from one process that has imported everything, and waits for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clt.capture.store.schema import StoreDtype

from .crash_worker import Job

#: Exit status of a worker that captured a unit which another had committed.
TOLD_THAT_ANOTHER_WON = 3


class Nursery:
    """Starts workers from one process that has imported everything, and waits for them."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "workers.log"
        self.alive: set[int] = set()
        self.jobs = 0
        self._folder = folder
        with self.log.open("wb") as errors:
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("crash_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def start(self, root: Path, store_dtype: StoreDtype, **job: Any) -> tuple[int, Path]:
        """Process id of a new worker, and the file that says what it did last."""
        self.jobs += 1
        trace = self._folder / f"trace-{self.jobs}"
        process = self._ask(fork=asdict(Job(store=str(root), trace=str(trace), store_dtype=store_dtype, **job)))
        self.alive.add(process)
        return process, trace

    def wait(self, process: int = -1) -> tuple[int, int]:
        """Process id and exit status of the next worker that ends or stops; negative: the signal that did it."""
        watchdog = threading.Timer(120, self.kill_all)
        watchdog.start()
        found, status = self._ask(wait=process)
        assert watchdog.is_alive(), f"workers hang; see {self.log}"
        watchdog.cancel()
        if os.WIFSTOPPED(status):
            return found, -os.WSTOPSIG(status)
        self.alive.discard(found)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, TOLD_THAT_ANOTHER_WON) or code < 0, self.log.read_text()[-4000:]
        return found, code

    def kill(self, process: int) -> None:
        """Kills a worker, unless it has just been waited for."""
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    def kill_all(self) -> None:
        for process in list(self.alive):
            self.kill(process)

    def close(self) -> None:
        self.kill_all()
        self._server.communicate()

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())
