"""Writes stores one unit at a time, each committed atomically, by any number of workers.

Every file name is written once: a unit's shards and moments, then its commit record, and after all units the manifest.
A unit without a commit record does not exist. A killed worker leaves partial files, and complete files without a
record; the next worker of that unit reads the complete ones back and commits those. Two workers with the same unit
therefore agree on every file, and an interrupted capture ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.storage.base import PARTIAL_SUFFIX, Storage
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.arrays import TOKEN_DTYPES, ArraySpec
from clt.capture.store.committed_units import committed_units
from clt.capture.store.file_records import FileRecord, put_same, record_file
from clt.capture.store.json_files import parse, read_manifest, sealed, store_digest, to_json
from clt.capture.store.layout import StoreArrays, commit_path, stats_path
from clt.capture.store.moments import Moments, measure, pack_moments, unpack_moments
from clt.capture.store.quantise import Standardiser, pack_standardisers, unpack_standardisers
from clt.capture.store.row_order import unit_permutation
from clt.capture.store.schema import MANIFEST, PLAN, QUANTISATION, SPEC, CapturePlan, SiteGroup, StoreSpec, UnitRecord
from clt.capture.store.shard import standing_shard
from clt.capture.store.shard_rows import TORCH_DTYPES, bits_of, read_rows, values_of, write_rows
from clt.capture.writing.build_manifest import build_manifest
from clt.errors import StoreError
from clt.records import TokenTable


@dataclass(frozen=True, kw_only=True)
class UnitData:
    """Activations and tokens of a unit, its samples laid end to end.

    Attributes:
        acts: [n, sites, width] by group, in any floating-point type; rounded to the stored type when written.
        tokens: [n] origin of each token.
        sample_ids: `example_id` of each sample.
        sample_tokens: number of tokens of each sample; they add up to n.
        answer_tokens: number of answer tokens at the end of each sample; empty if no sample has an answer.
    """

    acts: Mapping[str, Tensor]
    tokens: TokenTable
    sample_ids: tuple[str, ...]
    sample_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...] = ()


class StoreWriter:
    """Writes a store, or continues one that was begun with the same spec and plan.

    Args:
        location: folder or URL of the store, or its files.
        spec: contents of the store.
        plan: assignment of samples to units.

    Raises:
        StoreError: the location holds other files, or a store of another model, source or plan.
    """

    def __init__(self, location: str | Path | Storage, spec: StoreSpec, plan: CapturePlan) -> None:
        self.storage = open_storage(location)
        self.spec, self.plan = self._settle(spec, plan), plan
        self.arrays = StoreArrays(self.spec, plan.n_units)
        self.digest = store_digest(self.spec, plan)
        for key, contents in self.arrays.metadata_files().items():
            put_same(self.storage, key, contents)

    def committed(self) -> set[int]:
        """Units with a commit record."""
        return committed_units(self.storage)

    def pending(self) -> list[int]:
        """Units of the plan that are not committed."""
        return sorted(set(range(self.plan.n_units)) - self.committed())

    def calibrate(self, acts: Mapping[str, Tensor]) -> None:
        """Fixes the channel moments that standardise an int8 store; only the first call for a store has an effect.

        Args:
            acts: [n, sites, width] by group, the first tokens of unit 0.
        """
        groups = {name: Standardiser.of(values) for name, values in acts.items()}
        self.storage.put(QUANTISATION, pack_standardisers(groups))

    @property
    def calibrated(self) -> bool:
        """True if units can be committed: false only for an int8 store before `calibrate`."""
        return self.spec.store_dtype != "int8" or self.storage.size(QUANTISATION) is not None

    def commit(self, unit: int, data: UnitData) -> bool:
        """Writes a unit.

        Args:
            unit: number of the unit.
            data: its tokens in natural order; they are stored in the order of `unit_permutation`.

        Returns:
            False if another worker has committed the unit meanwhile; that worker's files are kept.

        Raises:
            StoreError: an existing file of this unit belongs to another capture.
        """
        n = len(data.tokens.sample)
        assert n == self.plan.unit_tokens[unit] == sum(data.sample_tokens)
        order = torch.from_numpy(unit_permutation(n, self.spec.seed, unit))
        files: list[FileRecord] = []
        moments: dict[str, Moments] = {}
        for group in self.spec.groups:
            records, moments[group.name] = self._write_group(unit, group, data, order)
            files += records
        columns = {f.name: getattr(data.tokens, f.name)[order].numpy() for f in fields(TokenTable)}
        columns["natural_index"] = order.numpy()
        for name, dtype in TOKEN_DTYPES.items():
            files.append(self._write_same(self.arrays.token(name), unit, columns[name].astype(dtype)))
        files.append(self._write_stats(unit, moments))
        record = UnitRecord(
            store=self.digest,
            unit=unit,
            n_tokens=n,
            sample_start=self.plan.sample_starts[unit],
            sample_ids=data.sample_ids,
            sample_tokens=data.sample_tokens,
            answer_tokens=data.answer_tokens,
            files=tuple(files),
        )
        return self.storage.put(commit_path(unit), sealed(record)[1])

    def finalize(self) -> str:
        """Completes the store once all units are committed; any worker may call it.

        Returns:
            The store's id.

        Raises:
            StoreError: a unit is not committed, or a committed file is missing or truncated.
        """
        if self.storage.size(MANIFEST) is None:
            if pending := self.pending():
                raise StoreError(
                    f"{self.storage.url}: {len(pending)} units are not captured, first {pending[0]}; run the capture"
                )
            manifest = build_manifest(self.storage, self.arrays, self.plan, self.digest)
            self.storage.put(MANIFEST, sealed(manifest)[1])
        return read_manifest(self.storage)[0]

    def _write_group(
        self, unit: int, group: SiteGroup, data: UnitData, order: Tensor
    ) -> tuple[list[FileRecord], Moments]:
        """Writes the shards of a site group; returns their records and the moments of the stored values."""
        acts = data.acts[group.name]
        assert acts.shape[1:] == (len(group.sites), group.width)
        files: list[FileRecord] = []
        scales: Tensor | None = None
        standardiser: Standardiser | None = None
        if self.spec.store_dtype == "int8":
            standardiser = self._standardisers()[group.name]
            mine = standardiser.scales(acts)[order]
            record, theirs = self._write_or_adopt(self.arrays.scales(group), unit, mine.numpy())
            files.append(record)
            stored_scales = mine if theirs is None else torch.from_numpy(theirs)
            scales = torch.empty_like(stored_scales)
            scales[order] = stored_scales
            stored = standardiser.quantise(acts, scales)
        else:
            stored = acts.to(TORCH_DTYPES[self.spec.store_dtype])
        record, found = self._write_or_adopt(self.arrays.acts(group), unit, bits_of(stored), order.numpy())
        files.append(record)
        if found is not None:
            adopted = values_of(found, self.spec.store_dtype)
            stored = torch.empty_like(adopted)
            stored[order] = adopted
        lossless = stored.dtype == acts.dtype

        def values(site: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
            found = stored[rows, site]
            if standardiser is not None and scales is not None:
                found = standardiser.restore(found[:, None], scales[rows, site, None], [site])[:, 0]
            return found, None if lossless else acts[rows, site]

        moments, norms = measure(acts.shape, data.tokens.modality, values)
        files.append(self._write_same(self.arrays.norms(group), unit, norms[order].numpy()))
        return files, moments

    def _write_or_adopt(
        self, array: ArraySpec, unit: int, rows: NDArray[Any], order: NDArray[Any] | None = None
    ) -> tuple[FileRecord, NDArray[Any] | None]:
        """Writes a shard; if its name is taken, also returns the rows of the existing file, in stored order."""
        record = write_rows(self.storage, array, unit, rows, order)
        if record is not None:
            return record, None
        reader = standing_shard(self.storage, array, unit)
        record = reader.record()
        if reader.check_index() != -(-len(rows) // array.chunk_rows) * array.chunks_per_row:
            raise self._leftover(record.path)
        return record, read_rows(reader, array, len(rows))

    def _write_same(self, array: ArraySpec, unit: int, rows: NDArray[Any]) -> FileRecord:
        """Writes a shard whose contents follow from others; an existing file must hold the same values."""
        record, found = self._write_or_adopt(array, unit, rows)
        # Norms are sums whose order depends on the machine; all other columns are integers.
        tolerance = 1e-5 if rows.dtype == np.float32 else 0.0
        if found is not None and not np.allclose(found, rows, rtol=tolerance, atol=0.0, equal_nan=True):
            raise self._leftover(record.path)
        return record

    def _write_stats(self, unit: int, moments: dict[str, Moments]) -> FileRecord:
        """Writes a unit's moments, or keeps an existing file, which must be of the same values."""
        path = stats_path(unit)
        if not self.storage.put(path, pack_moments(moments)):
            found = unpack_moments(self.storage.read(path), list(moments), self.storage.name(path))
            for group, mine in moments.items():
                # Maxima are the same on every machine, unlike sums.
                if not torch.allclose(mine.absmax, found[group].absmax, rtol=0.0, atol=0.0, equal_nan=True):
                    raise self._leftover(path)
        return record_file(self.storage, path)

    def _leftover(self, path: str) -> StoreError:
        name = self.storage.name(path)
        return StoreError(f"{name}: belongs to another capture; run 'clt store gc' and capture again")

    def _standardisers(self) -> dict[str, Standardiser]:
        return unpack_standardisers(self.storage.read(QUANTISATION), self.storage.name(QUANTISATION))

    def _settle(self, spec: StoreSpec, plan: CapturePlan) -> StoreSpec:
        """Begins a store, or checks that the existing one has the same spec and plan; returns its spec."""
        url = self.storage.url
        # Every worker writes the spec first, so one that started meanwhile has written it by the second check.
        if (
            self.storage.size(SPEC) is None
            and any(not entry.key.endswith(PARTIAL_SUFFIX) for entry in self.storage.list(""))
            and self.storage.size(SPEC) is None
        ):
            raise StoreError(f"{url}: is not empty and holds no store; choose another output")
        self.storage.put(SPEC, to_json(spec))
        found = parse(StoreSpec, self.storage.read(SPEC), self.storage.name(SPEC))
        _require_same(spec, found, url)
        self.storage.put(PLAN, to_json(plan))
        if parse(CapturePlan, self.storage.read(PLAN), self.storage.name(PLAN)) != plan:
            raise StoreError(f"{url}: holds a store with another plan of units; choose another output")
        return found


def _require_same(mine: StoreSpec, found: StoreSpec, url: str) -> None:
    # The path of the model, the software and the minor schema version may differ; the weights may not.
    one, other = ({**asdict(replace(s, created_by="", schema_version="")), **asdict(s.model)} for s in (mine, found))
    for key in one:
        if key not in ("model", "name", "revision") and one[key] != other[key]:
            raise StoreError(
                f"{url}: holds a store with {key}={other[key]!r}, this capture has {one[key]!r}; "
                f"choose another output or the same settings"
            )
