"""Progress of a store: units committed, leased and pending, and the bytes of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clt.capture.storage.base import Storage
from clt.capture.upkeep.inventory import QUARANTINE, sound_inventory
from clt.capture.writing.leases import Lease, Leases


@dataclass(frozen=True, kw_only=True)
class StoreStatus:
    """How far a store is.

    Attributes:
        location: folder or URL of the store.
        store_id: hash of its contents; None while it is unfinished.
        units: units of the plan.
        committed: units that are captured.
        pending: units that nobody has captured or is capturing.
        leases: who is capturing what.
        planned_tokens: tokens of all units.
        tokens: tokens of the captured units.
        bytes: of the files of captured units and of those that all units share.
        garbage_files: files that no record speaks of and that `collect_garbage` deletes.
        garbage_bytes: of them.
        quarantine_bytes: of the files that `repair_store` moved aside.
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
        """Whether the store can be read."""
        return self.store_id is not None


def store_status(location: str | Path | Storage) -> StoreStatus:
    """How far a store is, from a listing and the leases.

    Args:
        location: folder or URL of the store, or its files.

    Returns:
        The status.

    Raises:
        StoreError: there is no store, or what describes it is damaged.
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
