"""How far a store is, what in it is garbage, and how a damaged one is brought back without losing anything.

Repair never deletes: files that are wrong move to `quarantine/`, the manifest first, so that a store is unfinished
until it is whole again, and a unit's commit record last, so that a repair that is cut short leaves damage that can be
seen. The next capture run then captures exactly the units that are gone. Both repair and garbage collection hold leases
of the units they touch, so that no worker that starts meanwhile works on them.
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
    """What a repair did.

    Attributes:
        location: folder or URL of the store.
        problems: what was wrong.
        moved: files that were moved aside: their key, and their key now.
        rebuilt: files that were made again from the rest.
        recapture: units that the next run of the same capture captures again.
        previous_id: hash of the store's contents before; None if there was no readable manifest.
        store_id: hash of the store's contents now; None if units must be captured first.
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
    """What was deleted.

    Attributes:
        location: folder or URL of the store.
        dry_run: nothing was deleted; `files` says what would be.
        files: the files.
    """

    location: str
    dry_run: bool
    files: tuple[StoredFile, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the files."""
        return sum(entry.bytes for entry in self.files)


def collect_garbage(location: str | Path | Storage, *, dry_run: bool = False, quarantine: bool = False) -> GcReport:
    """Deletes partial files, files of units that were never committed, and leases; what is recorded stays.

    Args:
        location: folder or URL of the store, or its files.
        dry_run: only says what would be deleted.
        quarantine: also deletes what `repair_store` moved aside.

    Returns:
        What was deleted.

    Raises:
        StoreError: there is no store, what describes it is damaged, or someone is capturing.
    """
    inventory = sound_inventory(location)
    storage = inventory.storage
    _refuse_while_captured(storage)
    garbage = list(inventory.leftovers())
    garbage += [entry for key, entry in inventory.entries.items() if key.startswith(LEASES) and entry not in garbage]
    garbage += [entry for key, entry in inventory.entries.items() if quarantine and key.startswith(QUARANTINE)]
    if not dry_run:
        units = sorted({inventory.unit_of[entry.key] for entry in garbage if entry.key in inventory.unit_of})
        # What follows from other files goes before them: killed here, none may stay for the next owner to find.
        place = {key: i for unit in units for i, key in enumerate(inventory.unit_keys(unit))}
        with _held(storage, units):
            for entry in sorted(garbage, key=lambda entry: -place.get(entry.key, len(place))):
                unit = inventory.unit_of.get(entry.key)
                # A worker may have committed the unit after the listing and before its lease was taken here.
                if unit is None or inventory.manifest or storage.size(commit_path(unit)) is None:
                    storage.delete(entry.key)
    return GcReport(location=storage.url, dry_run=dry_run, files=tuple(garbage))


def repair_store(location: str | Path | Storage, *, level: Level = "chunk", jobs: int = 1) -> RepairReport:
    """Moves what is damaged to quarantine and makes again what follows from the rest.

    Args:
        location: folder or URL of the store, or its files.
        level: how much is compared to find the damage, see `verify_store`.
        jobs: threads that compare.

    Returns:
        What was wrong and what was done; if nothing was, nothing changed.

    Raises:
        StoreError: there is no store, someone is capturing, or a file is damaged that nothing else can replace.
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
            f"{storage.url}: {' and '.join(lost)} cannot be made from the rest; restore from a copy, or capture into "
            f"another folder"
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
    """A new folder for files that are wrong."""

    def __init__(self, inventory: Inventory) -> None:
        self._storage = inventory.storage
        folders = {key.split("/")[1] for key in inventory.entries if key.startswith(QUARANTINE)}
        number = max((int(folder) for folder in folders if folder.isdecimal()), default=0) + 1
        self._folder = f"{QUARANTINE}{number:06d}"
        self.moved: list[tuple[str, str]] = []

    def take(self, key: str) -> None:
        """Moves a file there, if it is there to be moved."""
        if self._storage.size(key) is not None:
            to = f"{self._folder}/{key}"
            self._storage.move(key, to)
            self.moved.append((key, to))


def _descriptions(inventory: Inventory) -> dict[str, bytes]:
    """What store.json and plan.json of a complete store must have been, where its manifest is enough to tell."""
    contents = {SPEC: to_json(inventory.spec), PLAN: to_json(inventory.plan)}
    return {key: text for key, text in contents.items() if inventory.recorded.get(key) == record_of(key, text)}


def _finalize(inventory: Inventory) -> str | None:
    """Makes again what follows from the units, if all of them are committed; gives the store's id."""
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
    """Keeps workers that start now away from units."""
    with Leases(storage) as leases:
        for unit in units:
            if not leases.take(unit):
                raise StoreError(f"{storage.url}: unit {unit} is being captured; wait for it or stop it")
        yield
