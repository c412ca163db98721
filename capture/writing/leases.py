"""Who is capturing which unit, so that workers do not do each other's work.

A lease is a small file, `units/leases/000042.0001.json` for unit 42, generation 1. A unit without one is free; one
whose newest lease has expired is free too, and whoever creates the next generation owns it. A lease expires when its
owner has not renewed it for its time to live, or at once when the owner was a process on this host that is gone.

Leases only save work. A store is safe without them, because names are written once and a second owner of a unit agrees
with the first (`clt.capture.writing.writer`): two workers that both believe they own a unit, because one of them was
paused or the clocks of their hosts disagree by more than the time to live, waste time and harm nothing.
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
#: Times a lease is renewed in its time to live.
_RENEWALS = 4

_NAME = re.compile(re.escape(LEASES) + r"(\d+)\.(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A claim on a unit.

    Attributes:
        unit: its number.
        generation: how often the unit has been claimed, from 1.
        owner: random name of the `Leases` that made the claim.
        host: machine, boot and process namespace of the owner.
        process: id of its process there.
        started: when that process started, in clock ticks since boot; None where the system does not say.
        renewed_at: unix time in seconds.
        ttl: seconds after which a claim that was not renewed is void.
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
        """Whether the unit is free again."""
        # A claim from the future is the work of a wrong clock and would never end.
        if abs(time.time() - self.renewed_at) > self.ttl:
            return True
        return self.started is not None and self.host == _host() and _started(self.process) != self.started


class Leases:
    """The claims of one worker, renewed by a thread of its own inside the `with` block and given up at its end.

    Args:
        storage: the store's files.
        ttl_seconds: time to live; longer than any pause of a healthy worker, and than clocks disagree.

    Attributes:
        owner: random name of this worker.
    """

    def __init__(self, storage: Storage, ttl_seconds: float = 600.0) -> None:
        self.owner = uuid.uuid4().hex
        self._storage, self._ttl = storage, ttl_seconds
        self._held: dict[int, Lease] = {}
        self._failure: Exception | None = None
        # Held while files are written, so that a renewal never brings back a lease that is being given up.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="leases", daemon=True)

    def take(self, unit: int) -> bool:
        """Claims a unit.

        Args:
            unit: its number; not one that is held already.

        Returns:
            False if another worker holds it.

        Raises:
            Exception: what the last renewal of a lease failed with, if none has succeeded since.
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
        """Gives up a unit; nothing happens if another worker has taken it over."""
        with self._lock:
            lease = self._held.pop(unit, None)
            if lease is not None and self._stands(lease):
                self._storage.delete(_path(unit, lease.generation))

    def claimed(self) -> set[int]:
        """Units that have a lease, expired or not; costs one listing."""
        return set(self._generations())

    def live(self) -> list[Lease]:
        """Leases of all workers that have not expired, by unit; each is read."""
        newest = [self._read(unit, generations[-1]) for unit, generations in sorted(self._generations().items())]
        return [lease for lease in newest if lease is not None and not lease.expired]

    def sweep(self) -> None:
        """Deletes the leases that have expired."""
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
                    # The next renewal may succeed; `take` raises it otherwise.
                    log.warning("%s: leases could not be renewed: %s", self._storage.url, error)
                    self._failure = error

    def _renew(self, lease: Lease) -> None:
        if self._stands(lease):
            renewed = self._held[lease.unit] = replace(lease, renewed_at=time.time())
            self._storage.replace(_path(lease.unit, lease.generation), to_json(renewed))
        else:
            del self._held[lease.unit]
            log.warning(
                "%s: another worker took unit %d over, because its lease was not renewed within %g s; both go on",
                self._storage.url,
                lease.unit,
                lease.ttl,
            )

    def _stands(self, lease: Lease) -> bool:
        found = self._read(lease.unit, lease.generation)
        return found is not None and found.owner == self.owner

    def _generations(self) -> dict[int, list[int]]:
        """Generations of each unit that have a file, oldest first."""
        found: dict[int, list[int]] = {}
        for entry in self._storage.list(LEASES):
            if match := _NAME.fullmatch(entry.key):
                found.setdefault(int(match[1]), []).append(int(match[2]))
        return {unit: sorted(generations) for unit, generations in found.items()}

    def _read(self, unit: int, generation: int) -> Lease | None:
        """A lease; None if it is gone or damaged."""
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
    """Machine, boot and process namespace: where a process id means the same process as here."""
    parts = [socket.gethostname()]
    if (boot := Path("/proc/sys/kernel/random/boot_id")).is_file():
        parts += [boot.read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(process: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; None if it is gone or the system does not say."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, which may hold anything.
    state, *rest = status.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])
