"""Size and checksum of each file of a store, and the comparison of a file with them."""

from __future__ import annotations

from dataclasses import dataclass

from clt.capture.storage.base import Storage
from clt.checksum import crc32c
from clt.errors import StoreError

_PIECE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A finished file.

    Attributes:
        path: key relative to the store, with forward slashes.
        bytes: size.
        crc32c: checksum of the file. For a shard: of its chunks and index without the crc32c that follows each, because
            the crc32c of any data followed by its own crc32c is a constant.
    """

    path: str
    bytes: int
    crc32c: int


def record_of(path: str, contents: bytes) -> FileRecord:
    """Record of a file from its contents."""
    return FileRecord(path=path, bytes=len(contents), crc32c=crc32c(contents))


def put_same(storage: Storage, key: str, contents: bytes) -> None:
    """Writes a file whose contents follow from the store's spec; an existing file must have the same contents.

    Args:
        storage: the store's files.
        key: the file.
        contents: its bytes.

    Raises:
        StoreError: the existing file differs.
    """
    if not storage.put(key, contents) and storage.read(key) != contents:
        raise StoreError(f"{storage.name(key)}: differs from what this store needs; delete the file, run again")


def record_file(storage: Storage, path: str) -> FileRecord:
    """Record of an existing file, read in pieces.

    Raises:
        StoreError: it is missing or cannot be read.
    """
    size = storage.size(path)
    if size is None:
        raise _missing(storage, path)
    checksum, buffer = 0, memoryview(bytearray(min(size, _PIECE)))
    for start in range(0, size, _PIECE):
        piece = buffer[: min(_PIECE, size - start)]
        storage.read_into(path, start, [piece])
        checksum = crc32c(piece, checksum)
    return FileRecord(path=path, bytes=size, crc32c=checksum)


def check_size(storage: Storage, record: FileRecord, size: int | None) -> None:
    """Compares the size of a file with its record.

    Args:
        storage: the store's files.
        record: size and checksum at commit.
        size: size now; None if the file is missing.

    Raises:
        StoreError: the file is missing or has another size.
    """
    if size is None:
        raise _missing(storage, record.path)
    if size != record.bytes:
        name = storage.name(record.path)
        raise StoreError(f"{name}: has {size} bytes, expected {record.bytes}; restore it or run 'clt store repair'")


def check_contents(storage: Storage, record: FileRecord) -> None:
    """Compares size and checksum of a file with its record; raises StoreError as `check_size` does."""
    check_size(storage, record, storage.size(record.path))
    if record_file(storage, record.path) != record:
        raise _damaged(storage, record.path)


def read_checked(storage: Storage, record: FileRecord) -> bytes:
    """Contents of a small file, compared with its record; raises StoreError as `check_contents` does."""
    check_size(storage, record, storage.size(record.path))
    contents = storage.read(record.path)
    if crc32c(contents) != record.crc32c:
        raise _damaged(storage, record.path)
    return contents


def _missing(storage: Storage, path: str) -> StoreError:
    return StoreError(f"{storage.name(path)}: missing from the store; restore it or run 'clt store repair'")


def _damaged(storage: Storage, path: str) -> StoreError:
    name = storage.name(path)
    return StoreError(f"{name}: checksum does not match, the file is damaged; restore it or run 'clt store repair'")
