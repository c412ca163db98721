"""Files of a store in an object store (S3, Google Cloud, Azure, process memory), through obstore.

A small file is one conditional put. A large one streams to a partial object in bounded memory and gets its name by a
conditional copy inside the service; an interrupted upload leaves at most the partial object, or parts that the bucket's
lifecycle rule removes. `docs/store.md` lists the requests, the limits and the environment variables.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import MemoryStore, from_url

from clt.capture.storage.base import (
    Storage,
    StoredFile,
    Upload,
    after,
    byte_views,
    check_key,
    missing,
    partial_key,
    too_short,
)
from clt.errors import StoreError

if TYPE_CHECKING:
    from obstore import WritableFile
    from obstore.store import ObjectStore
    from typing_extensions import Buffer

#: Bytes of one request, and concurrent requests of one storage. `get_ranges` would join neighbours into one request.
PART_BYTES = 8 << 20
READS_AT_ONCE = 8
WRITES_AT_ONCE = 4
#: A file up to this size is one conditional put; 5 GiB and 5000 MiB are limits of the services. Azure may finish a copy
#: after it has replied, so there every file is one put.
HELD_BYTES = {"az": 5000 << 20}
HELD_BYTES_ELSEWHERE = 16 << 20
LARGEST_FILE = {"s3": 5 << 30, "az": 5000 << 20}
#: Retry time after a lost connection, and timeout of one copy inside the service or of one whole-file put.
RETRY_SECONDS = 60
PATIENCE_SECONDS = 900

_REMEDIES = {
    "s3": "check AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's rights",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS and the bucket's rights",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY and the container's rights",
}
# Client options replace all those from the environment, so these are carried over.
_CLIENT_OPTIONS = ("allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "root_certificate")

_memories: dict[str, MemoryStore] = {}
_memories_lock = threading.Lock()
_processes: set[int] = set()


def forget_memory(name: str) -> None:
    """Removes `memory://<name>` from this process; open references to it stay valid."""
    with _memories_lock:
        _memories.pop(name, None)


class ObjectStorage(Storage):
    """A store in a bucket, a container or process memory.

    Args:
        url: scheme, bucket and prefix, as for `open_storage`.

    Raises:
        StoreError: the URL or the environment is incomplete, or this is a forked child.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.scheme = url.partition("://")[0]
        with self.explained(""):
            self.store = _connect(self.url, patient=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.url, os.getpid())

    @cached_property
    def patient_store(self) -> ObjectStore:
        """The same store with a timeout for requests that take minutes."""
        return _connect(self.url, patient=True)

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="object-storage")

    def name(self, key: str) -> str:
        return f"{self.url}/{check_key(key)}"

    def size(self, key: str) -> int | None:
        name = self.name(key)
        with self.explained(name):
            try:
                return obstore.head(self.store, key)["size"]
            except FileNotFoundError:
                return None

    def read(self, key: str) -> bytes:
        with self.explained(self.name(key)):
            return obstore.get(self.store, key).bytes().to_bytes()

    def read_into(self, key: str, offset: int, buffers: Sequence[Buffer]) -> None:
        views, wanted = byte_views(buffers)
        name, end = self.name(key), offset + wanted
        with self.explained(name):
            try:
                for part in self._parts(key, offset, end):
                    views = _fill(views, memoryview(part))
            except BaseError:
                # A range that begins past the end is an error whose message depends on the service.
                self._check_length(key, end)
                raise
        if views or not wanted:
            self._check_length(key, end)

    def replace(self, key: str, data: bytes) -> None:
        with self.explained(self.name(key)):
            obstore.put(self.store, key, data, mode="overwrite", use_multipart=False)

    def create(self, key: str) -> ObjectUpload:
        return ObjectUpload(self, key)

    def list(self, prefix: str) -> list[StoredFile]:
        folder = prefix.rstrip("/")
        with self.explained(self.name(folder) if folder else self.url):
            found = obstore.list(self.store, folder or None).collect()
        entries = [
            StoredFile(key=item["path"], bytes=item["size"], modified=item["last_modified"].timestamp())
            for item in found
        ]
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        with self.explained(self.name(key)), suppress(FileNotFoundError):
            obstore.delete(self.store, key)

    def move(self, key: str, to: str) -> None:
        check_key(to)
        with self.explained(self.name(key)):
            obstore.rename(self.patient_store, key, to)

    @contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Turns errors of requests for one file into one-line StoreErrors.

        Args:
            name: full name of the file.
        """
        _processes.add(os.getpid())
        if len(_processes) > 1:
            raise StoreError(f"{self.url}: object stores do not work in a forked process; start it with spawn")
        try:
            yield
        except AlreadyExistsError:
            raise
        except (FileNotFoundError, BaseError) as error:
            text = str(error).partition("\n\nDebug source")[0]
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in text:
                raise missing(name) from None
            remedy = _REMEDIES.get(self.scheme, "check the URL")
            raise StoreError(f"{name or self.url}: {' '.join(text.split())[:400]}; {remedy}") from None

    def _check_length(self, key: str, needed: int) -> None:
        size = self.size(key)
        if size is None:
            raise missing(self.name(key))
        if size < needed:
            raise too_short(self.name(key), size, needed)

    def _parts(self, key: str, start: int, end: int) -> Iterable[Buffer]:
        """The bytes of a range in order, fetched as concurrent parts."""

        def fetch(at: int) -> Buffer:
            return obstore.get_range(self.store, key, start=at, end=min(at + PART_BYTES, end))

        starts = range(start, end, PART_BYTES)
        return map(fetch, starts) if len(starts) < 2 else self._readers.map(fetch, starts)


class ObjectUpload(Upload):
    """Bytes held for one conditional put; larger files become a partial object that a conditional copy renames."""

    def __init__(self, storage: ObjectStorage, key: str) -> None:
        self._storage = storage
        self._key = key
        self._name = storage.name(key)
        self._partial = partial_key(key)
        self._held = bytearray()
        self._held_most = HELD_BYTES.get(storage.scheme, HELD_BYTES_ELSEWHERE)
        self._writer: WritableFile | None = None
        self._size = 0
        self._open = True

    def write(self, buffers: Sequence[Buffer]) -> None:
        assert self._open, "already published or aborted"
        views, count = byte_views(buffers)
        self._size += count
        largest = LARGEST_FILE.get(self._storage.scheme)
        try:
            if largest is not None and self._size > largest:
                raise StoreError(f"{self._name}: more than {largest} bytes in one file; choose a smaller rows_per_unit")
            with self._storage.explained(self._name):
                for view in views:
                    self._append(view.cast("B"))
        except StoreError:
            self.abort()
            raise

    def publish(self) -> bool:
        assert self._open, "already published or aborted"
        store = self._storage.patient_store
        try:
            with self._storage.explained(self._name):
                if self._writer is None:
                    obstore.put(store, self._key, self._held, mode="create")
                else:
                    self._writer.close()
                    obstore.copy(store, self._partial, self._key, overwrite=False)
            return True
        except AlreadyExistsError:
            return False
        finally:
            self.abort()

    def abort(self) -> None:
        if not self._open:
            return
        self._open = False
        self._held = bytearray()
        if self._writer is not None:
            # A partial object that cannot be removed now is garbage like that of a killed process.
            with suppress(BaseError, OSError):
                if not self._writer.closed():
                    self._writer.close()
                obstore.delete(self._storage.store, self._partial)

    def _append(self, view: memoryview) -> None:
        if self._writer is None:
            if len(self._held) + view.nbytes <= self._held_most:
                self._held += view
                return
            self._writer = obstore.open_writer(
                self._storage.store, self._partial, buffer_size=PART_BYTES, max_concurrency=WRITES_AT_ONCE
            )
            self._writer.write(self._held)
            self._held = bytearray()
        self._writer.write(view)


def _connect(url: str, *, patient: bool) -> ObjectStore:
    scheme, _, name = url.partition("://")
    if scheme == "memory":
        with _memories_lock:
            return _memories.setdefault(name, MemoryStore())
    options: dict[str, Any] = {"retry_config": {"retry_timeout": timedelta(seconds=RETRY_SECONDS)}}
    if scheme == "file":
        options = {"mkdir": True}
    elif scheme == "s3":
        options["copy_if_not_exists"] = os.environ.get("AWS_COPY_IF_NOT_EXISTS", "multipart")
    if patient and scheme != "file":
        given = {option: os.environ.get(f"AWS_{option.upper()}") for option in _CLIENT_OPTIONS}
        own = {option: value for option, value in given.items() if value is not None and scheme == "s3"}
        options["client_options"] = {"timeout": f"{PATIENCE_SECONDS}s", **own}
    return from_url(url, **options)


def _reopen(url: str, process: int) -> ObjectStorage:
    if url.startswith("memory://") and os.getpid() != process:
        raise StoreError(
            f"{url}: exists only in the process that created it; use a folder to share a store among processes"
        )
    return ObjectStorage(url)


def _fill(views: list[memoryview], data: memoryview) -> list[memoryview]:
    """Copies data to the front of views and returns the rest of them."""
    done = 0
    for view in views:
        piece = data[done : done + view.nbytes]
        view.cast("B")[: piece.nbytes] = piece
        done += piece.nbytes
    return after(views, done)
