"""Files that appear whole or not at all, survive a power cut, and are recognised by size and crc32c."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c

from clt.errors import StoreError


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A finished file.

    Attributes:
        path: relative to the store, with forward slashes.
        bytes: size.
        crc32c: checksum of the whole file.
    """

    path: str
    bytes: int
    crc32c: int


def seal(root: Path, paths: Sequence[str]) -> tuple[FileRecord, ...]:
    """Forces finished files and their names to disk and takes their sizes and checksums.

    Args:
        root: the store.
        paths: relative to it.

    Returns:
        What a commit record says about the files.
    """
    records = []
    for path in paths:
        with open(root / path, "rb") as file:
            os.fsync(file.fileno())
            checksum, size = _checksum(file)
        records.append(FileRecord(path=path, bytes=size, crc32c=checksum))
    sync_folders({root / folder for path in paths for folder in _folders_with_new_names(path)})
    return tuple(records)


def _folders_with_new_names(path: str) -> list[PurePosixPath]:
    """The folders of a new shard up to `c`, which `create_arrays` made; of any other file, its own folder."""
    folders = list(PurePosixPath(path).parents)
    names = [folder.name for folder in folders]
    return folders[: names.index("c") + 1] if "c" in names else folders[:1]


def _checksum(file: Any) -> tuple[int, int]:
    checksum, size = 0, 0
    while piece := file.read(1 << 20):
        checksum, size = google_crc32c.extend(checksum, piece), size + len(piece)
    return checksum, size


def sync_folders(folders: Iterable[Path]) -> None:
    """Forces the names in folders to disk."""
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_file(root: Path, record: FileRecord, *, contents: bool = False) -> None:
    """Compares a file with its record.

    Args:
        root: the store.
        record: what the file was when it was committed.
        contents: also compare the checksum, which reads the whole file.

    Raises:
        StoreError: the file is missing, has another size, or other contents.
    """
    path = root / record.path
    try:
        size = path.stat().st_size
    except OSError:
        raise StoreError(f"{path}: missing from the store; restore it or capture again") from None
    if size != record.bytes:
        raise StoreError(f"{path}: has {size} bytes, expected {record.bytes}; restore it or capture again")
    if contents:
        with open(path, "rb") as file:
            if _checksum(file)[0] != record.crc32c:
                raise StoreError(f"{path}: checksum does not match; the file is damaged, restore it or capture again")


def write_atomic(path: Path, contents: bytes) -> None:
    """Writes a file that appears whole or not at all, and stays after a power cut.

    Args:
        path: the file; its folder is made if need be.
        contents: its bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folders([path.parent])
