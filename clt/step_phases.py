"""Phases of a training step, for benchmarks and profilers that observe them.

The functions of training that do the work of a phase are marked with `phase`; an observer that is installed with
`observed_by` is notified of the beginning and end of each. Without one, a mark costs about a microsecond per call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol

Phase = Literal["encode", "exchange", "decode", "backward", "optimizer"]


class StepObserver(Protocol):
    """Observer of the phases of this process's training steps."""

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Entered when a phase begins and left when it ends; phases nest."""


_observers: list[StepObserver] = []


@contextmanager
def observed_by(observer: StepObserver) -> Iterator[None]:
    """Reports phases to an observer while the block runs; global, since autograd has threads of its own on a GPU."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Marks a block or, as a decorator, a function as a phase of a training step."""
    with _observers[-1].phase(name) if _observers else nullcontext():
        yield
