"""Names the rank that a job of several processes waits for, and ends the job.

A rank that dies or hangs leaves the others in a collective: gloo then says that some connection closed, NCCL nothing.
So every rank leaves signs of life in the store through which the ranks found each other: that its process lives, how
far its main thread is, and where. When a main thread has got nothing done within the timeout, or a collective has
failed, the signs tell which rank is missing. The first to find out writes the verdict into the store; every rank that
lives prints it and ends, wherever its main thread is stuck.

One thread talks to the store and another judges: the store may be on the machine that froze. They count their own
turns, not seconds: on a machine too busy to let them run, nobody else is silent.
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

#: Exit code of a rank that ends because another is missing.
EXIT_LOST_RANK = 3

_LONGEST_INTERVAL = 1.0
#: A process is silent when it leaves no sign in so many intervals.
_SILENT_INTERVALS = 4
_VERDICT = "clt/verdict"
_DONE = "it was done"
_LONGEST_REASON = 200


@dataclass(frozen=True, kw_only=True)
class Sign:
    """Sign of life of a rank.

    Attributes:
        process: its number and host.
        beat: grows while the process lives.
        progress: of `JobControl`.
        place: where its main thread is, or was when it began to wait.
        waiting: whether it waits in a collective.
        end: how it left the job; empty while it is there.
    """

    process: str = field(default_factory=lambda: f"process {os.getpid()} on {platform.node()}")
    beat: int
    progress: int
    place: str = ""
    waiting: bool = False
    end: str = ""


def find_lost(signs: Mapping[int, Sign], silent_seconds: Mapping[int, float], patience: float) -> str:
    """Says in one line which rank has ended or is silent; empty when all live.

    Args:
        signs: last sign by rank, absent for ranks that have left none.
        silent_seconds: age of these signs, at least.
        patience: seconds after which a rank counts as silent.
    """
    for rank, sign in sorted(signs.items()):
        if sign.end:
            return f"rank {rank} ({sign.process}) ended: {sign.end}; see its log"
    if silent := [rank for rank in sorted(signs) if silent_seconds[rank] > patience]:
        who = ", ".join(f"rank {rank} ({signs[rank].process})" for rank in silent)
        return f"{who} was lost, it did not answer within {patience:g} s; see its log"
    return ""


def find_behind(signs: Mapping[int, Sign], world: int, timeout_seconds: float) -> str:
    """Says in one line which rank the others have waited for, of those that live or never came.

    Args:
        signs: last sign by rank, absent for ranks that have left none.
        world: how many ranks the job has.
        timeout_seconds: how long they have waited.
    """
    if absent := [str(rank) for rank in range(world) if rank not in signs]:
        return f"rank {', '.join(absent)} of {world} did not join the job within {timeout_seconds:g} s; see its log"
    # Who waits in a collective has done the same work as who has yet to come there.
    done = {rank: (sign.progress, sign.waiting) for rank, sign in signs.items()}
    behind = [rank for rank in sorted(done) if done[rank] == min(done.values())]
    who = ", ".join(f"rank {rank} ({signs[rank].process}, at {signs[rank].place})" for rank in behind)
    return f"{who} did not answer within {timeout_seconds:g} s; see its log, or raise mesh.timeout_seconds"


class Watch:
    """The watching threads of one rank.

    Args:
        store: where the ranks found each other; the watch takes a connection of its own.
        rank: number of this process.
        world: how many there are.
        control: what its main thread gets done.
        timeout_seconds: how long a main thread may get nothing done.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, control: JobControl, timeout_seconds: float) -> None:
        # A blocking call of the main thread on its connection must not stop the signs of life.
        self._store = store.clone()  # type: ignore[attr-defined]  # every store has it, the stubs do not say so
        self._rank, self._world, self._control = rank, world, control
        self._timeout = timeout_seconds
        self._interval = min(timeout_seconds / 10, _LONGEST_INTERVAL)
        self._patience = _SILENT_INTERVALS * self._interval
        self._main = threading.current_thread().ident
        self._over = threading.Event()
        self._end = ""
        self._asking = False
        self._proposal, self._verdict = "", ""
        #: Talks with the store so far, and by rank the number of the one that brought its last sign.
        self._beat = 0
        self._signs: dict[int, Sign] = {}
        self._brought: dict[int, int] = {}
        self._progress, self._since = control.progress, time.monotonic()
        self._talker = threading.Thread(target=self._talk, name="clt-watch-store", daemon=True)
        self._judge = threading.Thread(target=self._watch, name="clt-watch", daemon=True)

    def start(self) -> None:
        """Starts the threads; the first sign is left at once."""
        self._talker.start()
        self._judge.start()

    def explain(self, error: BaseException) -> None:
        """Ends this process if another rank is why its main thread fails; else tells the others why it does.

        Args:
            error: not a user's, which all ranks raise alike.
        """
        if isinstance(error, RuntimeError) and (line := self._missing()):
            leave(self._agree(line))
        self._end = _short(error)
        self._agree(f"rank {self._rank} ({Sign(beat=0, progress=0).process}) ended: {self._end}; see its log")

    def stop(self, end: str) -> None:
        """Ends the threads and notes how this rank left the job."""
        self._end = end
        self._asking = self._rank == 0
        deadline = time.monotonic() + self._patience
        # The store lives in rank 0 where no launcher holds it: the others leave first.
        while self._rank == 0 and not self._all_ended() and time.monotonic() < deadline:
            time.sleep(self._interval / 20)
        self._over.set()
        self._talker.join(self._patience)
        self._judge.join(self._patience)

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            if self._end:
                # On its own way out, maybe with a traceback to show.
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
        """Looks at the signs for as long as it takes to see who is silent; empty if nobody is missing."""
        self._asking = True
        first = last = self._beat
        unanswered = 0
        while unanswered <= 2 * _SILENT_INTERVALS:
            time.sleep(self._interval / 2)
            if self._end:
                # The main thread has moved on, to its way out, where the talks are quicker too.
                return ""
            if self._verdict:
                return self._verdict
            unanswered = 0 if self._beat != last else unanswered + 1
            last = self._beat
            signs, brought = dict(self._signs), dict(self._brought)
            ages = {rank: (last - brought[rank]) * self._interval for rank in signs}
            if line := find_lost(signs, ages, self._patience):
                return line
            if last - first > _SILENT_INTERVALS + 2:
                return find_behind(signs, self._world, self._timeout) if self._stalled() else ""
        return f"rank 0, or the launcher with the job's store, did not answer within {self._patience:g} s; see its log"

    def _agree(self, line: str) -> str:
        """The verdict of the first rank that proposed one; returns when the others have had time to read it."""
        self._proposal = line
        for _ in range(2 * _SILENT_INTERVALS):
            if self._verdict:
                break
            time.sleep(self._interval / 2)
        # The store may go with this process.
        time.sleep(2 * self._interval)
        return self._verdict or line

    def _talk(self) -> None:
        while True:
            over = self._over.is_set()
            try:
                self._exchange()
            except (dist.DistError, ConnectionError):
                # The store went with rank 0 or its launcher. If that was not the job's end, `_beat` tells.
                return
            if over:
                return
            self._over.wait(self._interval / 20 if self._end else self._interval)

    def _exchange(self) -> None:
        """Leaves a sign, reads the verdict, and the signs of the others when somebody asks for them."""
        place, waiting = _place_of(self._main)
        own = Sign(beat=self._beat + 1, progress=self._control.progress, place=place, waiting=waiting, end=self._end)
        self._store.set(_key(self._rank), json.dumps(asdict(own)))
        if self._asking:
            self._read_signs()
        self._beat += 1
        if self._proposal:
            self._verdict = self._store.compare_set(_VERDICT, "", self._proposal).decode()
        elif self._store.check([_VERDICT]):
            self._verdict = self._store.get(_VERDICT).decode()

    def _read_signs(self) -> None:
        keys = [_key(rank) for rank in range(self._world)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        for key, text in zip(keys, self._store.multi_get(keys), strict=True):
            sign, rank = Sign(**json.loads(text)), int(key.rpartition("/")[2])
            if rank not in self._signs or self._signs[rank].beat != sign.beat:
                # In this order: the other thread copies them the other way round.
                self._brought[rank] = self._beat
                self._signs[rank] = sign

    def _all_ended(self) -> bool:
        signs = dict(self._signs)
        return len(signs) == self._world and all(sign.end for sign in signs.values())


@contextmanager
def watched(store: dist.Store, rank: int, world: int, control: JobControl, timeout_seconds: float) -> Iterator[None]:
    """Watches over the ranks of a job while the block runs; see `Watch` for the arguments."""
    watch = Watch(store, rank, world, control, timeout_seconds)
    watch.start()
    end = _DONE
    try:
        yield
    except BaseException as error:
        end = _short(error)
        if not isinstance(error, CLTError):
            watch.explain(error)
        raise
    finally:
        watch.stop(end)


def leave(line: str) -> NoReturn:
    """Prints why this rank ends and ends it, whatever its other threads do."""
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST_RANK)


def _key(rank: int) -> str:
    return f"clt/sign/{rank}"


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]


def _place_of(thread: int | None) -> tuple[str, bool]:
    """Innermost line of ours that a thread is at, and whether it waits in a collective."""
    frame = sys._current_frames().get(thread or 0)
    waiting = False
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        waiting |= module == "torch.distributed.distributed_c10d"
        if module.startswith("clt."):
            return f"{module} line {frame.f_lineno}", waiting
        frame = frame.f_back
    return "a line outside of clt", waiting
