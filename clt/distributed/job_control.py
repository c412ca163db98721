"""Stop requests by SIGTERM and Ctrl-C.

Signals are handled by a thread, not by Python's handlers, which run only when the main thread returns to the
interpreter: the second signal must end even a process that waits for a lost rank (`clt.distributed.watchdog`).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

#: Signals that request a checkpoint and the end of the job.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: Signals within this time of the first count as the same request: the terminal sends Ctrl-C to all processes and
#: torchrun forwards it once more, late on a busy machine.
ONE_REQUEST_SECONDS = 3.0


@dataclass
class JobControl:
    """State shared by a training loop and the threads that watch it.

    Attributes:
        stop_requested: the loop finishes the current step, writes a checkpoint and ends.
        progress: counter of completed pieces of work.
    """

    stop_requested: bool = False
    progress: int = 0


@contextmanager
def stop_on_signals() -> Iterator[JobControl]:
    """Makes the first SIGTERM or SIGINT request a stop and the second end the process, while the block runs.

    Does nothing outside of the main thread, the only one that may set handlers.
    """
    control = JobControl()
    if threading.current_thread() is not threading.main_thread():
        yield control
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    listener = threading.Thread(target=_listen, args=(receiver, control), name="clt-signals", daemon=True)
    listener.start()
    handlers = {number: signal.signal(number, _noted) for number in STOP_SIGNALS}
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield control
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sender.close()
        listener.join()
        receiver.close()


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Does nothing: `_listen` has read the signal's number from the wake-up descriptor."""


def _listen(receiver: socket.socket, control: JobControl) -> None:
    first = 0.0
    while numbers := receiver.recv(1):
        number = numbers[0]
        if number not in STOP_SIGNALS:
            continue
        name = signal.Signals(number).name
        if not control.stop_requested:
            control.stop_requested, first = True, time.monotonic()
            print(
                f"{name}: stopping after this step with a checkpoint; "
                f"press Ctrl-C again after {ONE_REQUEST_SECONDS:g} s to exit immediately without a checkpoint",
                file=sys.stderr,
                flush=True,
            )
        elif time.monotonic() - first > ONE_REQUEST_SECONDS:
            print(f"{name} again: exiting without a checkpoint", file=sys.stderr, flush=True)
            os._exit(128 + number)
