"""What a store asks of the place where its files live, whichever that is.

Everything above speaks in keys, forward-slash paths below the store's root. Three promises carry the store's protocol:
a final name appears at once with all of its bytes or not at all; `put` and `publish` never overwrite one (the first
writer wins and the second is told so); and when either returns, the name survives a power cut. Readers hold no
position, so threads share them.
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
    """A file of a store.

    Attributes:
        key: relative to the store, with forward slashes.
        bytes: size.
        modified: when it was last written, unix time in seconds.
    """

    key: str
    bytes: int
    modified: float


class Upload(ABC):
    """A new file on its way to a final name; leaving the `with` block without `publish` discards it."""

    @abstractmethod
    def write(self, buffers: Sequence[Buffer]) -> None:
        """Appends buffers in order.

        Args:
            buffers: C-contiguous, of any type.

        Raises:
            StoreError: the bytes cannot be stored; the upload is discarded.
        """

    @abstractmethod
    def publish(self) -> bool:
        """Gives the file its final name, durably.

        Returns:
            False if the name was taken: what stands there is unchanged and the own bytes are discarded.
        """

    @abstractmethod
    def abort(self) -> None:
        """Discards what was written; nothing happens after `publish` or a second time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()


class Storage(ABC):
    """The files of one store.

    Attributes:
        url: the path or URL it was opened with.
    """

    url: str

    @abstractmethod
    def name(self, key: str) -> str:
        """The full name of a key, for messages."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Size in bytes, or None if there is no such file."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """A whole file as it stands now.

        Raises:
            StoreError: it is missing or cannot be read.
        """

    @abstractmethod
    def read_into(self, key: str, offset: int, buffers: Sequence[Buffer]) -> None:
        """Scatters consecutive bytes of a file that never changes.

        Args:
            key: the file.
            offset: its byte that comes first.
            buffers: writable and C-contiguous, filled in order.

        Raises:
            StoreError: the file is missing or ends before the buffers are full.
        """

    @abstractmethod
    def put(self, key: str, data: bytes) -> bool:
        """Writes a new file, whole and durable.

        Returns:
            False if the name was taken; nothing changed then.
        """

    @abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Writes a file, whole and durable, over the one of that name if there is one."""

    @abstractmethod
    def create(self, key: str) -> Upload:
        """Starts a new file."""

    @abstractmethod
    def list(self, prefix: str) -> list[StoredFile]:
        """All files below a folder, partial ones too, in the order of their keys.

        Args:
            prefix: a folder such as `units/commits/`, or the empty string.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes a file; a missing one is fine."""

    @abstractmethod
    def move(self, key: str, to: str) -> None:
        """Renames a file.

        Raises:
            StoreError: it is missing.
        """


def check_key(key: str) -> str:
    """The key itself, which must be relative, with forward slashes and without `.` or `..`."""
    assert all(part not in ("", ".", "..") for part in key.split("/")), f"not a key: {key!r}"
    return key


def missing(name: str) -> StoreError:
    """The error for a file that is not there."""
    return StoreError(f"{name}: missing from the store; restore it or capture again")


def too_short(name: str, size: int, needed: int) -> StoreError:
    """The error for a file that ends before the bytes that were asked for."""
    return StoreError(f"{name}: has {size} bytes, at least {needed} expected; restore it or capture again")


def partial_key(key: str) -> str:
    """A name beside a key for bytes on their way to it, which nobody else uses."""
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}.{name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"


def byte_views(buffers: Sequence[Buffer]) -> tuple[list[memoryview], int]:
    """Views of the buffers that are not empty, and their bytes together."""
    views = [view for view in (memoryview(buffer) for buffer in buffers) if view.nbytes]
    return views, sum(view.nbytes for view in views)


def after(views: list[memoryview], done: int) -> list[memoryview]:
    """What remains of views once their first bytes are dealt with."""
    for i, view in enumerate(views):
        if done < view.nbytes:
            return [view.cast("B")[done:], *views[i + 1 :]]
        done -= view.nbytes
    return []
