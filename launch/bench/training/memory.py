"""Most memory that a job took at any moment: of the GPU, or resident beyond what the process had before."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: Written to `clear_refs`, it makes the most that was ever resident what is resident now.
_RESET = "5"


class PeakMemory:
    """Counts from here on.

    Args:
        device: whose memory; of the CPU it is this process's.
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
        """Bytes; None on a CPU whose system does not tell."""
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
