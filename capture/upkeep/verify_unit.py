"""Verification of one unit against its records; `clt.capture.upkeep.verify_store` verifies all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from clt.capture.storage.base import Storage
from clt.capture.store.committed_units import unit_entry
from clt.capture.store.file_records import FileRecord, check_size, read_checked
from clt.capture.store.json_files import unsealed
from clt.capture.store.layout import commit_path, stats_path
from clt.capture.store.moments import Moments, unpack_moments
from clt.capture.store.quantise import unpack_standardisers
from clt.capture.store.schema import MANIFEST, QUANTISATION, UnitRecord
from clt.capture.store.shard import ShardReader
from clt.capture.upkeep.inventory import Inventory, StoreProblem
from clt.capture.upkeep.verify_values import UnitContents
from clt.errors import StoreError

Level = Literal["index", "chunk", "full"]

REPAIR = "run 'clt store repair'"


@dataclass
class Findings:
    """Faults found so far, and the amount compared.

    Attributes:
        problems: faults in the order found.
        files: number of files compared.
        bytes: size of the files of which every byte was compared.
        strays: `store_digest`s of commit records that name another store.
    """

    problems: list[StoreProblem] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    strays: list[str] = field(default_factory=list)

    def join(self, other: Findings) -> None:
        """Adds the findings of another comparison."""
        self.problems += other.problems
        self.files += other.files
        self.bytes += other.bytes
        self.strays += other.strays

    @contextmanager
    def about(self, path: str, unit: int | None = None) -> Iterator[None]:
        """Turns a StoreError of the `with` block into a fault of a file."""
        self.files += 1
        try:
            yield
        except StoreError as error:
            self.problems.append(StoreProblem(path=path, unit=unit, message=str(error)))


def check_presence(inventory: Inventory, record: FileRecord) -> None:
    """Compares a file's size with its record; a file that was not listed may have been written since."""
    entry = inventory.entries.get(record.path)
    check_size(inventory.storage, record, entry.bytes if entry else inventory.storage.size(record.path))


def check_record(storage: Storage, record: FileRecord, recorded: FileRecord) -> None:
    """Compares a shard with its record.

    Args:
        storage: the store's files.
        record: size and checksum of the existing file.
        recorded: size and checksum at commit.

    Raises:
        StoreError: they differ.
    """
    if record != recorded:
        raise StoreError(f"{storage.name(record.path)}: differs from the file that was committed; {REPAIR}")


def check_unit(inventory: Inventory, unit: int, level: Level, look: bool) -> Findings:
    """Compares the files of a unit with their records.

    Args:
        inventory: the store.
        unit: number of the unit.
        level: level of the comparison.
        look: False compares only presence and size with the manifest.

    Returns:
        The findings.
    """
    found = Findings()
    files: tuple[FileRecord, ...] = ()
    record: UnitRecord | None = None
    if inventory.manifest is not None:
        commit, *rest = inventory.manifest.units[unit].files
        files = tuple(rest)
        with found.about(commit.path, unit):
            check_presence(inventory, commit)
            if look:
                record = _read_record(inventory, unit, found, commit)
    elif look and commit_path(unit) in inventory.entries:
        with found.about(commit_path(unit), unit):
            record = _read_record(inventory, unit, found, None)
            files = record.files
    elif look:
        _check_leftovers(inventory, unit, level, found)
    moments: dict[str, Moments] = {}
    for file in files:
        with found.about(file.path, unit):
            check_presence(inventory, file)
            if look:
                moments |= _check_file(inventory, unit, level, file, found)
    if level == "full" and record is not None and not found.problems:
        _check_contents(inventory, record, moments, found)
    return found


def _read_record(inventory: Inventory, unit: int, found: Findings, known: FileRecord | None) -> UnitRecord:
    """Reads the commit record of a unit and compares it with the manifest and the plan."""
    storage, plan, path = inventory.storage, inventory.plan, commit_path(unit)
    contents = read_checked(storage, known) if known else storage.read(path)
    found.bytes += len(contents)
    name = storage.name(path)
    _, record = unsealed(UnitRecord, contents, name)
    if record.store != inventory.digest:
        found.strays.append(record.store)
    if record.store != inventory.digest or record.unit != unit:
        raise StoreError(f"{name}: belongs to another store or unit; {REPAIR}")
    samples = plan.samples(unit)
    if (record.n_tokens, record.sample_start) != (plan.unit_tokens[unit], samples.start):
        raise StoreError(f"{name}: holds other tokens or samples than the plan; {REPAIR}")
    if not len(samples) == len(record.sample_ids) == len(record.sample_tokens):
        raise StoreError(f"{name}: has {len(record.sample_ids)} samples, the plan {len(samples)}; {REPAIR}")
    if sum(record.sample_tokens) != record.n_tokens or min(record.sample_tokens, default=1) < 1:
        raise StoreError(f"{name}: token counts of its samples do not add up to {record.n_tokens}; {REPAIR}")
    answers = record.answer_tokens or (0,) * len(samples)
    if len(answers) != len(samples) or any(
        not 0 <= a <= n for a, n in zip(answers, record.sample_tokens, strict=False)
    ):
        raise StoreError(f"{name}: answer lengths do not match its samples; {REPAIR}")
    if other := sorted({file.path for file in record.files} ^ set(inventory.unit_keys(unit)[:-1])):
        raise StoreError(f"{name}: lists other files than a unit has, first '{other[0]}'; {REPAIR}")
    if known and inventory.manifest and unit_entry(known, record) != inventory.manifest.units[unit]:
        raise StoreError(f"{name}: lists other files than {MANIFEST}; {REPAIR}")
    return record


def _check_file(inventory: Inventory, unit: int, level: Level, file: FileRecord, found: Findings) -> dict[str, Moments]:
    """Compares a file of a unit; returns the moments if it is the moments file."""
    storage, name = inventory.storage, inventory.storage.name(file.path)
    if file.path == stats_path(unit):
        found.bytes += file.bytes
        return unpack_moments(read_checked(storage, file), [group.name for group in inventory.spec.groups], name)
    array = next(array for array in inventory.arrays.per_unit() if array.shard(unit) == file.path)
    blocks = -(-inventory.plan.unit_tokens[unit] // array.chunk_rows)
    reader = ShardReader(storage, array, unit, file.bytes)
    if reader.check_index() != blocks * array.chunks_per_row:
        raise StoreError(f"{name}: its number of chunks does not match its rows; {REPAIR}")
    if level != "index":
        found.bytes += file.bytes
        check_record(storage, reader.record(), file)
    return {}


def _check_leftovers(inventory: Inventory, unit: int, level: Level, found: Findings) -> None:
    """Checks files of an uncommitted unit: the next worker keeps complete ones, so they must not be damaged."""
    for array in inventory.arrays.per_unit():
        key = array.shard(unit)
        if key in inventory.entries:
            with found.about(key, unit):
                reader = ShardReader(inventory.storage, array, unit, inventory.entries[key].bytes)
                reader.check_index()
                if level != "index":
                    reader.record()
    if stats_path(unit) in inventory.entries:
        with found.about(stats_path(unit), unit):
            contents = inventory.storage.read(stats_path(unit))
            groups = [group.name for group in inventory.spec.groups]
            unpack_moments(contents, groups, inventory.storage.name(stats_path(unit)))


def _check_contents(inventory: Inventory, record: UnitRecord, moments: dict[str, Moments], found: Findings) -> None:
    storage = inventory.storage
    quantised = inventory.spec.store_dtype == "int8"
    contents = UnitContents(
        storage=storage,
        arrays=inventory.arrays,
        record=record,
        sizes={file.path: file.bytes for file in record.files},
        moments=moments,
        standardisers=unpack_standardisers(storage.read(QUANTISATION), QUANTISATION) if quantised else {},
    )
    for path, fault in contents.faults():
        message = f"{storage.name(path)}: {fault}; {REPAIR} --level full"
        found.problems.append(StoreProblem(path=path, unit=record.unit, message=message))
