"""Buffers that windows are read into and batches are gathered from, in host memory.

A buffer is divided into slots of one window each, site first and in the stored type, as on disk. A batch is one gather
over all slots and one conversion to float32. Memory is reused, because fresh pages cost as much as reading; tensors
handed to the caller are never overwritten while they are referenced. `clt.capture.reading.cuda_batch_buffers` has the
buffers for a CUDA device.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.reading.blocks import BlockSource
from clt.capture.store.quantise import Standardiser

#: numpy types that hold the bits of tensors.
BITS: dict[torch.dtype, Any] = {torch.bfloat16: np.uint16, torch.float32: np.float32, torch.int8: np.int8}

#: Reads a window into [S,rows,D] stored bits and [S,rows] scales (None unless int8); returns the requested rows, in
#: order, and the number of rows it filled.
Fill = Callable[[NDArray[Any], NDArray[np.float32] | None], tuple[NDArray[np.int64], int]]


@dataclass(frozen=True, kw_only=True)
class BufferSizes:
    """Sizes of slots and batches.

    Attributes:
        slots: number of slots.
        slot_rows: rows of a slot.
        batch_rows: largest number of rows of a batch.
        batches: number of batches whose memory is kept for reuse.
        widen: convert batches to float32; int8 is always converted.
    """

    slots: int
    slot_rows: int
    batch_rows: int
    batches: int
    widen: bool

    @property
    def rows(self) -> int:
        """Rows of all slots."""
        return self.slots * self.slot_rows

    def batch_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Type of the batches."""
        return torch.float32 if self.widen or stored == torch.int8 else stored

    def memory_bytes(self, source: BlockSource) -> int:
        """Bytes of the slots, of one batch in the stored type, and of the batches kept for reuse."""
        row = source.n_sites * (source.width * source.dtype.itemsize + (4 if source.dtype == torch.int8 else 0))
        wide = source.n_sites * source.width * self.batch_dtype(source.dtype).itemsize
        return self.rows * row + self.batch_rows * (row + self.batches * wide)


class BatchBuffers(Protocol):
    """Slots, and the batch that is being gathered from them."""

    def fill(self, slot: int, fill: Fill) -> NDArray[np.int64]:
        """Reads a window into a slot that no batch needs any more; may be called by several threads at once.

        Returns:
            The requested rows, in order, numbered as for `add`.
        """

    def begin(self, rows: int) -> None:
        """Starts a batch of the given number of rows."""

    def add(self, first: int, index: NDArray[np.int64]) -> None:
        """Gathers rows of the slots into the batch from its row `first` on; their slots may be refilled afterwards."""

    def finish(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The batch [S,B,D] and, on a CUDA device, the event after which it may be read."""


class Recycler:
    """Host arrays of one shape that are reused once no tensor made from them is referenced.

    Args:
        shape: shape of the arrays.
        bits: their numpy type.
        most: number of arrays kept; further ones are allocated and not kept.
    """

    def __init__(self, shape: tuple[int, ...], bits: Any, most: int) -> None:
        self._shape, self._bits, self._most = shape, bits, most
        self._kept: list[tuple[NDArray[Any], weakref.ref[NDArray[Any]]]] = []

    def take(self) -> NDArray[Any]:
        """An array of unspecified values; it is free again when it and all tensors made from it are gone.

        Slices of the array do not keep it in use, slices of tensors do: all views of a tensor share a storage that
        refers to the array given to `torch.from_numpy`.
        """
        for i, (array, user) in enumerate(self._kept):
            if user() is None:
                view = array.view()
                self._kept[i] = array, weakref.ref(view)
                return view
        array = np.empty(self._shape, self._bits)
        view = array.view()
        if len(self._kept) < self._most:
            self._kept.append((array, weakref.ref(view)))
        return view


class HostBuffers:
    """Slots and batches in host memory; a `BatchBuffers`.

    Args:
        source: source of the rows.
        sizes: sizes of slots and batches.
    """

    def __init__(self, source: BlockSource, sizes: BufferSizes) -> None:
        self._source, self._slot_rows = source, sizes.slot_rows
        self._acts, self._scales = allocate(source, sizes.rows)
        self._dtype = sizes.batch_dtype(source.dtype)
        self._widens = self._dtype != source.dtype
        self._scratch, self._scratch_scales = allocate(source, sizes.batch_rows if self._widens else 0)
        self._recycler = Recycler((source.n_sites, sizes.batch_rows, source.width), BITS[self._dtype], sizes.batches)
        self._rows = 0
        self._out: NDArray[Any] | None = None

    def fill(self, slot: int, fill: Fill) -> NDArray[np.int64]:
        """Implements `BatchBuffers.fill`."""
        base = slot * self._slot_rows
        rows = slice(base, base + self._slot_rows)
        picks, _ = fill(self._acts[:, rows], None if self._scales is None else self._scales[:, rows])
        return picks + base

    def begin(self, rows: int) -> None:
        """Implements `BatchBuffers.begin`."""
        self._rows, self._out = rows, self._recycler.take()

    def add(self, first: int, index: NDArray[np.int64]) -> None:
        """Implements `BatchBuffers.add`."""
        part = slice(first, first + len(index))
        stored = self._scratch if self._widens else self._out
        assert stored is not None
        gather(self._acts, index, stored[:, part])
        if self._scales is not None and self._scratch_scales is not None:
            gather(self._scales, index, self._scratch_scales[:, part])

    def finish(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """Implements `BatchBuffers.finish`."""
        assert self._out is not None
        out = torch.from_numpy(self._out).view(self._dtype)[:, : self._rows]
        self._out = None
        if self._widens:
            restore(*self.stored(), self._source.standardiser, out)
        return out, None

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """The batch [S,B,D] in the stored type, and its scales [S,B] if that is int8."""
        scales = self._scratch_scales
        return (
            torch.from_numpy(self._scratch).view(self._source.dtype)[:, : self._rows],
            None if scales is None else torch.from_numpy(scales)[:, : self._rows],
        )


def allocate(source: BlockSource, rows: int, pin: bool = False) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Host memory for rows of a source.

    Args:
        source: source of the rows, which sets S, D and the type.
        rows: number of rows.
        pin: pin the memory for copies to a CUDA device.

    Returns:
        [S,rows,D] stored bits, and [S,rows] float32 scales if they are int8.
    """

    def array(shape: tuple[int, ...], bits: Any) -> NDArray[Any]:
        if not pin:
            return np.empty(shape, bits)
        n_bytes = math.prod(shape) * np.dtype(bits).itemsize
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).numpy().view(bits).reshape(shape)

    acts = array((source.n_sites, rows, source.width), BITS[source.dtype])
    return acts, array((source.n_sites, rows), np.float32) if source.dtype == torch.int8 else None


def gather(rows: NDArray[Any], index: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Writes `rows[:, index]` into `out` in a single thread, releasing the GIL as rarely as possible.

    Unlike torch's, numpy's take starts no threads; a thread team spinning beside a busy training loop costs more than
    it gains.

    Args:
        rows: [S,R,...].
        index: [n] positions on the second axis.
        out: [S,n,...], written.
    """
    if out.flags.c_contiguous:
        np.take(rows, index, axis=1, out=out, mode="clip")
        return
    for site_rows, site_out in zip(rows, out, strict=True):
        np.take(site_rows, index, axis=0, out=site_out, mode="clip")


def restore(stored: Tensor, scales: Tensor | None, moments: Standardiser | None, out: Tensor) -> None:
    """Converts stored rows to float32, on any device.

    Args:
        stored: [S,B,D] in the stored type.
        scales: [S,B] for int8, else None.
        moments: [S,D] for int8, else None.
        out: [S,B,D] float32, written.
    """
    if scales is None or moments is None:
        out.copy_(stored)
        return
    for site, rows in enumerate(out):
        rows.copy_(stored[site]).mul_(scales[site, :, None]).mul_(moments.std[site]).add_(moments.mean[site])
