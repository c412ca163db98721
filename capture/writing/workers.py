"""Assignment of a capture's units to workers, without a coordinator.

Each worker reads the remaining units from the store, so that workers may start, stop, fail and restart at any time; all
units are captured as long as one of them runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Generator
from typing import Literal, Protocol

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from clt.capture.storage.base import Storage
from clt.capture.store.layout import commit_path
from clt.capture.writing.leases import Leases
from clt.config import STRICT

log = logging.getLogger(__name__)

#: Seconds between checks of units that others hold: the first pause and the longest.
_PAUSES = (0.05, 5.0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Schedule:
    """Share of the units that a worker captures."""

    kind: Literal["lease", "static"] = "lease"
    """lease: its own share first, then units that others leave; static: its own share only."""
    rank: int = Field(default=0, ge=0)
    """Rank of this worker; its share is the units u with u mod world = rank."""
    world: int = Field(default=1, gt=0)
    """Number of workers among which the units are shared."""
    ttl_seconds: float = Field(default=600.0, gt=0, le=86_400)
    """Seconds without lease renewal after which a worker on another host counts as dead and its unit is free again."""

    @model_validator(mode="after")
    def _rank_fits(self) -> Schedule:
        if self.rank >= self.world:
            raise ValueError(f"rank={self.rank} must be less than world={self.world}; ranks count from 0")
        return self


class UnitQueue(Protocol):
    """Numbered units, each done when its commit record exists; for example a `StoreWriter`."""

    @property
    def storage(self) -> Storage:
        """Storage of the commit records."""

    def pending(self) -> list[int]:
        """Units without a commit record."""


def assigned_units(queue: UnitQueue, schedule: Schedule, among: Collection[int] | None = None) -> Generator[int]:
    """Units to capture, one at a time, each leased to this worker until the next is requested.

    When all remaining units are leased to other workers, waits until they are committed or their leases expire.

    Args:
        queue: the writer of a store, or anything else that has numbered units.
        schedule: share of the units that this worker captures.
        among: units to choose from; default: all.

    Yields:
        A unit, which must be committed before the next is requested. Its lease ends then, or when the generator is
        closed (`contextlib.closing`).

    Raises:
        StoreError: the store's files cannot be read or written.
    """
    first, longest = _PAUSES
    pause = first
    with Leases(queue.storage, schedule.ttl_seconds) as leases:
        while pending := _in_order(queue, schedule, among):
            unit = _take_one(leases, pending)
            if unit is None:
                if pause == first:
                    log.info("waiting for units of other workers: store=%s units=%d", queue.storage.url, len(pending))
                time.sleep(pause)
                pause = min(2 * pause, longest)
                continue
            pause = first
            # Its last owner may have committed it after the listing; owners commit before they release.
            if queue.storage.size(commit_path(unit)) is None:
                yield unit
                assert queue.storage.size(commit_path(unit)) is not None, "committed before the next is requested"
            leases.release(unit)
        leases.sweep()


def _in_order(queue: UnitQueue, schedule: Schedule, among: Collection[int] | None) -> list[int]:
    """Pending units that a worker may capture, its own share first."""
    rank, world = schedule.rank, schedule.world
    pending = queue.pending() if among is None else sorted(set(queue.pending()).intersection(among))
    units = [unit for unit in pending if schedule.kind == "lease" or unit % world == rank]
    return sorted(units, key=lambda unit: ((unit - rank) % world, unit))


def _take_one(leases: Leases, units: list[int]) -> int | None:
    """Leases the first free unit; None if all are leased to others."""
    claimed = leases.claimed()
    unit = next((unit for unit in units if unit not in claimed and leases.take(unit)), None)
    if unit is None:
        # Leases are only read when every unit has one.
        live = {lease.unit for lease in leases.live()}
        unit = next((unit for unit in units if unit not in live and leases.take(unit)), None)
    return unit
