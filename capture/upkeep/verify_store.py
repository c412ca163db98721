"""Verification of a store against its records: file sizes and indexes, every byte, or also the stored values.

Damage does not end the search. Whole-file checksums detect any changed byte, because the manifest has one for each
file and a hash of itself; chunk checksums, computed in the same pass, locate the damage within a file.
"""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from clt.capture.storage.base import Storage
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.committed_units import merged_moments, stored_moments
from clt.capture.store.file_records import read_checked
from clt.capture.store.json_files import parse
from clt.capture.store.layout import stats_arrays
from clt.capture.store.quantise import unpack_standardisers
from clt.capture.store.schema import MANIFEST, PLAN, QUANTISATION, SPEC, CapturePlan, StoreSpec
from clt.capture.store.shard import ShardReader, standing_shard
from clt.capture.upkeep.inventory import Inventory, StoreProblem, is_scratch, take_inventory
from clt.capture.upkeep.verify_unit import REPAIR, Findings, Level, check_presence, check_record, check_unit
from clt.capture.upkeep.verify_values import moments_fault
from clt.errors import ConfigError, StoreError


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Result of a verification.

    Attributes:
        location: folder or URL of the store.
        level: level of the comparison.
        store_id: hash of its contents; None if it is unfinished or its manifest is damaged.
        complete: whether there is a manifest; an unfinished store is not a fault.
        units: number of units of the plan.
        committed: number of units with a commit record.
        checked: number of units whose files were read.
        files: number of files compared.
        bytes: size of the files of which every byte was compared.
        seconds: duration.
        problems: faults, units in order.
    """

    location: str
    level: Level
    store_id: str | None
    complete: bool
    units: int
    committed: int
    checked: int
    files: int
    bytes: int
    seconds: float
    problems: tuple[StoreProblem, ...]

    @property
    def ok(self) -> bool:
        """True if no fault was found."""
        return not self.problems

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1)


def verify_store(
    location: str | Path | Storage, level: Level = "chunk", *, sample: float = 1.0, seed: int = 0, jobs: int = 1
) -> VerifyReport:
    """Compares a store with its records; of an unfinished store, the committed part.

    Args:
        location: folder or URL of the store, or its storage.
        level: "index" compares sizes, small files and shard indexes; "chunk" every byte; "full" also the values: they
            are finite, in the planned rows, and have the recorded moments.
        sample: fraction of the units to read, in (0, 1]; presence and size of files are compared for all units.
        seed: random seed of the choice of units.
        jobs: number of threads.

    Returns:
        The report; damage is listed in it and not raised.

    Raises:
        StoreError: there is no store, or it has another major schema version.
        ConfigError: `sample` is not in (0, 1], or the level is unknown.
    """
    if not 0 < sample <= 1:
        raise ConfigError(f"sample={sample}: must be a fraction of the units in (0, 1]")
    if level not in get_args(Level):
        raise ConfigError(f"level={level!r} is unknown; use one of {', '.join(get_args(Level))}")
    started = time.perf_counter()
    storage = open_storage(location)
    inventory, problems = take_inventory(storage)
    total, chosen = Findings(problems=problems), set[int]()
    if inventory is not None:
        units = range(inventory.plan.n_units)
        chosen = set(random.Random(seed).sample(units, min(len(units), max(1, round(sample * len(units))))))
        total.join(_check_common(inventory, level))
        with ThreadPoolExecutor(jobs) as threads:
            in_order = threads.map if jobs > 1 else map
            for found in in_order(lambda unit: check_unit(inventory, unit, level, unit in chosen), units):
                total.join(found)
        total.problems = _blamed(inventory, total)
    return VerifyReport(
        location=storage.url,
        level=level,
        store_id=inventory.store_id if inventory else None,
        complete=storage.size(MANIFEST) is not None,
        units=inventory.plan.n_units if inventory else 0,
        committed=len(inventory.committed) if inventory else 0,
        checked=len(chosen),
        files=total.files,
        bytes=total.bytes,
        seconds=time.perf_counter() - started,
        problems=tuple(total.problems),
    )


def _check_common(inventory: Inventory, level: Level) -> Findings:
    """Compares the files that belong to no unit, and finds foreign files."""
    found = Findings()
    if inventory.manifest is None:
        _check_unfinished(inventory, found)
    else:
        _check_recorded(inventory, found)
    if level == "full" and inventory.manifest is not None and not found.problems:
        _check_merged_values(inventory, found)
    _check_unknown(inventory, found)
    return found


def _check_recorded(inventory: Inventory, found: Findings) -> None:
    """Compares a complete store's files that belong to no unit with the manifest."""
    assert inventory.manifest is not None
    storage = inventory.storage
    merged = {array.shard(0): array for array in inventory.merged_arrays}
    for record in inventory.manifest.files:
        with found.about(record.path):
            check_presence(inventory, record)
            found.bytes += record.bytes
            if record.path in merged:
                check_record(storage, ShardReader(storage, merged[record.path], 0, record.bytes).record(), record)
                continue
            contents = read_checked(storage, record)
            if record.path == SPEC and parse(StoreSpec, contents, storage.name(SPEC)) != inventory.spec:
                raise StoreError(f"{storage.name(SPEC)}: describes another store than {MANIFEST}; {REPAIR}")
            if record.path == PLAN and parse(CapturePlan, contents, storage.name(PLAN)) != inventory.plan:
                raise StoreError(f"{storage.name(PLAN)}: has other units than {MANIFEST}; {REPAIR}")
    with found.about(MANIFEST):
        listed = {record.path for record in inventory.manifest.files}
        if other := sorted(listed ^ (inventory.common_keys - {MANIFEST})):
            raise StoreError(f"{storage.name(MANIFEST)}: lists other files than a store has ('{other[0]}'); {REPAIR}")


def _check_unfinished(inventory: Inventory, found: Findings) -> None:
    """Checks an unfinished store's files that belong to no unit: against its spec, or by reading them."""
    storage, entries = inventory.storage, inventory.entries
    merged = inventory.merged_arrays
    expected = inventory.arrays.metadata_files() | {f"{array.key}/zarr.json": array.metadata() for array in merged}
    for key in sorted(expected.keys() & entries.keys()):
        with found.about(key):
            found.bytes += len(expected[key])
            if storage.read(key) != expected[key]:
                raise StoreError(f"{storage.name(key)}: differs from what this store needs; {REPAIR}")
    for array in merged:
        if array.shard(0) in entries:
            with found.about(array.shard(0)):
                found.bytes += standing_shard(storage, array, 0).record().bytes
    if inventory.spec.store_dtype == "int8" and (QUANTISATION in entries or inventory.committed):
        with found.about(QUANTISATION):
            unpack_standardisers(storage.read(QUANTISATION), storage.name(QUANTISATION))


def _check_merged_values(inventory: Inventory, found: Findings) -> None:
    """Compares the merged moments with those of the units."""
    assert inventory.manifest is not None
    storage, groups = inventory.storage, inventory.spec.groups
    with found.about(MANIFEST):
        merged = merged_moments(storage, inventory.manifest.units, groups)
        for group in groups:
            stored = stored_moments(storage, group, inventory.recorded)
            assert stored is not None, "the manifest lists them"
            if fault := moments_fault(stored, merged[group.name]):
                path = stats_arrays(group)[fault].shard(0)
                message = f"{storage.name(path)}: does not match the moments of the units; {REPAIR} --level full"
                found.problems.append(StoreProblem(path=path, unit=None, message=message))


def _check_unknown(inventory: Inventory, found: Findings) -> None:
    """Finds files that are in no record."""
    for key in sorted(inventory.entries):
        ours = key in inventory.unit_of or key in inventory.common_keys
        recorded = key in inventory.recorded or key == MANIFEST
        if is_scratch(key) or recorded or (ours and inventory.manifest is None):
            continue
        remedy = "run 'clt store gc'" if ours else f"move it away or {REPAIR}"
        message = f"{inventory.storage.name(key)}: is not part of the store; {remedy}"
        found.problems.append(StoreProblem(path=key, unit=None, message=message))


def _blamed(inventory: Inventory, found: Findings) -> list[StoreProblem]:
    """The faults, but if all commit records name one other store, the store's description is at fault instead."""
    if len(found.strays) < 2 or len(found.strays) < len(inventory.committed) or len(set(found.strays)) > 1:
        return found.problems
    name = inventory.storage.name(SPEC)
    message = f"{name}: does not match the committed units (with {PLAN}); restore both files"
    others = [problem for problem in found.problems if not problem.path.startswith("units/commits/")]
    return [StoreProblem(path=SPEC, unit=None, message=message), *others]
