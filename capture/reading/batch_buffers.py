"""Memory that windows are read into and batches are gathered from.

Rows lie in slots, one window each, in the stored type; site first, as on disk. A batch is gathered with one take over
all slots and widened once. Memory is used again, because fresh pages cost as much as reading; tensors that were handed
out are never written while anything refers to them. `clt.capture.reading.cuda_batch_buffers` does the same for a CUDA
device.
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

#: Types of arrays that hold the bits of tensors.
BITS: dict[torch.dtype, Any] = {torch.bfloat16: np.uint16, torch.float32: np.float32, torch.int8: np.int8}

#: Reads a window into [S,rows,D] stored bits and [S,rows] scales (None unless int8); returns the rows that are wanted,
#: in order, and how many rows it filled.
Fill = Callable[[NDArray[Any], NDArray[np.float32] | None], tuple[NDArray[np.int64], int]]


@dataclass(frozen=True, kw_only=True)
class BufferSizes:
    """What slots and batches hold.

    Attributes:
        slots: number of slots.
        slot_rows: rows of a slot.
        batch_rows: most rows of a batch.
        batches: batches whose memory is kept to be used again.
        widen: whether batches are float32 whatever is stored; int8 always becomes float32.
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
        """Bytes of activations in slots and batches: slots, one batch in the stored type, and the batches kept."""
        row = source.n_sites * (source.width * source.dtype.itemsize + (4 if source.dtype == torch.int8 else 0))
        wide = source.n_sites * source.width * self.batch_dtype(source.dtype).itemsize
        return self.rows * row + self.batch_rows * (row + self.batches * wide)


class BatchBuffers(Protocol):
    """BatchBuffers and the batch that is being gathered from them."""

    def fill(self, slot: int, fill: Fill) -> NDArray[np.int64]:
        """Reads a window into a slot that no batch needs any more; several threads may do so at once.

        Returns:
            The rows that are wanted, in order, as `add` counts them.
        """

    def begin(self, rows: int) -> None:
        """Starts a batch of so many rows."""

    def add(self, first: int, index: NDArray[np.int64]) -> None:
        """Gathers rows of the slots into the batch, from its row `first` on; their slots may be filled anew then."""

    def finish(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The batch [S,B,D] and, on a CUDA device, the event after which it may be read."""


class Recycler:
    """Host arrays of one shape that are used again once nothing refers to the tensors made from them.

    Args:
        shape: of the arrays.
        bits: their type.
        most: arrays that are kept; those needed beyond them are allocated and forgotten.
    """

    def __init__(self, shape: tuple[int, ...], bits: Any, most: int) -> None:
        self._shape, self._bits, self._most = shape, bits, most
        self._kept: list[tuple[NDArray[Any], weakref.ref[NDArray[Any]]]] = []

    def take(self) -> NDArray[Any]:
        """An array of unspecified values; it is free again when it and all tensors made from it are gone.

        Slices of the array do not keep it, slices of tensors do: `torch.from_numpy` makes the storage, which all views
        share, refer to the array it was given.
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
    """BatchBuffers in host memory, and batches for the CPU.

    Args:
        source: where the rows come from.
        sizes: of slots and batches.
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
        """As `BatchBuffers.fill`."""
        base = slot * self._slot_rows
        rows = slice(base, base + self._slot_rows)
        picks, _ = fill(self._acts[:, rows], None if self._scales is None else self._scales[:, rows])
        return picks + base

    def begin(self, rows: int) -> None:
        """As `BatchBuffers.begin`."""
        self._rows, self._out = rows, self._recycler.take()

    def add(self, first: int, index: NDArray[np.int64]) -> None:
        """As `BatchBuffers.add`."""
        part = slice(first, first + len(index))
        stored = self._scratch if self._widens else self._out
        assert stored is not None
        gather(self._acts, index, stored[:, part])
        if self._scales is not None and self._scratch_scales is not None:
            gather(self._scales, index, self._scratch_scales[:, part])

    def finish(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """As `BatchBuffers.finish`."""
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
        source: the source.
        rows: number of rows.
        pin: whether a CUDA device shall copy from it.

    Returns:
        [S,rows,D] stored bits, and [S,rows] scales if they are int8.
    """

    def array(shape: tuple[int, ...], bits: Any) -> NDArray[Any]:
        if not pin:
            return np.empty(shape, bits)
        n_bytes = math.prod(shape) * np.dtype(bits).itemsize
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).numpy().view(bits).reshape(shape)

    acts = array((source.n_sites, rows, source.width), BITS[source.dtype])
    return acts, array((source.n_sites, rows), np.float32) if source.dtype == torch.int8 else None


def gather(rows: NDArray[Any], index: NDArray[np.int64], out: NDArray[Any]) -> None:
    """`rows[:, index]` into `out`, by one thread and with the interpreter's lock let go as rarely as possible.

    numpy's take never starts threads, unlike torch's: a team of threads that spins beside a busy training loop costs
    far more than it brings.
    """
    if out.flags.c_contiguous:
        np.take(rows, index, axis=1, out=out, mode="clip")
        return
    for site_rows, site_out in zip(rows, out, strict=True):
        np.take(site_rows, index, axis=0, out=site_out, mode="clip")


def restore(stored: Tensor, scales: Tensor | None, moments: Standardiser | None, out: Tensor) -> None:
    """Widens rows to float32, on any device.

    Args:
        stored: [S,B,D] in the stored type.
        scales: [S,B] of int8 values.
        moments: [S,D] of int8 values.
        out: [S,B,D] float32, written.
    """
    if scales is None or moments is None:
        out.copy_(stored)
        return
    for site, rows in enumerate(out):
        rows.copy_(stored[site]).mul_(scales[site, :, None]).mul_(moments.std[site]).add_(moments.mean[site])
