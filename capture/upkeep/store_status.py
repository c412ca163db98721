"""Progress of a store: units committed, leased and pending, and the bytes of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clt.capture.storage.base import Storage
from clt.capture.upkeep.inventory import QUARANTINE, sound_inventory
from clt.capture.writing.leases import Lease, Leases


@dataclass(frozen=True, kw_only=True)
class StoreStatus:
    """Progress of a store.

    Attributes:
        location: folder or URL of the store.
        store_id: hash of its contents; None if it is unfinished.
        units: number of units of the plan.
        committed: number of committed units.
        pending: number of units neither committed nor leased.
        leases: leases on uncommitted units.
        planned_tokens: tokens of all units.
        tokens: tokens of the committed units.
        bytes: size of the files of committed units and of those common to all units.
        garbage_files: number of unrecorded files that `collect_garbage` deletes.
        garbage_bytes: their size.
        quarantine_bytes: size of the files in quarantine.
    """

    location: str
    store_id: str | None
    units: int
    committed: int
    pending: int
    leases: tuple[Lease, ...]
    planned_tokens: int
    tokens: int
    bytes: int
    garbage_files: int
    garbage_bytes: int
    quarantine_bytes: int

    @property
    def complete(self) -> bool:
        """True if the store has a manifest and can be opened."""
        return self.store_id is not None


def store_status(location: str | Path | Storage) -> StoreStatus:
    """Progress of a store, from a listing of its files and its leases.

    Args:
        location: folder or URL of the store, or its storage.

    Returns:
        The status.

    Raises:
        StoreError: there is no store, or its description is damaged.
    """
    inventory = sound_inventory(location)
    committed, plan = set(inventory.committed), inventory.plan
    leases = tuple(lease for lease in Leases(inventory.storage).live() if lease.unit not in committed)
    pending = set(range(plan.n_units)) - committed - {lease.unit for lease in leases}
    garbage = list(inventory.leftovers())
    entries = inventory.entries.values()
    return StoreStatus(
        location=inventory.storage.url,
        store_id=inventory.store_id,
        units=plan.n_units,
        committed=len(committed),
        pending=len(pending),
        leases=leases,
        planned_tokens=sum(plan.unit_tokens),
        tokens=sum(plan.unit_tokens[unit] for unit in committed),
        bytes=sum(
            entry.bytes
            for entry in entries
            if inventory.unit_of.get(entry.key) in committed or entry.key in inventory.common_keys
        ),
        garbage_files=len(garbage),
        garbage_bytes=sum(entry.bytes for entry in garbage),
        quarantine_bytes=sum(entry.bytes for entry in entries if entry.key.startswith(QUARANTINE)),
    )
