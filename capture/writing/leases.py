"""Leases on units, so that workers do not capture the same unit twice.

A lease is a file such as `units/leases/000042.0001.json` (unit 42, generation 1). A unit is free if it has no lease or
its newest lease has expired; the worker that creates the next generation owns it. A lease expires when it has not been
renewed for its time to live, or immediately when its owner was a process of this host that has ended.

Leases avoid duplicate work; correctness does not depend on them (`clt.capture.writing.writer`): two workers with the
same unit, because one was paused or their clocks differ by more than the time to live, only lose time.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from clt.capture.storage.base import Storage
from clt.capture.store.json_files import parse, to_json
from clt.errors import StoreError

log = logging.getLogger(__name__)

LEASES = "units/leases/"
#: Renewals per time to live.
_RENEWALS = 4

_NAME = re.compile(re.escape(LEASES) + r"(\d+)\.(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A worker's claim on a unit.

    Attributes:
        unit: number of the unit.
        generation: number of claims on the unit so far, from 1.
        owner: random name of the worker's `Leases`.
        host: machine, boot and process namespace of the owner.
        process: process id of the owner on that host.
        started: start time of that process, in clock ticks since boot; None where the system does not report it.
        renewed_at: unix time in seconds.
        ttl: seconds without renewal after which the claim is void.
    """

    unit: int
    generation: int
    owner: str
    host: str
    process: int
    started: int | None
    renewed_at: float
    ttl: float

    @property
    def expired(self) -> bool:
        """True if the unit is free again."""
        # A renewal time in the future comes from a wrong clock; such a lease would never expire.
        if abs(time.time() - self.renewed_at) > self.ttl:
            return True
        return self.started is not None and self.host == _host() and _started(self.process) != self.started


class Leases:
    """The leases of one worker, renewed by a background thread inside the `with` block and released at its end.

    Args:
        storage: the store's files.
        ttl_seconds: time to live; longer than any pause of a working process and than the difference of clocks.

    Attributes:
        owner: random name of this worker.
    """

    def __init__(self, storage: Storage, ttl_seconds: float = 600.0) -> None:
        self.owner = uuid.uuid4().hex
        self._storage, self._ttl = storage, ttl_seconds
        self._held: dict[int, Lease] = {}
        self._failure: Exception | None = None
        # Held while files are written, so that a renewal never restores a lease that is being released.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="leases", daemon=True)

    def take(self, unit: int) -> bool:
        """Claims a unit.

        Args:
            unit: number of a unit that this worker does not hold.

        Returns:
            False if another worker holds it.

        Raises:
            Exception: the error of the last failed renewal, if none has succeeded since.
        """
        assert self._thread.is_alive() and unit not in self._held
        with self._lock:
            if self._failure is not None:
                raise self._failure
        generations = self._generations().get(unit, [])
        newest = generations[-1] if generations else 0
        standing = self._read(unit, newest) if generations else None
        if standing is not None and not standing.expired:
            return False
        process = os.getpid()
        lease = Lease(
            unit=unit,
            generation=newest + 1,
            owner=self.owner,
            host=_host(),
            process=process,
            started=_started(process),
            renewed_at=time.time(),
            ttl=self._ttl,
        )
        if not self._storage.put(_path(unit, lease.generation), to_json(lease)):
            return False
        with self._lock:
            self._held[unit] = lease
        for generation in generations:
            self._storage.delete(_path(unit, generation))
        return True

    def release(self, unit: int) -> None:
        """Releases a unit; a no-op if another worker has taken it over."""
        with self._lock:
            lease = self._held.pop(unit, None)
            if lease is not None and self._is_current(lease):
                self._storage.delete(_path(unit, lease.generation))

    def claimed(self) -> set[int]:
        """Units with a lease, expired or not; costs one listing."""
        return set(self._generations())

    def live(self) -> list[Lease]:
        """Unexpired leases of all workers, by unit; reads each of them."""
        newest = [self._read(unit, generations[-1]) for unit, generations in sorted(self._generations().items())]
        return [lease for lease in newest if lease is not None and not lease.expired]

    def sweep(self) -> None:
        """Deletes expired leases."""
        for unit, generations in self._generations().items():
            for generation in generations:
                lease = self._read(unit, generation)
                if lease is None or lease.expired:
                    self._storage.delete(_path(unit, generation))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        for unit in list(self._held):
            self.release(unit)

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._ttl / _RENEWALS):
            with self._lock:
                try:
                    for lease in list(self._held.values()):
                        self._renew(lease)
                    self._failure = None
                except Exception as error:
                    # The next renewal may succeed; otherwise `take` raises the error.
                    log.warning("leases not renewed: store=%s error=%s", self._storage.url, error)
                    self._failure = error

    def _renew(self, lease: Lease) -> None:
        if self._is_current(lease):
            renewed = self._held[lease.unit] = replace(lease, renewed_at=time.time())
            self._storage.replace(_path(lease.unit, lease.generation), to_json(renewed))
        else:
            del self._held[lease.unit]
            log.warning(
                "another worker took over unit=%d, not renewed within ttl_seconds=%g; both continue: store=%s",
                lease.unit,
                lease.ttl,
                self._storage.url,
            )

    def _is_current(self, lease: Lease) -> bool:
        found = self._read(lease.unit, lease.generation)
        return found is not None and found.owner == self.owner

    def _generations(self) -> dict[int, list[int]]:
        """Generations of each unit's lease files, oldest first."""
        found: dict[int, list[int]] = {}
        for entry in self._storage.list(LEASES):
            if match := _NAME.fullmatch(entry.key):
                found.setdefault(int(match[1]), []).append(int(match[2]))
        return {unit: sorted(generations) for unit, generations in found.items()}

    def _read(self, unit: int, generation: int) -> Lease | None:
        """Reads a lease; None if it is gone or damaged."""
        key = _path(unit, generation)
        try:
            contents = self._storage.read(key)
        except StoreError:
            if self._storage.size(key) is not None:
                raise
            return None
        try:
            return parse(Lease, contents, self._storage.name(key))
        except StoreError:
            return None


def _path(unit: int, generation: int) -> str:
    return f"{LEASES}{unit:06d}.{generation:04d}.json"


def _host() -> str:
    """Machine, boot and process namespace, within which a process id is unique."""
    parts = [socket.gethostname()]
    if (boot := Path("/proc/sys/kernel/random/boot_id")).is_file():
        parts += [boot.read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(process: int) -> int | None:
    """Start time of a process of this host, in clock ticks since boot; None if it has ended or is not reported."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, which may contain any character.
    state, *rest = status.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])
