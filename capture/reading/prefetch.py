"""Prefetching of an iterator in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def prefetch(source: Callable[[], Generator[T]], depth: int, name: str) -> Generator[T]:
    """Runs an iterator in a thread that lives until the returned generator is closed.

    Args:
        source: makes the iterator; called in the thread, which also closes it.
        depth: number of prefetched items.
        name: name of the thread.

    Yields:
        The items of the iterator, in order; its exception is raised after the items before it.
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
        except BaseException as error:  # raised in the consumer
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
