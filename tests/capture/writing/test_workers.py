"""Assignment of units: each is captured once, also when workers start late, wait, fail or return."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from clt.capture.storage.base import Storage, StoredFile
from clt.capture.storage.local import LocalStorage
from clt.capture.writing.leases import Leases
from clt.capture.writing.workers import Schedule, assigned_units
from clt.capture.writing.writer import StoreWriter
from clt.config import parse_config
from clt.errors import ConfigError

from ..stores import make_plan, make_spec, unit_data
from .test_leases import foreign, names, put, storage

__all__ = ["storage"]

LENGTHS = [40] * 7


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 2, "world": 2}, "rank=2 must be less than world=2"),
        ({"rank": -1}, "rank"),
        ({"world": 0}, "world"),
        ({"kind": "stealing"}, "kind"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": float("nan")}, "ttl_seconds"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        parse_config(Schedule, settings, "test")
    assert "\n" not in str(error.value)


def begin(storage: Storage) -> StoreWriter:
    """A store of seven units, none of them captured."""
    return StoreWriter(storage, make_spec(), make_plan(LENGTHS))


def commit(writer: StoreWriter, unit: int) -> None:
    assert writer.commit(unit, unit_data(LENGTHS, writer.plan.samples(unit), writer.spec))


def captured(writer: StoreWriter, schedule: Schedule) -> list[int]:
    """Units that a worker with a schedule captures, in order."""
    units = []
    for unit in assigned_units(writer, schedule):
        commit(writer, unit)
        units.append(unit)
    return units


def test_static_workers_do_their_share_and_stop(storage: Storage) -> None:
    writer = begin(storage)
    assert captured(writer, Schedule(kind="static", rank=1, world=3)) == [1, 4]
    assert captured(writer, Schedule(kind="static", rank=0, world=3)) == [0, 3, 6]
    assert writer.pending() == [2, 5]
    # The number of workers may change.
    assert captured(writer, Schedule(kind="static", rank=1, world=2)) == [5]
    assert names(storage) == []


def test_a_leasing_worker_does_its_share_first_and_then_remaining_units(storage: Storage) -> None:
    writer = begin(storage)
    commit(writer, 2)
    assert captured(writer, Schedule(rank=1, world=3)) == [1, 4, 5, 0, 3, 6]
    assert captured(writer, Schedule()) == []


def test_workers_beside_each_other_capture_every_unit_once(storage: Storage) -> None:
    writer = begin(storage)
    done: list[list[int]] = [[], [], []]

    def work(rank: int) -> None:
        done[rank] += captured(writer, Schedule(rank=rank, world=3))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(unit for units in done for unit in units) == list(range(7))
    assert writer.pending() == [] and names(storage) == []


def test_a_worker_waits_for_the_units_of_others_and_takes_over_those_that_are_abandoned(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    writer = begin(storage)
    put(storage, foreign(unit=0, ttl=0.5))
    with Leases(storage) as other:
        assert other.take(5)
        mine = assigned_units(writer, Schedule())
        units = []
        for _ in range(5):
            units.append(next(mine))
            commit(writer, units[-1])
        assert units == [1, 2, 3, 4, 6]
        assert next(mine) == 0
        commit(writer, 0)
        timer = threading.Timer(0.3, commit, (writer, 5))
        timer.start()
        assert list(mine) == []
        timer.join()
    assert "units of other workers" in caplog.text
    assert writer.pending() == []


def test_the_lease_ends_when_the_worker_does(storage: Storage) -> None:
    writer = begin(storage)

    def fail() -> Iterator[None]:
        with closing(assigned_units(writer, Schedule())) as units:
            for _ in units:
                assert names(storage) == ["000000.0001.json"]
                raise OSError("the model ran out of memory")
        yield

    with pytest.raises(OSError, match="out of memory"):
        list(fail())
    assert names(storage) == []
    assert next(assigned_units(writer, Schedule())) == 0


def test_a_unit_that_was_committed_before_its_lease_was_given_up_is_not_captured_again(tmp_path: Path) -> None:
    class Late(LocalStorage):
        """Another worker commits unit 0 between this one's listing of commits and of leases."""

        def list(self, prefix: str) -> list[StoredFile]:
            found = super().list(prefix)
            if prefix == "units/commits/" and 0 in other.pending():
                commit(other, 0)
            return found

    other = begin(LocalStorage(tmp_path))
    assert captured(begin(Late(tmp_path)), Schedule()) == [1, 2, 3, 4, 5, 6]


def test_a_worker_that_returns_without_its_unit_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="committed before the next"):
        list(assigned_units(begin(LocalStorage(tmp_path)), Schedule()))
