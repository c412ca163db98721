"""Verification of a unit's values: finite activations, tokens as planned, and moments of these values.

Every fault names the file that disagrees with the others. Sums are compared with a tolerance, because the order of
summation depends on the processor; everything else must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.storage.base import Storage
from clt.capture.store.arrays import TOKEN_DTYPES, ArraySpec
from clt.capture.store.layout import StoreArrays, stats_path
from clt.capture.store.moments import Moments, measure
from clt.capture.store.quantise import Standardiser
from clt.capture.store.row_order import unit_permutation
from clt.capture.store.schema import SiteGroup, UnitRecord
from clt.capture.store.shard import ShardReader
from clt.capture.store.shard_rows import read_rows, values_of
from clt.records import Modality

#: Relative tolerance of sums: far above the difference between two orders of adding 1e6 float64 numbers.
_SUMS = 1e-9
#: The same for sums of squares that cancel, relative to their size before cancellation.
_SQUARES = 1e-12
#: Relative tolerance of two float32 roundings of the same float64 number.
_ROUNDED = 2.0**-22


@dataclass(frozen=True, kw_only=True)
class UnitContents:
    """A committed unit whose bytes are verified.

    Attributes:
        storage: the store's files.
        arrays: its Zarr arrays.
        record: the unit's commit record.
        sizes: size of its files in bytes, by key.
        moments: recorded moments, by group.
        standardisers: moments that standardise the channels of an int8 store, by group.
    """

    storage: Storage
    arrays: StoreArrays
    record: UnitRecord
    sizes: Mapping[str, int]
    moments: Mapping[str, Moments]
    standardisers: Mapping[str, Standardiser]

    def reader(self, array: ArraySpec) -> ShardReader:
        """Reader of the unit's shard of an array."""
        return ShardReader(self.storage, array, self.record.unit, self.sizes[array.shard(self.record.unit)])

    def rows(self, array: ArraySpec) -> NDArray[np.generic]:
        """All rows of the unit in an array, in the stored order."""
        return read_rows(self.reader(array), array, self.record.n_tokens)

    def faults(self) -> Iterator[tuple[str, str]]:
        """Yields (key of the file, fault)."""
        columns = {name: self.rows(self.arrays.token(name)) for name in TOKEN_DTYPES}
        order = unit_permutation(self.record.n_tokens, self.arrays.spec.seed, self.record.unit)
        for name, fault in _token_faults(columns, order, self.record):
            yield self.arrays.token(name).shard(self.record.unit), fault
        modality = np.empty_like(columns["modality"])
        modality[order] = columns["modality"]
        for group in self.arrays.spec.groups:
            yield from self._group_faults(group, order, torch.from_numpy(modality))

    def _group_faults(self, group: SiteGroup, order: NDArray[np.int64], modality: Tensor) -> Iterator[tuple[str, str]]:
        unit, n = self.record.unit, self.record.n_tokens
        acts, norms = self.arrays.acts(group), self.arrays.norms(group)
        scales: Tensor | None = None
        if self.arrays.spec.store_dtype == "int8":
            array = self.arrays.scales(group)
            scales = _natural(torch.from_numpy(self.rows(array)), order)
            if bad := int((~(scales.isfinite() & (scales > 0))).sum()):
                yield array.shard(unit), f"{bad} scales are not positive finite numbers"
        reader = self.reader(acts)
        illegal = not_finite = 0
        current: tuple[int, Tensor] | None = None

        def values(site: int, rows: Tensor) -> tuple[Tensor, None]:
            nonlocal illegal, not_finite, current
            if current is None or current[0] != site:
                current = site, _natural(self._site(reader, acts, site), order)
            found = current[1][rows]
            if scales is not None:
                illegal += int((found == -128).sum())
                restore = self.standardisers[group.name].restore
                found = restore(found[:, None], scales[rows, site, None], [site])[:, 0]
            not_finite += int((~found.isfinite()).sum())
            return found, None

        found, lengths = measure((n, *acts.shape), modality, values)
        if illegal:
            yield acts.shard(unit), f"{illegal} int8 values are -128, which capture never writes"
        if not_finite:
            yield acts.shard(unit), f"{not_finite} values are NaN or infinite"
            return
        stored = _natural(torch.from_numpy(self.rows(norms)), order)
        if not torch.allclose(stored, lengths, rtol=_ROUNDED, atol=0):
            yield norms.shard(unit), f"norms do not match the stored activations of group '{group.name}'"
        recorded = self.moments[group.name]
        # The values before rounding are gone, so the recorded error is only checked to be a possible one.
        possible = bool((recorded.error.isfinite() & (recorded.error >= 0)).all())
        fault = moments_fault(replace(recorded, error=found.error), found) if possible else "error"
        if fault:
            yield stats_path(unit), f"{fault} of group '{group.name}' does not match the stored activations"

    def _site(self, reader: ShardReader, array: ArraySpec, site: int) -> Tensor:
        """Stored values [n, width] of one site, in the stored order."""
        rows = np.empty((self.record.n_tokens, array.shape[1]), array.dtype)
        chunk = np.empty(array.chunk, array.dtype)
        for start in range(0, len(rows), array.chunk_rows):
            reader.read_into(start // array.chunk_rows * array.chunks_per_row + site, [chunk])
            part = rows[start : start + array.chunk_rows]
            part[...] = chunk[: len(part), 0]
        return values_of(rows, self.arrays.spec.store_dtype)


def moments_fault(recorded: Moments, found: Moments) -> str | None:
    """Name of the first field in which recorded and recomputed moments differ by more than rounding; else None."""
    scale = found.absmax.double()
    exact = torch.zeros(1)
    tolerances = {
        "count": exact,
        "mean": _SUMS * scale,
        "m2": _SUMS * found.m2 + found.count[:, None, None] * _SQUARES * scale.square(),
        "absmax": exact,
        "norm": _SUMS * found.norm,
        "error": _SUMS * found.error,
    }
    for name, tolerance in tolerances.items():
        one, other = (getattr(moments, name).double() for moments in (recorded, found))
        same = (one == other) | (one.isnan() & other.isnan()) | ((one - other).abs() <= tolerance)
        if not bool(same.all()):
            return name
    return None


def _natural(stored: Tensor, order: NDArray[np.int64]) -> Tensor:
    """Rows in natural order from rows in the stored order."""
    natural = torch.empty_like(stored)
    natural[torch.from_numpy(order)] = stored
    return natural


def _token_faults(
    columns: Mapping[str, NDArray[np.generic]], order: NDArray[np.int64], record: UnitRecord
) -> Iterator[tuple[str, str]]:
    """Yields (column, fault); without faults, each token of each sample is stored exactly once."""
    lengths = np.array(record.sample_tokens, np.int64)
    samples = np.repeat(np.arange(record.sample_start, record.sample_start + len(lengths)), lengths)
    positions = np.arange(len(samples)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    expected = {"natural_index": order, "sample": samples[order], "position": positions[order]}
    for name, column in expected.items():
        if wrong := int((columns[name] != column).sum()):
            yield name, f"{wrong} rows have a {name} that differs from the plan"
    modality = columns["modality"]
    if illegal := int(np.greater_equal(modality, Modality.PAD).sum()):
        yield "modality", f"{illegal} rows have no valid token class"
    for name in ("patch_row", "patch_col", "image"):
        placed = np.greater_equal(columns[name], 0)
        if wrong := int(((modality == Modality.IMAGE) & ~placed).sum()):
            yield name, f"{wrong} image tokens have no {name}"
        if wrong := int((np.isin(modality, (Modality.TEXT, Modality.BOS)) & placed).sum()):
            yield name, f"{wrong} text tokens have a {name}"
