"""Runs an iterator ahead of whoever consumes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def prefetch(source: Callable[[], Generator[T]], depth: int, name: str) -> Generator[T]:
    """Runs an iterator in one thread, which lives as long as the generator that is returned is open.

    Args:
        source: makes the iterator; called in that thread, which also closes it.
        depth: items that are made before they are asked for.
        name: of the thread.

    Yields:
        Its items; its exception is raised in its turn.
    """
    items: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def run() -> None:
        try:
            with closing(source()) as iterator:
                while room.acquire() and not stop.is_set():
                    items.put((next(iterator),))
        except StopIteration:
            items.put(None)
        except BaseException as error:  # handed over, raised by the consumer
            items.put(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item[0]
    finally:
        stop.set()
        room.release()
        thread.join()
