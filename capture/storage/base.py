"""Interface of the storage that holds a store's files: a folder or an object store.

Files are named by keys: forward-slash paths relative to the store's root. The store's protocol relies on three
guarantees: a final name appears atomically with all of its bytes; `put` and `publish` never overwrite a file (the first
writer wins, the second gets False); and once either returns, the file survives a power failure. Reads carry no file
position, so threads share a storage.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from clt.errors import StoreError

if TYPE_CHECKING:
    from typing_extensions import Buffer

PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file in a storage, as listed.

    Attributes:
        key: path relative to the store, with forward slashes.
        bytes: size.
        modified: time of the last write, unix time in seconds.
    """

    key: str
    bytes: int
    modified: float


class Upload(ABC):
    """A new file before it has its final name; leaving the `with` block without `publish` discards it."""

    @abstractmethod
    def write(self, buffers: Sequence[Buffer]) -> None:
        """Appends buffers in order.

        Args:
            buffers: C-contiguous, of any type.

        Raises:
            StoreError: the bytes cannot be written; the upload is discarded.
        """

    @abstractmethod
    def publish(self) -> bool:
        """Gives the file its final name, durably.

        Returns:
            False if the name was taken: the existing file is unchanged and this upload is discarded.
        """

    @abstractmethod
    def abort(self) -> None:
        """Discards what was written; a no-op after `publish` or a second `abort`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()


class Storage(ABC):
    """The files of one store.

    Attributes:
        url: path or URL it was opened with.
    """

    url: str

    @abstractmethod
    def name(self, key: str) -> str:
        """Full path or URL of a key, for messages."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Size in bytes, or None if there is no such file."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Contents of a file.

        Raises:
            StoreError: it is missing or cannot be read.
        """

    @abstractmethod
    def read_into(self, key: str, offset: int, buffers: Sequence[Buffer]) -> None:
        """Reads consecutive bytes of an immutable file into several buffers (scatter read).

        Args:
            key: the file.
            offset: first byte to read.
            buffers: writable and C-contiguous, filled in order.

        Raises:
            StoreError: the file is missing or ends before the buffers are full.
        """

    def put(self, key: str, data: bytes) -> bool:
        """Writes a new file atomically and durably.

        Returns:
            False if the name was taken; nothing is changed then.
        """
        with self.create(key) as upload:
            upload.write([data])
            return upload.publish()

    @abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Writes a file atomically and durably, replacing an existing one."""

    @abstractmethod
    def create(self, key: str) -> Upload:
        """Starts a new file."""

    @abstractmethod
    def list(self, prefix: str) -> list[StoredFile]:
        """All files below a folder, partial ones included, sorted by key.

        Args:
            prefix: a folder such as `units/commits/`, or the empty string.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes a file if it exists."""

    @abstractmethod
    def move(self, key: str, to: str) -> None:
        """Renames a file.

        Raises:
            StoreError: it is missing.
        """


def check_key(key: str) -> str:
    """Returns the key after asserting that it is relative, with forward slashes and without `.` or `..`."""
    assert all(part not in ("", ".", "..") for part in key.split("/")), f"not a key: {key!r}"
    return key


def missing(name: str) -> StoreError:
    """Error for a missing file."""
    return StoreError(f"{name}: missing from the store; restore it or capture again")


def too_short(name: str, size: int, needed: int) -> StoreError:
    """Error for a file that ends before the requested bytes.

    Args:
        name: full path or URL.
        size: bytes of the file.
        needed: bytes requested, from its start.
    """
    return StoreError(f"{name}: has {size} bytes, at least {needed} expected; restore it or capture again")


def partial_key(key: str) -> str:
    """A unique name beside a key for a file that is still being written."""
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}.{name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"


def byte_views(buffers: Sequence[Buffer]) -> tuple[list[memoryview], int]:
    """Views of the non-empty buffers, and their total bytes."""
    views = [view for view in (memoryview(buffer) for buffer in buffers) if view.nbytes]
    return views, sum(view.nbytes for view in views)


def after(views: list[memoryview], done: int) -> list[memoryview]:
    """The rest of some views after their first `done` bytes."""
    for i, view in enumerate(views):
        if done < view.nbytes:
            return [view.cast("B")[done:], *views[i + 1 :]]
        done -= view.nbytes
    return []
