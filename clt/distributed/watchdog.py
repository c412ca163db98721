"""Watchdog: names the rank that a distributed job waits for, and ends the job.

A rank that dies or hangs leaves the others in a collective; gloo then reports some closed connection, NCCL nothing. So
every rank writes heartbeats into the store of the rendezvous: progress and position of its main thread. When a main
thread makes no progress within the timeout, or a collective fails, the heartbeats show which rank is missing. The first
rank to detect it writes the error line into the store; every live rank prints it and exits.

One thread accesses the store and another judges, since the store may be on the machine that froze. Both count their own
iterations instead of seconds: on an overloaded machine no other rank then seems silent.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import NoReturn

import torch.distributed as dist

from clt.distributed.job_control import JobControl
from clt.errors import CLTError

#: Exit code of a rank that ends because another rank is missing.
EXIT_LOST_RANK = 3

_LONGEST_INTERVAL = 1.0
#: Intervals without a heartbeat after which a process counts as silent.
_SILENT_INTERVALS = 4
_VERDICT = "clt/verdict"
_DONE = "it was done"
_LONGEST_REASON = 200


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Heartbeat of a rank.

    Attributes:
        process: process id and host.
        beat: counter that grows while the process lives.
        progress: of `JobControl`.
        place: position of its main thread, or where that began to wait.
        waiting: whether the main thread waits in a collective.
        end: reason why the rank left the job; empty before that.
    """

    process: str = field(default_factory=lambda: f"process {os.getpid()} on {platform.node()}")
    beat: int
    progress: int
    place: str = ""
    waiting: bool = False
    end: str = ""


def find_lost(beats: Mapping[int, Heartbeat], silent_seconds: Mapping[int, float], patience: float) -> str:
    """One line that names a rank that has ended or is silent; empty when all live.

    Args:
        beats: last heartbeat by rank; ranks without one are not in it.
        silent_seconds: age of these heartbeats, at least.
        patience: seconds after which a rank counts as silent.
    """
    for rank, beat in sorted(beats.items()):
        if beat.end:
            return f"rank {rank} ({beat.process}) ended: {beat.end}; see its log"
    if silent := [rank for rank in sorted(beats) if silent_seconds[rank] > patience]:
        who = ", ".join(f"rank {rank} ({beats[rank].process})" for rank in silent)
        return f"{who} was lost, it did not answer within {patience:g} s; see its log"
    return ""


def find_behind(beats: Mapping[int, Heartbeat], world: int, timeout_seconds: float) -> str:
    """One line that names the ranks that the others have waited for, among those that live or never joined.

    Args:
        beats: last heartbeat by rank; ranks without one are not in it.
        world: number of ranks.
        timeout_seconds: seconds that the others have waited.
    """
    if absent := [str(rank) for rank in range(world) if rank not in beats]:
        return f"rank {', '.join(absent)} of {world} did not join the job within {timeout_seconds:g} s; see its log"
    # At equal progress, a rank that waits in a collective is ahead of one that has not reached it.
    done = {rank: (beat.progress, beat.waiting) for rank, beat in beats.items()}
    behind = [rank for rank in sorted(done) if done[rank] == min(done.values())]
    who = ", ".join(f"rank {rank} ({beats[rank].process}, at {beats[rank].place})" for rank in behind)
    return f"{who} did not answer within {timeout_seconds:g} s; see its log, or raise mesh.timeout_seconds"


class Watchdog:
    """The watchdog threads of one rank.

    Args:
        store: of the rendezvous; the watchdog opens a connection of its own.
        rank: of this process.
        world: number of ranks.
        control: progress of the main thread.
        timeout_seconds: longest time without progress of a main thread.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, control: JobControl, timeout_seconds: float) -> None:
        # A blocking call of the main thread on its connection must not stop the heartbeats.
        self._store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._rank, self._world, self._control = rank, world, control
        self._timeout = timeout_seconds
        self._interval = min(timeout_seconds / 10, _LONGEST_INTERVAL)
        self._patience = _SILENT_INTERVALS * self._interval
        self._main = threading.current_thread().ident
        self._over = threading.Event()
        self._end = ""
        self._asking = False
        self._proposal, self._verdict = "", ""
        #: Accesses to the store so far, and by rank the number of the one that brought its last heartbeat.
        self._beat = 0
        self._beats: dict[int, Heartbeat] = {}
        self._brought: dict[int, int] = {}
        self._progress, self._since = control.progress, time.monotonic()
        self._store_thread = threading.Thread(target=self._use_store, name="clt-watchdog-store", daemon=True)
        self._judge = threading.Thread(target=self._watch, name="clt-watchdog", daemon=True)

    def start(self) -> None:
        """Starts the threads; the first heartbeat is written at once."""
        self._store_thread.start()
        self._judge.start()

    def explain(self, error: BaseException) -> None:
        """Ends this process if its main thread fails because of another rank; else sends the other ranks its error.

        Args:
            error: not a `CLTError`, which all ranks raise alike.
        """
        if isinstance(error, RuntimeError) and (line := self._missing()):
            leave(self._agree(line))
        self._end = _short(error)
        self._agree(f"rank {self._rank} ({Heartbeat(beat=0, progress=0).process}) ended: {self._end}; see its log")

    def stop(self, end: str) -> None:
        """Ends the threads and records how this rank left the job."""
        self._end = end
        self._asking = self._rank == 0
        deadline = time.monotonic() + self._patience
        # Without a launcher the store lives in rank 0: the others leave first.
        while self._rank == 0 and not self._all_ended() and time.monotonic() < deadline:
            time.sleep(self._interval / 20)
        self._over.set()
        self._store_thread.join(self._patience)
        self._judge.join(self._patience)

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            if self._end:
                # This rank is leaving, maybe with a traceback to print.
                continue
            if self._verdict:
                leave(self._verdict)
            if self._control.progress != self._progress:
                self._progress, self._since = self._control.progress, time.monotonic()
            elif self._stalled() and (line := self._missing()):
                leave(self._agree(line))

    def _stalled(self) -> bool:
        return self._control.progress == self._progress and time.monotonic() - self._since >= self._timeout

    def _missing(self) -> str:
        """Reads heartbeats for as long as it takes to see which rank is silent; empty if none is missing."""
        self._asking = True
        first = last = self._beat
        unanswered = 0
        while unanswered <= 2 * _SILENT_INTERVALS:
            time.sleep(self._interval / 2)
            if self._end:
                # The main thread is leaving meanwhile, when the store is accessed more often too.
                return ""
            if self._verdict:
                return self._verdict
            unanswered = 0 if self._beat != last else unanswered + 1
            last = self._beat
            beats, brought = dict(self._beats), dict(self._brought)
            ages = {rank: (last - brought[rank]) * self._interval for rank in beats}
            if line := find_lost(beats, ages, self._patience):
                return line
            if last - first > _SILENT_INTERVALS + 2:
                return find_behind(beats, self._world, self._timeout) if self._stalled() else ""
        return f"rank 0, or the launcher with the job's store, did not answer within {self._patience:g} s; see its log"

    def _agree(self, line: str) -> str:
        """Verdict of the first rank that proposed one; returns when the others have had time to read it."""
        self._proposal = line
        for _ in range(2 * _SILENT_INTERVALS):
            if self._verdict:
                break
            time.sleep(self._interval / 2)
        # The store may end with this process.
        time.sleep(2 * self._interval)
        return self._verdict or line

    def _use_store(self) -> None:
        while True:
            over = self._over.is_set()
            try:
                self._exchange()
            except (dist.DistError, ConnectionError):
                # The store ended with rank 0 or its launcher. Unless the job is over, `_beat` stops growing.
                return
            if over:
                return
            self._over.wait(self._interval / 20 if self._end else self._interval)

    def _exchange(self) -> None:
        """Writes a heartbeat, reads the verdict and, when asked to, the heartbeats of the others."""
        place, waiting = _place_of(self._main)
        own = Heartbeat(
            beat=self._beat + 1, progress=self._control.progress, place=place, waiting=waiting, end=self._end
        )
        self._store.set(_key(self._rank), json.dumps(asdict(own)))
        if self._asking:
            self._read_beats()
        self._beat += 1
        if self._proposal:
            self._verdict = self._store.compare_set(_VERDICT, "", self._proposal).decode()
        elif self._store.check([_VERDICT]):
            self._verdict = self._store.get(_VERDICT).decode()

    def _read_beats(self) -> None:
        keys = [_key(rank) for rank in range(self._world)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        for key, text in zip(keys, self._store.multi_get(keys), strict=True):
            beat, rank = Heartbeat(**json.loads(text)), int(key.rpartition("/")[2])
            if rank not in self._beats or self._beats[rank].beat != beat.beat:
                # In this order: the other thread copies them in the reverse order.
                self._brought[rank] = self._beat
                self._beats[rank] = beat

    def _all_ended(self) -> bool:
        beats = dict(self._beats)
        return len(beats) == self._world and all(beat.end for beat in beats.values())


@contextmanager
def watched(store: dist.Store, rank: int, world: int, control: JobControl, timeout_seconds: float) -> Iterator[None]:
    """Runs a `Watchdog` during the block.

    Args:
        store: of the rendezvous.
        rank: of this process.
        world: number of ranks.
        control: progress of the main thread.
        timeout_seconds: longest time without progress of a main thread.
    """
    watchdog = Watchdog(store, rank, world, control, timeout_seconds)
    watchdog.start()
    end = _DONE
    try:
        yield
    except BaseException as error:
        end = _short(error)
        if not isinstance(error, CLTError):
            watchdog.explain(error)
        raise
    finally:
        watchdog.stop(end)


def leave(line: str) -> NoReturn:
    """Prints the reason and ends the process, with all its threads."""
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST_RANK)


def _key(rank: int) -> str:
    return f"clt/heartbeat/{rank}"


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]


def _place_of(thread: int | None) -> tuple[str, bool]:
    """Innermost line of this package that a thread is at, and whether it waits in a collective."""
    frame = sys._current_frames().get(thread or 0)
    waiting = False
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        waiting |= module == "torch.distributed.distributed_c10d"
        if module.startswith("clt."):
            return f"{module} line {frame.f_lineno}", waiting
        frame = frame.f_back
    return "a line outside of clt", waiting
