"""Compares a store with what its records say of it: the indexes, every byte, or also what the bytes mean.

A problem never ends the search. Whole-file checksums settle every question about bytes, because the manifest holds one
for each file and a hash of itself; the checksum of each chunk, taken in the same pass, says where a file is damaged.
"""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch

from clt.capture.storage.base import Storage
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.arrays import ArraySpec
from clt.capture.store.committed_units import merged_moments
from clt.capture.store.file_records import read_checked
from clt.capture.store.json_files import parse
from clt.capture.store.layout import stats_arrays
from clt.capture.store.moments import Moments
from clt.capture.store.quantise import unpack_standardisers
from clt.capture.store.schema import MANIFEST, PLAN, QUANTISATION, SPEC, TOKEN_CLASSES, CapturePlan, StoreSpec
from clt.capture.store.shard import ShardReader, standing_shard
from clt.capture.store.shard_rows import read_rows
from clt.capture.upkeep.inventory import Inventory, StoreProblem, is_scratch, take_inventory
from clt.capture.upkeep.verify_unit import REPAIR, Findings, Level, check_presence, check_record, check_unit
from clt.capture.upkeep.verify_values import moments_fault
from clt.errors import ConfigError, StoreError


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was compared, and what is wrong.

    Attributes:
        location: folder or URL of the store.
        level: how much was compared.
        store_id: hash of its contents; None if it is unfinished or its manifest is damaged.
        complete: whether there is a manifest; a store without one is unfinished, which is no problem.
        units: units of the plan.
        committed: units that have a commit record.
        checked: numbers of the units whose files were looked into.
        files: files that were looked at.
        bytes: of the files of which every byte was compared.
        seconds: how long it took.
        problems: what is wrong, units in order.
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
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1)


def verify_store(
    location: str | Path | Storage, level: Level = "chunk", *, sample: float = 1.0, seed: int = 0, jobs: int = 1
) -> VerifyReport:
    """Compares a store with its records; an unfinished one as far as it is committed.

    Args:
        location: folder or URL of the store, or its files.
        level: "index" compares sizes, small files and the indexes of shards; "chunk" every byte; "full" also what the
            values mean: finite, where they belong, and with the recorded statistics.
        sample: share of the units that are looked into, in (0, 1]; the presence and size of all files are compared
            anyway.
        seed: decides which units those are.
        jobs: threads.

    Returns:
        The report; damage is a problem in it and not an error.

    Raises:
        StoreError: there is no store, or it is one of another major version.
        ConfigError: the share is not in (0, 1], or there is no such level.
    """
    if not 0 < sample <= 1:
        raise ConfigError(f"sample={sample} is not a share of the units; use a number above 0 and up to 1")
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
    """Compares the files that belong to no unit, and looks for those that belong to nothing."""
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
    """Files of a complete store that belong to no unit: the manifest knows them."""
    assert inventory.manifest is not None
    storage = inventory.storage
    merged = {array.shard(0): array for array in _merged_arrays(inventory)}
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
                raise StoreError(f"{storage.name(PLAN)}: plans other units than {MANIFEST} has; {REPAIR}")
    with found.about(MANIFEST):
        listed = {record.path for record in inventory.manifest.files}
        if other := sorted(listed ^ (inventory.common_keys - {MANIFEST})):
            raise StoreError(f"{storage.name(MANIFEST)}: lists other files than a store has, first '{other[0]}'")


def _check_unfinished(inventory: Inventory, found: Findings) -> None:
    """Files of an unfinished store that belong to no unit: they follow from its spec or are read to see."""
    storage, entries = inventory.storage, inventory.entries
    merged = _merged_arrays(inventory)
    expected = inventory.arrays.metadata_files() | {f"{array.key}/zarr.json": array.metadata() for array in merged}
    for key in sorted(expected.keys() & entries.keys()):
        with found.about(key):
            found.bytes += len(expected[key])
            if storage.read(key) != expected[key]:
                raise StoreError(f"{storage.name(key)}: is not what this store needs; {REPAIR}")
    for array in merged:
        if array.shard(0) in entries:
            with found.about(array.shard(0)):
                found.bytes += standing_shard(storage, array, 0).record().bytes
    if inventory.spec.store_dtype == "int8" and (QUANTISATION in entries or inventory.committed):
        with found.about(QUANTISATION):
            unpack_standardisers(storage.read(QUANTISATION), storage.name(QUANTISATION))


def _merged_arrays(inventory: Inventory) -> list[ArraySpec]:
    return [array for group in inventory.spec.groups for array in stats_arrays(group).values()]


def _check_merged_values(inventory: Inventory, found: Findings) -> None:
    """Whether the merged statistics are those of the units."""
    assert inventory.manifest is not None
    storage, groups = inventory.storage, inventory.spec.groups
    with found.about(MANIFEST):
        merged = merged_moments(storage, inventory.manifest.units, groups)
        for group in groups:
            arrays = stats_arrays(group)
            rows = {
                name: read_rows(
                    ShardReader(storage, array, 0, inventory.recorded[array.shard(0)].bytes), array, len(TOKEN_CLASSES)
                )
                for name, array in arrays.items()
            }
            stored = Moments(**{name: torch.from_numpy(part) for name, part in rows.items()})
            if fault := moments_fault(stored, merged[group.name]):
                path = arrays[fault].shard(0)
                message = f"{storage.name(path)}: is not merged from the units' statistics; {REPAIR} --level full"
                found.problems.append(StoreProblem(path=path, unit=None, message=message))


def _check_unknown(inventory: Inventory, found: Findings) -> None:
    """Files that no record speaks of."""
    for key in sorted(inventory.entries):
        ours = key in inventory.unit_of or key in inventory.common_keys
        recorded = key in inventory.recorded or key == MANIFEST
        if is_scratch(key) or recorded or (ours and inventory.manifest is None):
            continue
        remedy = "run 'clt store gc'" if ours else f"move it away or {REPAIR}"
        message = f"{inventory.storage.name(key)}: is no part of the store; {remedy}"
        found.problems.append(StoreProblem(path=key, unit=None, message=message))


def _blamed(inventory: Inventory, found: Findings) -> list[StoreProblem]:
    """Problems, where commit records that all name one other store speak against the store's description instead."""
    if len(found.strays) < 2 or len(found.strays) < len(inventory.committed) or len(set(found.strays)) > 1:
        return found.problems
    name = inventory.storage.name(SPEC)
    message = f"{name}: neither it nor {PLAN} is what the committed units were captured with; restore both"
    others = [problem for problem in found.problems if not problem.path.startswith("units/commits/")]
    return [StoreProblem(path=SPEC, unit=None, message=message), *others]
