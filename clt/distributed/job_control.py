"""What the outside world does to a running job: signals that ask it to stop, and ranks that go missing.

A signal is taken down by a thread, not by Python's handler, which waits until the main thread comes back from whatever
it is doing: the second signal must end even a process that waits for a lost rank. Who is missing is found out in
`clt.distributed.watchdog`.
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

#: Signals that ask a job to write a checkpoint and end.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: Signals in the first so many seconds are one request: torchrun passes on the Ctrl-C that the terminal sends to all,
#: and takes its time on a busy machine.
ONE_REQUEST_SECONDS = 3.0


@dataclass
class JobControl:
    """What a training loop and the threads beside it tell each other.

    Attributes:
        stop_requested: the loop finishes the step in hand, writes a checkpoint and ends.
        progress: grows with whatever the loop gets done.
    """

    stop_requested: bool = False
    progress: int = 0


@contextmanager
def stop_on_signals() -> Iterator[JobControl]:
    """Lets the first SIGTERM or SIGINT request a stop and the second end the process; restores the handlers afterwards.

    Outside of the main thread, which alone may set handlers, it does nothing.
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
    """A handler that Python may call late; `_listen` has read the signal's number from the wake-up descriptor."""


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
                f"{name}: stopping after this step, with a checkpoint; once more, "
                f"after {ONE_REQUEST_SECONDS:g} s, ends at once",
                file=sys.stderr,
                flush=True,
            )
        elif time.monotonic() - first > ONE_REQUEST_SECONDS:
            print(f"{name} again: ending without a checkpoint", file=sys.stderr, flush=True)
            os._exit(128 + number)
