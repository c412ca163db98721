"""Deals the units of a capture to workers, none of which needs to know of the others.

A worker asks the store what is left, so any number of them may start, stop, die and come back at any time; as long as
one goes on, all units are captured.
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

#: Seconds between looks at units that others hold, first and at most.
_PAUSES = (0.05, 5.0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Schedule:
    """Which units a worker captures."""

    kind: Literal["lease", "static"] = "lease"
    """lease: its share first, then whatever others leave; static: its share and nothing else."""
    rank: int = Field(default=0, ge=0)
    """Number of this worker; its share are the units u with u mod world = rank."""
    world: int = Field(default=1, gt=0)
    """Number of shares."""
    ttl_seconds: float = Field(default=600.0, gt=0, le=86_400)
    """A worker on another host that has been silent for so long is taken to be dead and its unit is done again."""

    @model_validator(mode="after")
    def _rank_fits(self) -> Schedule:
        if self.rank >= self.world:
            raise ValueError(f"rank={self.rank} must be less than world={self.world}; ranks count from 0")
        return self


class UnitQueue(Protocol):
    """Numbered units, each of which is done when its commit record is there: a `StoreWriter`, for instance."""

    @property
    def storage(self) -> Storage:
        """Where the commit records are."""

    def pending(self) -> list[int]:
        """Units without a commit record."""


def assigned_units(queue: UnitQueue, schedule: Schedule, among: Collection[int] | None = None) -> Generator[int]:
    """Units to capture, one at a time, each leased to this worker while the caller works on it.

    When all that is left is leased to others, waits until they have committed it, or takes over what they abandon.

    Args:
        queue: the writer of a store, or anything else that has numbered units.
        schedule: which units this worker captures.
        among: units of the plan to which it is limited; absent: all.

    Yields:
        A unit, which must be committed before the next is asked for. Its lease ends then, or when the generator is
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
                    log.info("%s: waiting for %d units of other workers", queue.storage.url, len(pending))
                time.sleep(pause)
                pause = min(2 * pause, longest)
                continue
            pause = first
            # Its last owner may have committed it after the commits were listed, but only before it gave up the lease.
            if queue.storage.size(commit_path(unit)) is None:
                yield unit
                assert queue.storage.size(commit_path(unit)) is not None, "committed before the next is asked for"
            leases.release(unit)
        leases.sweep()


def _in_order(queue: UnitQueue, schedule: Schedule, among: Collection[int] | None) -> list[int]:
    """Pending units that a worker may capture, its own share first."""
    rank, world = schedule.rank, schedule.world
    pending = queue.pending() if among is None else sorted(set(queue.pending()).intersection(among))
    units = [unit for unit in pending if schedule.kind == "lease" or unit % world == rank]
    return sorted(units, key=lambda unit: ((unit - rank) % world, unit))


def _take_one(leases: Leases, units: list[int]) -> int | None:
    """The first of some units that can be leased."""
    claimed = leases.claimed()
    unit = next((unit for unit in units if unit not in claimed and leases.take(unit)), None)
    if unit is None:
        # Only now is it worth reading who holds the others and whether they are alive.
        live = {lease.unit for lease in leases.live()}
        unit = next((unit for unit in units if unit not in live and leases.take(unit)), None)
    return unit
