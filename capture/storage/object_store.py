"""The files of a store in an object store (S3, Google Cloud, Azure, memory), through obstore.

What is known of obstore 0.12 and decides the code. `put(mode="create")` is one request that fails if the name is taken
(`If-None-Match: *` on S3 and Azure), but it holds all bytes at once; the streaming writer is a multipart upload, whose
completion takes no condition. `copy(overwrite=False)` runs inside the store and does fail if the name is taken: on S3
it is a multipart upload of one copied part with `If-None-Match: *` on its completion (AWS answers the loser with 412,
and so does moto; R2 wants `AWS_COPY_IF_NOT_EXISTS=header:...`), on Google Cloud a generation match, in memory and on
disk one step. So a small file is one conditional put, and a large one streams to a partial object, in bounded memory,
and gets its name by a conditional copy; an upload that dies leaves at most that partial object, or parts which the
bucket's lifecycle rule removes. One copied part is 5 GiB at most. Azure may finish a copy after it has answered, so
there all bytes are held for one put. `get_ranges` joins neighbouring ranges into one request, so a long range is split
here. The runtime's threads do not survive fork: a call in the child never returns. Google Cloud and Azure were not run.

Addresses and credentials come from the environment as obstore reads them: AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ALLOW_HTTP (an endpoint without TLS); GOOGLE_APPLICATION_CREDENTIALS;
AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY.
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

#: Bytes of one request, and how many requests of one storage are under way at a time.
PART_BYTES = 8 << 20
READS_AT_ONCE = 8
WRITES_AT_ONCE = 4
#: A file up to this size is one conditional put; 5 GiB and 5000 MiB are limits of the services.
HELD_BYTES = {"az": 5000 << 20}
HELD_BYTES_ELSEWHERE = 16 << 20
LARGEST_FILE = {"s3": 5 << 30, "az": 5000 << 20}
#: How long a lost connection is retried, and how long one copy inside the store or one whole-file put may take.
RETRY_SECONDS = 60
PATIENCE_SECONDS = 900

_REMEDIES = {
    "s3": "check AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's rights",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS and the bucket's rights",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY and the container's rights",
}
# Client options replace those of the environment as a whole, so these are carried over.
_CLIENT_OPTIONS = ("allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "root_certificate")

_memories: dict[str, MemoryStore] = {}
_memories_lock = threading.Lock()
_processes: set[int] = set()


def forget_memory(name: str) -> None:
    """Lets go of the storage `memory://<name>`; whoever has it open keeps it."""
    with _memories_lock:
        _memories.pop(name, None)


class ObjectStorage(Storage):
    """A store in a bucket, a container or memory.

    Args:
        url: scheme, bucket and prefix, as `open_storage` takes it.

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
        """The same store for requests that last minutes."""
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
                # A range that begins past the end is refused, in words that differ from store to store.
                self._check_length(key, end)
                raise
        if views or not wanted:
            self._check_length(key, end)

    def put(self, key: str, data: bytes) -> bool:
        with self.create(key) as upload:
            upload.write([data])
            return upload.publish()

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
        """Turns the errors of requests about one file into their one-line form.

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
        """The bytes of a range in order, fetched several parts at a time."""

        def fetch(at: int) -> Buffer:
            return obstore.get_range(self.store, key, start=at, end=min(at + PART_BYTES, end))

        starts = range(start, end, PART_BYTES)
        return map(fetch, starts) if len(starts) < 2 else self._readers.map(fetch, starts)


class ObjectUpload(Upload):
    """Bytes held for one conditional put, or beyond that a partial object which a conditional copy names."""

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
        assert self._open, "published or aborted already"
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
        assert self._open, "published or aborted already"
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
            # What cannot be removed now is a partial file like that of a killed process.
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
        raise StoreError(f"{url}: lives in the process that made it; use a folder to share a store among processes")
    return ObjectStorage(url)


def _fill(views: list[memoryview], data: memoryview) -> list[memoryview]:
    """Copies data to the front of views, and returns what is left of them."""
    done = 0
    for view in views:
        piece = data[done : done + view.nbytes]
        view.cast("B")[: piece.nbytes] = piece
        done += piece.nbytes
    return after(views, done)
