"""Where the time of a training step goes: a clock that knows which phase the real code is in.

The functions that do the work are wrapped while a benchmark runs; what a wrapped function calls in another phase counts
there. On a GPU the clock records events, which cost no synchronisation. What no phase claims is `other` up to the end
of the backward pass and `optimizer` after it: norms, clipping, Adam. Row Adam moves weights in the backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any, Literal

import torch

from clt.distributed import code_exchange as exchange
from clt.kernels import ops

Phase = Literal["encode", "exchange", "decode", "backward", "optimizer", "other"]
PHASES: tuple[Phase, ...] = ("encode", "exchange", "decode", "backward", "optimizer", "other")

#: What is called in each phase. Exchange is collectives, waiting for them, and the grouping of codes by feature.
_CALLS: tuple[tuple[Any, str, Phase], ...] = (
    (ops, "encode_topk", "encode"),
    (exchange.CodeExchange, "gather", "exchange"),
    (exchange.CodeExchange, "_sum", "exchange"),
    (exchange.ExchangeBuffers, "await_rows", "exchange"),
    (exchange.ExchangeBuffers, "await_all", "exchange"),
    (ops, "decode_loss", "decode"),
    (ops, "decoder_step_", "backward"),
    (ops, "encoder_step_", "backward"),
    (ops, "row_adam_", "optimizer"),
    (torch.autograd, "backward", "backward"),
)


class PhaseClock:
    """Seconds of every step by phase.

    Args:
        device: whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[Phase] = ["other"]
        self._marks: list[tuple[Phase, Any]] = []
        self._steps: list[list[tuple[Phase, Any]]] = []

    def begin_step(self) -> None:
        """A step begins, and the one before, if any, has ended."""
        self._open = ["other"]
        self._mark()
        if len(self._marks) > 1:
            self._steps.append(self._marks)
            self._marks = [self._marks[-1]]

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What runs in the block, but for phases inside it, counts in a phase."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            if name == "backward":
                self._open[0] = "optimizer"
            self._mark()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs, the functions of training tell this clock when they begin and end."""
        with ExitStack() as stack:
            for owner, name, phase in _CALLS:
                original = getattr(owner, name)
                setattr(owner, name, self._told(original, phase))
                stack.callback(setattr, owner, name, original)
            yield

    def steps(self) -> list[dict[str, float]]:
        """Seconds of every step that has ended, by phase; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [self._seconds(marks) for marks in self._steps]

    def _mark(self) -> None:
        """From here on time counts in the innermost open phase."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((self._open[-1], event))
        else:
            self._marks.append((self._open[-1], time.perf_counter()))

    def _seconds(self, marks: list[tuple[Phase, Any]]) -> dict[str, float]:
        seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in pairwise(marks):
            cuda = self._device.type == "cuda"
            seconds[phase] += start.elapsed_time(end) / 1e3 if cuda else end - start
        return seconds

    def _told(self, function: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
        @wraps(function)
        def told(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        return told
