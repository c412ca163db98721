"""Atomic writing of folders: checksummed files, a manifest written last, one rename, then a pointer to the folder.

A folder is filled under a temporary name (`.step_00000500.tmp`), renamed after its manifest is written, and then named
by the file `latest` beside it. A killed process leaves a complete folder or a temporary one, which the next writer
removes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from clt.checksum import crc32c
from clt.errors import CheckpointError
from clt.tensor_files import write_tensors

LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"

#: Size in bytes and CRC-32C of files, by name.
Checksums = dict[str, dict[str, Any]]

_FORMAT = "vlm-clt-checkpoint/1"
_CHUNK_BYTES = 1 << 22


def temporary_name(name: str) -> str:
    """Name of a folder while it is written or removed."""
    return f".{name}.tmp"


@contextmanager
def new_folder(target: Path, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Context manager that creates a folder atomically: it is renamed to `target` on success and removed on failure.

    Args:
        target: new, an empty folder, or one that may be replaced.
        replaces: wildcards; an existing folder that holds only matching names is replaced.

    Yields:
        The folder under a temporary name beside it.

    Raises:
        CheckpointError: the target exists with other contents, or cannot be written.
    """
    target = target.resolve()
    for path in [target] if target.is_file() else target.glob("*"):
        if path == target or not any(fnmatchcase(path.name, pattern) for pattern in replaces):
            held = "" if path == target or not replaces else f" and holds '{path.name}'"
            raise CheckpointError(f"{target}: exists already{held}; use a new folder")
    temporary, old = (target.with_name(temporary_name(name)) for name in (target.name, f"{target.name}.old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        if target.exists() and any(target.iterdir()):
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(temporary, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise CheckpointError(f"{target}: cannot be written ({' '.join(str(error).split())})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], checksums: Checksums) -> None:
    """Writes a safetensors file and records its checksum.

    Args:
        path: the file.
        tensors: by name.
        checksums: gets an entry for the file.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        write_tensors(path, tensors)
        _sync(path)
        checksums[path.name] = _checksum(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({' '.join(str(error).split())})") from None


def write_text(path: Path, text: str, checksums: Checksums) -> None:
    """Writes a text file and records its checksum.

    Args:
        path: the file.
        text: its contents.
        checksums: gets an entry for the file.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
        _sync(path)
        checksums[path.name] = _checksum(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None


def write_manifest(folder: Path, checksums: Checksums) -> None:
    """Writes the manifest, which marks the folder as complete."""
    tree = {"format": _FORMAT, "files": dict(sorted(checksums.items()))}
    write_text(folder / MANIFEST_FILE, json.dumps(tree, indent=1) + "\n", {})
    _sync(folder)


def publish(temporary: Path, folder: Path) -> None:
    """Renames a complete folder to its final name, then points `latest` at it."""
    if folder.exists():
        # Left by a run that was killed between the rename and the pointer.
        os.replace(folder, folder.with_name(temporary_name(f"{folder.name}.old")))
    os.replace(temporary, folder)
    draft = folder.with_name(temporary_name(LATEST_FILE))
    write_text(draft, folder.name + "\n", {})
    os.replace(draft, folder.with_name(LATEST_FILE))
    _sync(folder.parent)


def prune(output: Path, pattern: str, keep: int) -> None:
    """Removes old folders, each after a rename, so that a partly removed one never has the name of a checkpoint.

    Args:
        output: folder of the checkpoints.
        pattern: wildcard of their names.
        keep: number of newest folders, up to the one named by `latest`, that are kept.
    """
    newest = (output / LATEST_FILE).read_text(encoding="utf-8").strip()
    folders = sorted(folder for folder in output.glob(pattern) if folder.is_dir() and folder.name <= newest)
    for folder in folders[:-keep]:
        os.replace(folder, folder.with_name(temporary_name(f"{folder.name}.old")))
    remove_temporary(output, pattern)


def remove_temporary(output: Path, pattern: str) -> None:
    """Removes temporary folders left by a killed writer."""
    for folder in output.glob(temporary_name(pattern)):
        shutil.rmtree(folder)


def latest_folder(output: Path) -> Path | None:
    """The folder named by `latest`, or None if there is no checkpoint yet.

    Raises:
        CheckpointError: the pointer names a folder that does not exist.
    """
    pointer = output / LATEST_FILE
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    folder = output / name
    if not name or not folder.is_dir():
        raise CheckpointError(
            f"{pointer}: names '{name}', which does not exist; write the name of an existing checkpoint into it"
        )
    return folder


def read_manifest(folder: Path) -> Checksums:
    """Sizes and checksums of a folder's files.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing; the checkpoint is incomplete; use another one") from None
    except ValueError:
        raise CheckpointError(f"{path}: not valid JSON; use another checkpoint") from None
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT or not isinstance(tree.get("files"), dict):
        raise CheckpointError(f"{path}: not a manifest of format {_FORMAT!r}; use another checkpoint")
    files: Checksums = tree["files"]
    return files


def verify_file(folder: Path, name: str, manifest: Checksums) -> None:
    """Compares a file with its size and checksum in the manifest.

    Args:
        folder: the checkpoint.
        name: the file.
        manifest: from `read_manifest`.

    Raises:
        CheckpointError: the file is missing or damaged, or not in the manifest.
    """
    path = folder / name
    if name not in manifest:
        raise CheckpointError(f"{folder / MANIFEST_FILE}: does not list '{name}'; use another checkpoint")
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing; use another checkpoint")
    if _checksum(path) != manifest[name]:
        raise CheckpointError(f"{path}: damaged (size or checksum differs from the manifest); use another checkpoint")


def verify_folder(folder: Path) -> None:
    """Checks every file of a folder against its manifest.

    Raises:
        CheckpointError: a file is missing or damaged; names it.
    """
    manifest = read_manifest(folder)
    for name in manifest:
        verify_file(folder, name, manifest)


def _checksum(path: Path) -> dict[str, Any]:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = crc32c(chunk, checksum)
    return {"bytes": path.stat().st_size, "crc32c": f"{checksum:08x}"}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
