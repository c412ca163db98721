"""Repair and garbage collection of a store.

Repair deletes nothing: damaged files move to `quarantine/`, the manifest first, so that the store counts as unfinished
until it is complete again, and each unit's commit record last, so that an interrupted repair leaves visible damage.
The next run of the capture captures the missing units. Repair and garbage collection hold leases on the units they
change, so that no worker starts on them meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clt.capture.storage.base import Storage, StoredFile
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.file_records import record_of
from clt.capture.store.json_files import to_json
from clt.capture.store.layout import commit_path
from clt.capture.store.schema import MANIFEST, PLAN, QUANTISATION, SPEC
from clt.capture.upkeep.inventory import QUARANTINE, Inventory, StoreProblem, sound_inventory, take_inventory
from clt.capture.upkeep.verify_store import verify_store
from clt.capture.upkeep.verify_unit import Level
from clt.capture.writing.leases import LEASES, Leases
from clt.capture.writing.writer import StoreWriter
from clt.errors import StoreError


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """Result of a repair.

    Attributes:
        location: folder or URL of the store.
        problems: faults that were found.
        moved: (old key, new key) of the files moved to quarantine.
        rebuilt: files rebuilt from the rest of the store.
        recapture: units that the next run of the capture captures again.
        previous_id: id of the store before; None without a readable manifest.
        store_id: id of the store now; None if units must be captured first.
    """

    location: str
    problems: tuple[StoreProblem, ...]
    moved: tuple[tuple[str, str], ...]
    rebuilt: tuple[str, ...]
    recapture: tuple[int, ...]
    previous_id: str | None
    store_id: str | None


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """Result of a garbage collection.

    Attributes:
        location: folder or URL of the store.
        dry_run: nothing was deleted; `files` are those that would be.
        files: the deleted files.
    """

    location: str
    dry_run: bool
    files: tuple[StoredFile, ...]

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(entry.bytes for entry in self.files)


def collect_garbage(location: str | Path | Storage, *, dry_run: bool = False, quarantine: bool = False) -> GcReport:
    """Deletes partial files, files of uncommitted units, and leases.

    Args:
        location: folder or URL of the store, or its storage.
        dry_run: delete nothing, only list the files.
        quarantine: also delete the files that `repair_store` moved to quarantine.

    Returns:
        The files.

    Raises:
        StoreError: there is no store, its description is damaged, or a capture is running.
    """
    inventory = sound_inventory(location)
    storage = inventory.storage
    _refuse_while_captured(storage)
    garbage = list(inventory.leftovers())
    garbage += [entry for key, entry in inventory.entries.items() if key.startswith(LEASES) and entry not in garbage]
    garbage += [entry for key, entry in inventory.entries.items() if quarantine and key.startswith(QUARANTINE)]
    if not dry_run:
        units = sorted({inventory.unit_of[entry.key] for entry in garbage if entry.key in inventory.unit_of})
        # Files derived from others are deleted first: if killed here, the next worker must not find them alone.
        place = {key: i for unit in units for i, key in enumerate(inventory.unit_keys(unit))}
        with _held(storage, units):
            for entry in sorted(garbage, key=lambda entry: -place.get(entry.key, len(place))):
                unit = inventory.unit_of.get(entry.key)
                # A worker may have committed the unit between the listing and the lease taken here.
                if unit is None or inventory.manifest or storage.size(commit_path(unit)) is None:
                    storage.delete(entry.key)
    return GcReport(location=storage.url, dry_run=dry_run, files=tuple(garbage))


def repair_store(location: str | Path | Storage, *, level: Level = "chunk", jobs: int = 1) -> RepairReport:
    """Moves damaged files to quarantine and rebuilds the files that follow from the rest.

    Args:
        location: folder or URL of the store, or its storage.
        level: level of the search for damage, see `verify_store`.
        jobs: number of threads.

    Returns:
        The faults and the actions taken; an undamaged store is not changed.

    Raises:
        StoreError: there is no store, a capture is running, or a damaged file cannot be rebuilt.
    """
    storage = open_storage(location)
    _refuse_while_captured(storage)
    problems = verify_store(storage, level, jobs=jobs).problems
    inventory, _ = take_inventory(storage)
    damaged = {problem.path for problem in problems}
    lost = sorted(damaged & {SPEC, PLAN, QUANTISATION})
    descriptions = _descriptions(inventory) if inventory else {}
    if inventory is None or set(lost) - descriptions.keys():
        raise StoreError(
            f"{storage.url}: {' and '.join(lost)} cannot be rebuilt from the rest; restore from a copy, or capture "
            f"into another folder"
        )
    units = sorted({problem.unit for problem in problems if problem.unit is not None})
    quarantine = _Quarantine(inventory)
    with _held(storage, units):
        for key in lost:
            quarantine.take(key)
            storage.put(key, descriptions[key])
        if units or damaged & inventory.common_keys:
            quarantine.take(MANIFEST)
        for unit in units:
            for key in inventory.unit_keys(unit):
                quarantine.take(key)
        for key in (*(inventory.stats_keys if units else ()), *sorted(damaged - {MANIFEST} - set(lost))):
            quarantine.take(key)
    store_id = inventory.store_id
    if problems or store_id is None:
        store_id = _finalize(inventory)
    touched = sorted({key for key, _ in quarantine.moved} | damaged)
    return RepairReport(
        location=storage.url,
        problems=problems,
        moved=tuple(quarantine.moved),
        rebuilt=tuple(key for key in touched if key in inventory.common_keys and storage.size(key) is not None),
        recapture=tuple(units),
        previous_id=inventory.store_id,
        store_id=store_id,
    )


class _Quarantine:
    """A new quarantine folder for damaged files."""

    def __init__(self, inventory: Inventory) -> None:
        self._storage = inventory.storage
        folders = {key.split("/")[1] for key in inventory.entries if key.startswith(QUARANTINE)}
        number = max((int(folder) for folder in folders if folder.isdecimal()), default=0) + 1
        self._folder = f"{QUARANTINE}{number:06d}"
        self.moved: list[tuple[str, str]] = []

    def take(self, key: str) -> None:
        """Moves a file into the folder if it exists."""
        if self._storage.size(key) is not None:
            to = f"{self._folder}/{key}"
            self._storage.move(key, to)
            self.moved.append((key, to))


def _descriptions(inventory: Inventory) -> dict[str, bytes]:
    """Contents of store.json and plan.json of a complete store, where its manifest determines them."""
    contents = {SPEC: to_json(inventory.spec), PLAN: to_json(inventory.plan)}
    return {key: text for key, text in contents.items() if inventory.recorded.get(key) == record_of(key, text)}


def _finalize(inventory: Inventory) -> str | None:
    """Rebuilds the files that follow from the units, if all are committed; returns the store's id."""
    storage = inventory.storage
    if any(storage.size(commit_path(unit)) is None for unit in range(inventory.plan.n_units)):
        return None
    return StoreWriter(storage, inventory.spec, inventory.plan).finalize()


def _refuse_while_captured(storage: Storage) -> None:
    for lease in Leases(storage).live():
        raise StoreError(
            f"{storage.url}: process {lease.process} on {lease.host.split()[0]} is capturing unit {lease.unit}; "
            f"wait for it or stop it"
        )


@contextmanager
def _held(storage: Storage, units: Sequence[int]) -> Iterator[None]:
    """Holds leases on units, so that workers that start now skip them."""
    with Leases(storage) as leases:
        for unit in units:
            if not leases.take(unit):
                raise StoreError(f"{storage.url}: unit {unit} is being captured; wait for it or stop it")
        yield
