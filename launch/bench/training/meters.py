"""Meters of one rank in the training benchmark: time by phase, peak memory, bytes over the loopback interface."""

from __future__ import annotations

import fcntl
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from clt.step_phases import Phase

#: `other` is what no phase claims up to the end of the backward pass: reading and standardising inputs.
TimedPhase = Literal[Phase, "other"]
PHASES: tuple[TimedPhase, ...] = (*get_args(Phase), "other")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: Written to `clear_refs`, resets the peak resident memory to the present one.
_RESET = "5"


class PhaseClock:
    """Seconds of every training step by phase: a `clt.step_phases.StepObserver`.

    A phase within another one counts by itself. What no phase claims is `other` up to the end of the backward pass and
    `optimizer` after it: norms, clipping, Adam. On a GPU the clock records events, which cost no synchronisation.

    Args:
        device: whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[TimedPhase] = ["other"]
        self._marks: list[tuple[TimedPhase, Any]] = []
        self._steps: list[list[tuple[TimedPhase, Any]]] = []

    def begin_step(self) -> None:
        """Begins a step and ends the one before."""
        self._open = ["other"]
        self._mark()
        if len(self._marks) > 1:
            self._steps.append(self._marks)
            self._marks = [self._marks[-1]]

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the time of the block in a phase, except that of phases inside it."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            if name == "backward":
                self._open[0] = "optimizer"
            self._mark()

    def steps(self) -> list[dict[str, float]]:
        """Seconds of every finished step by phase; waits for the device."""
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

    def _seconds(self, marks: list[tuple[TimedPhase, Any]]) -> dict[str, float]:
        seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in pairwise(marks):
            cuda = self._device.type == "cuda"
            seconds[phase] += start.elapsed_time(end) / 1e3 if cuda else end - start
        return seconds


class PeakMemory:
    """Peak memory from construction on: allocated on the GPU, or resident beyond what the process had before.

    Args:
        device: whose memory; for the CPU, that of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        if _CLEAR.exists():
            _CLEAR.write_text(_RESET, encoding="ascii")
        self._before = _resident("VmRSS")

    def peak(self) -> int | None:
        """Bytes; None on a CPU whose system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        most = _resident("VmHWM")
        return None if most is None or self._before is None else most - self._before


def _resident(key: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def loopback_bytes() -> int:
    """Bytes received so far by the loopback interface of this network namespace."""
    for line in Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    raise OSError("no loopback interface")


def raise_loopback() -> None:
    """Turns on the loopback interface of a new network namespace, as `ip link set lo up` does."""
    siocsifflags, iff_up = 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, siocsifflags, struct.pack("16sh14x", b"lo", iff_up))
