"""Inventory of a store: its description and the files that exist.

A store without a manifest is unfinished and described by its plan and commit records. All file names that a store can
have follow from its spec and plan, which distinguishes foreign files from garbage of interrupted workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from clt.capture.storage.base import PARTIAL_SUFFIX, Storage, StoredFile
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.arrays import ArraySpec
from clt.capture.store.file_records import FileRecord
from clt.capture.store.json_files import check_version, parse, read_manifest, store_digest
from clt.capture.store.layout import StoreArrays, commit_path, stats_arrays, stats_path
from clt.capture.store.schema import MANIFEST, PLAN, QUANTISATION, SPEC, CapturePlan, Manifest, StoreSpec
from clt.capture.writing.leases import LEASES
from clt.errors import StoreError

T = TypeVar("T")

QUARANTINE = "quarantine/"


@dataclass(frozen=True, kw_only=True)
class StoreProblem:
    """A fault in a store.

    Attributes:
        path: key of the file.
        unit: unit of the file; None if it belongs to no unit.
        message: one line with the file, the fault and the remedy.
    """

    path: str
    unit: int | None
    message: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Description of a store and its existing files.

    Attributes:
        storage: its files.
        store_id: hash of its contents; None without a readable manifest.
        manifest: None without a readable one.
        spec: contents of the store.
        plan: assignment of samples to units.
        entries: every existing file, by key.
    """

    storage: Storage
    store_id: str | None
    manifest: Manifest | None
    spec: StoreSpec
    plan: CapturePlan
    entries: Mapping[str, StoredFile]

    @cached_property
    def arrays(self) -> StoreArrays:
        """Zarr arrays of the store."""
        return StoreArrays(self.spec, self.plan.n_units)

    @cached_property
    def digest(self) -> str:
        """`store_digest` that its commit records carry."""
        return store_digest(self.spec, self.plan)

    @cached_property
    def committed(self) -> tuple[int, ...]:
        """Units with a commit record, in order."""
        return tuple(unit for unit in range(self.plan.n_units) if commit_path(unit) in self.entries)

    @cached_property
    def recorded(self) -> dict[str, FileRecord]:
        """Every file in the manifest, by key; empty for an unfinished store."""
        return {record.path: record for record in self.manifest.all_files} if self.manifest else {}

    @cached_property
    def unit_of(self) -> dict[str, int]:
        """Unit of every file that the plan's units can have, by key."""
        return {key: unit for unit in range(self.plan.n_units) for key in self.unit_keys(unit)}

    def unit_keys(self, unit: int) -> tuple[str, ...]:
        """Keys of all files of a unit, its commit record last."""
        shards = (array.shard(unit) for array in self.arrays.per_unit())
        return (*shards, stats_path(unit), commit_path(unit))

    @cached_property
    def merged_arrays(self) -> tuple[ArraySpec, ...]:
        """Zarr arrays of the merged moments."""
        return tuple(array for group in self.spec.groups for array in stats_arrays(group).values())

    @cached_property
    def stats_keys(self) -> tuple[str, ...]:
        """Keys of the merged moments, which follow from those of the units."""
        return tuple(key for array in self.merged_arrays for key in (f"{array.key}/zarr.json", array.shard(0)))

    @cached_property
    def common_keys(self) -> frozenset[str]:
        """Keys of all files that belong to no unit."""
        quantisation = (QUANTISATION,) if self.spec.store_dtype == "int8" else ()
        return frozenset((SPEC, PLAN, MANIFEST, *quantisation, *self.arrays.metadata_files(), *self.stats_keys))

    def leftovers(self) -> Iterator[StoredFile]:
        """Unrecorded files of interrupted workers: partial files, and files of uncommitted units."""
        committed = set(self.committed)
        for key, entry in self.entries.items():
            if key.startswith(QUARANTINE):
                continue
            unit = self.unit_of.get(key)
            unrecorded = unit is not None and (key not in self.recorded if self.manifest else unit not in committed)
            if key.endswith(PARTIAL_SUFFIX) or unrecorded:
                yield entry


def is_scratch(key: str) -> bool:
    """True for files that are not part of the data: a partial file, a lease, or a file in quarantine."""
    return key.endswith(PARTIAL_SUFFIX) or key.startswith((LEASES, QUARANTINE))


def take_inventory(storage: Storage) -> tuple[Inventory | None, list[StoreProblem]]:
    """Takes the inventory from the manifest or, if that is missing or damaged, from spec and plan.

    Args:
        storage: the store's files.

    Returns:
        The inventory, None if both are unreadable; and the faults of these files.

    Raises:
        StoreError: there is no store, or it has another major schema version.
    """
    entries = {entry.key: entry for entry in storage.list("")}
    if not entries.keys() & {SPEC, MANIFEST}:
        raise StoreError(f"{storage.url}: no activation store here; check the path or run the capture first")
    _require_version(storage, [key for key in (MANIFEST, SPEC) if key in entries])
    problems: list[StoreProblem] = []
    if MANIFEST in entries:
        try:
            store_id, manifest = read_manifest(storage)
        except StoreError as error:
            problems.append(StoreProblem(path=MANIFEST, unit=None, message=str(error)))
        else:
            spec, plan = manifest.spec, plan_of(manifest)
            return Inventory(
                storage=storage, store_id=store_id, manifest=manifest, spec=spec, plan=plan, entries=entries
            ), problems
    found_spec = _read(storage, SPEC, StoreSpec, problems)
    found_plan = _read(storage, PLAN, CapturePlan, problems)
    if found_spec is None or found_plan is None:
        return None, problems
    if not _plausible(found_spec, found_plan):
        message = f"{storage.name(PLAN)}: does not match {SPEC}, one of them is damaged; restore both"
        return None, [*problems, StoreProblem(path=PLAN, unit=None, message=message)]
    return Inventory(
        storage=storage, store_id=None, manifest=None, spec=found_spec, plan=found_plan, entries=entries
    ), problems


def sound_inventory(location: str | Path | Storage) -> Inventory:
    """Inventory of a store whose description is undamaged.

    Raises:
        StoreError: there is no store, or its manifest, spec or plan is damaged.
    """
    inventory, problems = take_inventory(open_storage(location))
    if inventory is None or problems:
        raise StoreError(problems[0].message)
    return inventory


def plan_of(manifest: Manifest) -> CapturePlan:
    """Plan of a complete store, from its units."""
    starts = (0, *(unit.sample_start + unit.n_samples for unit in manifest.units))
    return CapturePlan(sample_starts=starts, unit_tokens=tuple(unit.n_tokens for unit in manifest.units))


def _read(storage: Storage, key: str, cls: type[T], problems: list[StoreProblem]) -> T | None:
    try:
        return parse(cls, storage.read(key), storage.name(key))
    except StoreError as error:
        problems.append(StoreProblem(path=key, unit=None, message=str(error)))
        return None


def _plausible(spec: StoreSpec, plan: CapturePlan) -> bool:
    """True if a plan is consistent with a spec; in an unfinished store no checksum protects the two files."""
    starts, rows, chunk = plan.sample_starts, spec.rows_per_unit, spec.chunk_tokens
    return (
        0 < chunk <= rows
        and rows % chunk == 0
        and len(starts) == plan.n_units + 1
        and starts[0] == 0
        and all(a < b for a, b in itertools.pairwise(starts))
        and all(0 < tokens <= rows for tokens in plan.unit_tokens)
    )


def _require_version(storage: Storage, keys: list[str]) -> None:
    """Raises StoreError if all the files have another major version; a single such file is damage."""
    errors: list[StoreError] = []
    for key in keys:
        try:
            check_version(storage.read(key), storage.name(key))
        except StoreError as error:
            errors.append(error)
    if errors and len(errors) == len(keys):
        raise errors[0]
