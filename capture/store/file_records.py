"""What a store remembers of each of its files, and how a file is compared with it."""

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
        crc32c: checksum of the file; of a shard, of its chunks and its index without the checksums that follow them,
            because data followed by its own checksum has the same checksum whatever it is.
    """

    path: str
    bytes: int
    crc32c: int


def record_of(path: str, contents: bytes) -> FileRecord:
    """Record of a small file from its contents."""
    return FileRecord(path=path, bytes=len(contents), crc32c=crc32c(contents))


def put_same(storage: Storage, key: str, contents: bytes) -> None:
    """Writes a file whose contents follow from the store's spec; if it is there, it must be the same.

    Raises:
        StoreError: it is another.
    """
    if not storage.put(key, contents) and storage.read(key) != contents:
        raise StoreError(f"{storage.name(key)}: is not what this store needs; delete the file, run again")


def record_file(storage: Storage, path: str) -> FileRecord:
    """Record of a file that is there, read in pieces.

    Raises:
        StoreError: it is missing or cannot be read.
    """
    size = storage.size(path)
    if size is None:
        raise StoreError(f"{storage.name(path)}: missing from the store; restore it or run 'clt store repair'")
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
        record: what the file was when it was committed.
        size: what it is now; None if it is missing.

    Raises:
        StoreError: the file is missing or has another size.
    """
    name = storage.name(record.path)
    if size is None:
        raise StoreError(f"{name}: missing from the store; restore it or run 'clt store repair'")
    if size != record.bytes:
        raise StoreError(f"{name}: has {size} bytes, expected {record.bytes}; restore it or run 'clt store repair'")


def check_contents(storage: Storage, record: FileRecord) -> None:
    """Compares size and checksum of a file with its record; raises StoreError as `check_size` does."""
    check_size(storage, record, storage.size(record.path))
    if record_file(storage, record.path) != record:
        raise StoreError(
            f"{storage.name(record.path)}: checksum does not match; the file is damaged, restore it or run "
            f"'clt store repair'"
        )


def read_checked(storage: Storage, record: FileRecord) -> bytes:
    """Contents of a small file, compared with its record; raises StoreError as `check_contents` does."""
    check_size(storage, record, storage.size(record.path))
    contents = storage.read(record.path)
    if crc32c(contents) != record.crc32c:
        raise StoreError(
            f"{storage.name(record.path)}: checksum does not match; the file is damaged, restore it or run "
            f"'clt store repair'"
        )
    return contents
