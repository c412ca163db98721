"""Leases: one owner at a time, and no waiting for ended processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from clt.capture.storage.base import Storage
from clt.capture.storage.local import LocalStorage
from clt.capture.storage.open_storage import open_storage
from clt.capture.writing.leases import LEASES, Lease, Leases
from clt.errors import StoreError

LENGTHS = [40] * 7


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "store")
    pytest.importorskip("obstore")
    return open_storage(f"memory://{uuid.uuid4().hex}")


def names(storage: Storage) -> list[str]:
    return [entry.key.removeprefix(LEASES) for entry in storage.list(LEASES)]


def foreign(**changes: Any) -> Lease:
    """A lease of unit 3 by a worker on another host, renewed just now."""
    lease = Lease(
        unit=3, generation=1, owner="other", host="other", process=1, started=1, renewed_at=time.time(), ttl=60.0
    )
    return replace(lease, **changes)


def put(storage: Storage, lease: Lease) -> None:
    contents = json.dumps(asdict(lease)).encode()
    assert storage.put(f"{LEASES}{lease.unit:06d}.{lease.generation:04d}.json", contents)


def mine(storage: Storage) -> Lease:
    """A lease of unit 3 by this process that was never released."""
    with Leases(storage) as leases:
        assert leases.take(3)
        (lease,) = leases.live()
    return replace(lease, owner="an earlier one")


def test_a_unit_has_one_owner_until_it_is_released(storage: Storage) -> None:
    with Leases(storage) as one, Leases(storage) as other:
        assert one.take(3) and not other.take(3)
        assert other.take(4)
        assert [(lease.unit, lease.owner) for lease in one.live()] == [(3, one.owner), (4, other.owner)]
        assert one.claimed() == {3, 4}
        one.release(3)
        assert names(storage) == ["000004.0001.json"]
        assert other.take(3)
    assert names(storage) == []


def test_a_lease_that_was_not_renewed_is_taken_over_by_the_next_generation(storage: Storage) -> None:
    put(storage, foreign(generation=4))
    with Leases(storage) as leases:
        assert not leases.take(3)
    storage.replace(f"{LEASES}000003.0004.json", json.dumps(asdict(foreign(renewed_at=time.time() - 61))).encode())
    with Leases(storage) as leases:
        assert leases.live() == []
        assert leases.take(3)
        assert names(storage) == ["000003.0005.json"]


@pytest.mark.parametrize("contents", [b"", b"{", b"\xff\xfe", b'{"unit": 3}', b"[]"])
def test_a_damaged_lease_counts_as_expired(storage: Storage, contents: bytes) -> None:
    storage.put(f"{LEASES}000003.0001.json", contents)
    with Leases(storage) as leases:
        assert leases.take(3)
        assert names(storage) == ["000003.0002.json"]


def test_a_lease_from_the_future_counts_as_expired(storage: Storage) -> None:
    put(storage, foreign(renewed_at=time.time() + 3600))
    with Leases(storage) as leases:
        assert leases.take(3)


def test_partial_and_strange_files_are_no_leases(storage: Storage) -> None:
    for name in (".000003.0001.json.ab.partial", "notes.txt", "000003.json"):
        storage.put(LEASES + name, b"")
    with Leases(storage) as leases:
        assert leases.claimed() == set()
        leases.sweep()
    assert len(names(storage)) == 3


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not list processes")


@needs_proc
def test_a_live_process_of_this_host_keeps_its_lease(storage: Storage) -> None:
    put(storage, mine(storage))
    with Leases(storage) as leases:
        assert not leases.take(3)


@needs_proc
def test_a_process_that_was_given_the_id_of_a_dead_one_does_not_keep_its_lease(storage: Storage) -> None:
    lease = mine(storage)
    assert lease.started is not None
    put(storage, replace(lease, started=lease.started - 1))
    with Leases(storage) as leases:
        assert leases.take(3)


@needs_proc
def test_a_killed_process_loses_its_lease_at_once_even_while_nobody_has_waited_for_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from clt.capture.writing.leases import Leases\n"
        "from clt.capture.storage.open_storage import open_storage\n"
        "with Leases(open_storage(sys.argv[1])) as leases: print(leases.take(3), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "True\n"
        with Leases(open_storage(tmp_path)) as leases:
            assert not leases.take(3)
            owner.send_signal(signal.SIGKILL)
            while Path(f"/proc/{owner.pid}/stat").read_text().split()[2] != "Z":
                time.sleep(0.01)
            assert leases.live() == []
            assert leases.take(3)


def test_one_of_many_takes_a_unit(storage: Storage) -> None:
    rounds, workers = 10, 6
    won: list[list[bool]] = [[] for _ in range(rounds)]
    gate = threading.Barrier(workers)

    def compete(leases: Leases) -> None:
        for unit in range(rounds):
            gate.wait()
            won[unit].append(leases.take(unit))

    with ExitStack() as stack:
        threads = [
            threading.Thread(target=compete, args=(stack.enter_context(Leases(storage)),)) for _ in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [sum(unit) for unit in won] == [1] * rounds


def test_a_held_lease_is_renewed_beyond_its_time_to_live(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with Leases(storage, ttl_seconds=0.8) as one, Leases(storage) as other:
        assert one.take(3)
        until = time.monotonic() + 1.6
        while time.monotonic() < until:
            assert not other.take(3)
            time.sleep(0.02)


def test_an_owner_that_lost_its_lease_logs_it_and_keeps_the_new_lease(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    with Leases(storage, ttl_seconds=0.2) as one:
        assert one.take(3)
        # As the next owner does while this one is paused.
        storage.delete(f"{LEASES}000003.0001.json")
        put(storage, foreign(generation=2))
        while "another worker took over unit=3" not in caplog.text:
            time.sleep(0.01)
        one.release(3)
    assert names(storage) == ["000003.0002.json"]


class FullDisk(LocalStorage):
    """A folder in which files temporarily cannot be replaced."""

    full = False

    def replace(self, key: str, data: bytes) -> None:
        if self.full:
            raise StoreError("no space left on device")
        super().replace(key, data)


def test_a_renewal_that_fails_is_logged_and_raised_unless_the_next_one_succeeds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FullDisk(tmp_path)
    with Leases(storage, ttl_seconds=0.2) as leases:
        assert leases.take(0)
        storage.full = True
        while "no space left" not in caplog.text:
            time.sleep(0.01)
        with pytest.raises(StoreError, match="no space left"):
            leases.take(1)
        storage.full = False
        renewed = leases.live()
        while leases.live() == renewed or not leases.live():
            time.sleep(0.01)
        assert leases.take(2)


def test_sweeping_deletes_exactly_the_expired_leases(storage: Storage) -> None:
    put(storage, foreign(unit=1, renewed_at=0.0))
    put(storage, foreign(unit=2))
    with Leases(storage) as leases:
        assert leases.take(3)
        leases.sweep()
        assert names(storage) == ["000002.0001.json", "000003.0001.json"]


def test_leases_record_host_and_process(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with Leases(storage, ttl_seconds=7.0) as leases:
        assert leases.take(3)
        (lease,) = leases.live()
    assert (lease.unit, lease.generation, lease.process, lease.ttl) == (3, 1, os.getpid(), 7.0)
    assert os.uname().nodename in lease.host and abs(lease.renewed_at - time.time()) < 60
