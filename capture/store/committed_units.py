"""Commit records and moments of a store's committed units."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from clt.capture.storage.base import Storage
from clt.capture.store.file_records import FileRecord, read_checked, record_of
from clt.capture.store.json_files import unsealed
from clt.capture.store.layout import commit_path, stats_arrays, stats_path
from clt.capture.store.moments import Moments, unpack_moments
from clt.capture.store.schema import TOKEN_CLASSES, SiteGroup, UnitEntry, UnitRecord
from clt.capture.store.shard import ShardReader
from clt.capture.store.shard_rows import read_rows
from clt.errors import StoreError


def read_commit(storage: Storage, unit: int, digest: str) -> tuple[FileRecord, UnitRecord]:
    """Reads the commit record of a unit.

    Args:
        storage: the store's files.
        unit: number of the unit.
        digest: `store_digest` that the record must carry.

    Returns:
        The size and checksum of the record's file, and the record.

    Raises:
        StoreError: it is missing or damaged, or belongs to another store or unit.
    """
    path = commit_path(unit)
    contents = storage.read(path)
    _, record = unsealed(UnitRecord, contents, storage.name(path))
    if record.store != digest or record.unit != unit:
        raise StoreError(f"{storage.name(path)}: belongs to another store or unit; run 'clt store repair'")
    return record_of(path, contents), record


def committed_units(storage: Storage) -> set[int]:
    """Numbers of all units with a commit record."""
    names = [entry.key.rpartition("/")[2] for entry in storage.list("units/commits/")]
    return {int(name.removesuffix(".json")) for name in names if re.fullmatch(r"[0-9]+\.json", name)}


def unit_entry(commit: FileRecord, record: UnitRecord) -> UnitEntry:
    """The manifest's entry for a unit."""
    return UnitEntry(
        unit=record.unit,
        n_tokens=record.n_tokens,
        sample_start=record.sample_start,
        n_samples=len(record.sample_ids),
        files=(commit, *record.files),
    )


def unit_moments(storage: Storage, record: UnitRecord | UnitEntry, groups: tuple[SiteGroup, ...]) -> dict[str, Moments]:
    """Reads the moments of a committed unit.

    Args:
        storage: the store's files.
        record: the unit's commit record or manifest entry.
        groups: site groups of the store.

    Returns:
        Moments by name of the group.

    Raises:
        StoreError: the file is missing or damaged.
    """
    path = stats_path(record.unit)
    file = next(file for file in record.files if file.path == path)
    return unpack_moments(read_checked(storage, file), [group.name for group in groups], storage.name(path))


def merged_moments(storage: Storage, units: Sequence[UnitEntry], groups: tuple[SiteGroup, ...]) -> dict[str, Moments]:
    """Merges the moments of units, in the given order.

    Args:
        storage: the store's files.
        units: manifest entries of the units.
        groups: site groups of the store.

    Returns:
        Moments by name of the group.

    Raises:
        StoreError: a file is missing or damaged.
    """
    total = {group.name: Moments.zeros(len(group.sites), group.width) for group in groups}
    for unit in units:
        for name, moments in unit_moments(storage, unit, groups).items():
            total[name] = total[name].merge(moments)
    return total


def stored_moments(storage: Storage, group: SiteGroup, files: Mapping[str, FileRecord]) -> Moments | None:
    """Reads the merged moments of a complete store.

    Args:
        storage: the store's files.
        group: the site group.
        files: the store's files by key.

    Returns:
        Moments over all units; None if the store has none.

    Raises:
        StoreError: a file is missing or damaged.
    """
    arrays = stats_arrays(group)
    if not all(array.shard(0) in files for array in arrays.values()):
        return None
    readers = {name: ShardReader(storage, array, 0, files[array.shard(0)].bytes) for name, array in arrays.items()}
    rows = {name: read_rows(reader, arrays[name], len(TOKEN_CLASSES)) for name, reader in readers.items()}
    return Moments(**{name: torch.from_numpy(part) for name, part in rows.items()})
