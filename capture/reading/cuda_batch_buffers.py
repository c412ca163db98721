"""Buffers for batches on a CUDA device: slots on the device if they fit into its memory, else on the host.

All allocations, copies and gathers are on one side stream, so that a slot is neither overwritten nor freed before the
batches that need it are gathered; training waits only for the event of each batch.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.reading.batch_buffers import BatchBuffers, BufferSizes, Fill, HostBuffers, allocate, restore
from clt.capture.reading.blocks import BlockSource
from clt.capture.store.quantise import Standardiser

#: Fraction of the device's free memory that slots may take.
_MEMORY_SHARE = 0.25


def cuda_buffers(source: BlockSource, sizes: BufferSizes, device: torch.device) -> BatchBuffers:
    """Buffers with slots on the device if they take at most a quarter of its free memory, else on the host.

    Args:
        source: source of the rows.
        sizes: sizes of slots and batches.
        device: the CUDA device.
    """
    free, _ = torch.cuda.mem_get_info(device)
    if sizes.memory_bytes(source) <= _MEMORY_SHARE * free:
        return DeviceBuffers(source, sizes, device)
    return UploadingBuffers(source, sizes, device)


class _Widening:
    """Converts stored rows on a device to a batch."""

    def __init__(self, source: BlockSource, sizes: BufferSizes, device: torch.device) -> None:
        moments = source.standardiser
        self.stream = torch.cuda.Stream(device)
        self._dtype = sizes.batch_dtype(source.dtype)
        with torch.cuda.stream(self.stream):
            self._moments = moments and Standardiser(mean=moments.mean.to(device), std=moments.std.to(device))

    def __call__(self, stored: Tensor, scales: Tensor | None) -> tuple[Tensor, torch.cuda.Event]:
        """The batch and the event of its completion; the current stream must be `stream`."""
        out = stored
        if self._dtype != stored.dtype:
            out = torch.empty(stored.shape, dtype=self._dtype, device=stored.device)
            restore(stored, scales, self._moments, out)
        return out, self.stream.record_event()


class DeviceBuffers:
    """Slots in the memory of a CUDA device, filled through one pinned buffer per reading thread.

    Args:
        source: source of the rows.
        sizes: sizes of slots and batches.
        device: the device.
    """

    def __init__(self, source: BlockSource, sizes: BufferSizes, device: torch.device) -> None:
        self._source, self._slot_rows, self._device = source, sizes.slot_rows, device
        self._widen = _Widening(source, sizes, device)
        shape = (source.n_sites, sizes.rows, source.width)
        with torch.cuda.stream(self._widen.stream):
            self._acts = torch.empty(shape, dtype=source.dtype, device=device)
            self._scales = torch.empty(shape[:2], device=device) if source.dtype == torch.int8 else None
        self._staging = threading.local()
        self._parts: list[tuple[Tensor, Tensor | None]] = []

    def fill(self, slot: int, fill: Fill) -> NDArray[np.int64]:
        """Implements `BatchBuffers.fill`."""
        if not hasattr(self._staging, "rows"):
            self._staging.rows = allocate(self._source, self._slot_rows, pin=True)
        acts, scales = self._staging.rows
        picks, filled = fill(acts, scales)
        base = slot * self._slot_rows
        rows = slice(base, base + filled)
        with torch.cuda.stream(self._widen.stream):
            for site in range(self._source.n_sites):
                self._acts[site, rows].copy_(self._tensor(acts[site, :filled]), non_blocking=True)
                if self._scales is not None:
                    self._scales[site, rows].copy_(torch.from_numpy(scales[site, :filled]), non_blocking=True)
            self._widen.stream.record_event().synchronize()
        return picks + base

    def begin(self, rows: int) -> None:
        """Implements `BatchBuffers.begin`."""
        self._parts = []

    def add(self, first: int, index: NDArray[np.int64]) -> None:
        """Implements `BatchBuffers.add`."""
        with torch.cuda.stream(self._widen.stream):
            rows = torch.from_numpy(index).to(self._device)
            scales = None if self._scales is None else self._scales.index_select(1, rows)
            self._parts.append((self._acts.index_select(1, rows), scales))

    def finish(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """Implements `BatchBuffers.finish`."""
        with torch.cuda.stream(self._widen.stream):
            stored = torch.cat([acts for acts, _ in self._parts], dim=1)
            scales = [scales for _, scales in self._parts if scales is not None]
            return self._widen(stored, torch.cat(scales, dim=1) if scales else None)

    def _tensor(self, bits: NDArray[Any]) -> Tensor:
        return torch.from_numpy(bits).view(self._source.dtype)


class UploadingBuffers(HostBuffers):
    """Slots in host memory, and batches copied to a CUDA device in the stored type and converted there.

    Args:
        source: source of the rows.
        sizes: sizes of slots and batches.
        device: the device.
    """

    def __init__(self, source: BlockSource, sizes: BufferSizes, device: torch.device) -> None:
        super().__init__(source, sizes)
        self._device, self._widens = device, True
        self._scratch, self._scratch_scales = allocate(source, sizes.batch_rows, pin=True)
        self._widen = _Widening(source, sizes, device)

    def begin(self, rows: int) -> None:
        """Implements `BatchBuffers.begin`."""
        self._rows = rows

    def finish(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """Implements `BatchBuffers.finish`."""
        with torch.cuda.stream(self._widen.stream):
            stored, scales = self.stored()
            acts = stored.to(self._device, non_blocking=True)
            batch, ready = self._widen(acts, None if scales is None else scales.to(self._device))
        ready.synchronize()  # the next batch overwrites the pinned memory
        return batch, ready
