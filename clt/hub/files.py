"""Local side of transfers to and from the hub: listing of files, comparison with a repository, staging folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from clt.errors import HubError

#: File that the hub creates, and folders that it does not accept.
HUB_FILE = ".gitattributes"
HUB_FOLDERS = (".git", ".cache")

WORKERS = 8

#: Size limit of a commit, which bounds the loss of a failed one.
_BYTES_PER_COMMIT = 8 << 30

#: Suffix of the staging folder, and of a complete file before its final rename.
_PARTIAL = ".pull.partial"


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository.

    Attributes:
        name: relative to the repository, with forward slashes.
        bytes: size.
        sha256: hash of the bytes; None for a small file, which has the git hash only.
        git: hash of the git object.
    """

    name: str
    bytes: int
    sha256: str | None
    git: str

    def equals(self, path: Path) -> bool:
        """True if a local file has the same bytes."""
        if not path.is_file() or path.stat().st_size != self.bytes:
            return False
        git = hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, hashlib.sha256 if self.sha256 else lambda: git)
        return digest.hexdigest() == (self.sha256 or self.git)


def is_ignored(name: str, patterns: Sequence[str]) -> bool:
    """True if a name matches one of the wildcards; `*` matches `/` too."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def local_files(folder: Path, ignore: Sequence[str]) -> list[str]:
    """Sorted names of the files below a folder, without those of the hub or of an unfinished pull.

    Args:
        folder: root; symbolic links are followed.
        ignore: wildcards of names to leave out.

    Raises:
        HubError: a folder cannot be listed, or an entry is neither a file nor a folder.
    """

    def fail(error: OSError) -> None:
        raise HubError(f"{error.filename}: cannot be listed ({error.strerror}); use a readable folder")

    names = []
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if name not in HUB_FOLDERS and not name.endswith(_PARTIAL)]
        for path in (Path(parent, file) for file in files):
            name = path.relative_to(folder).as_posix()
            if name == HUB_FILE or name.endswith(_PARTIAL) or is_ignored(name, ignore):
                continue
            if not path.is_file():
                raise HubError(f"{path}: neither a file nor a folder; remove it")
            names.append(name)
    return sorted(names)


def refuse_conflicts(repo_id: str, folder: Path, names: Sequence[str], present: Mapping[str, HubFile]) -> None:
    """Compares files of a folder with those of the same names in a repository.

    Args:
        repo_id: OWNER/NAME, for the message.
        folder: local folder.
        names: files to compare.
        present: files of the repository by name.

    Raises:
        HubError: a file differs.
    """
    both = [name for name in names if name in present]
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, equal in zip(both, pool.map(lambda name: present[name].equals(folder / name), both), strict=True):
            if not equal:
                remedy = "use another repository, branch or folder"
                raise HubError(f"{folder / name}: {repo_id} has a different file '{name}'; {remedy}")


def commit_groups(folder: Path, names: Sequence[str], files_per_commit: int) -> Iterator[list[str]]:
    """Splits names into groups for commits.

    Args:
        folder: local folder.
        names: files to upload.
        files_per_commit: most files of a group; a group also ends at 8 GiB, unless one file is larger.
    """
    group: list[str] = []
    total = 0
    for name in names:
        size = (folder / name).stat().st_size
        if group and (len(group) >= files_per_commit or total + size > _BYTES_PER_COMMIT):
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


@contextmanager
def receiving_folder(folder: Path, needed: int) -> Iterator[Path]:
    """Context manager of a staging folder on the file system of the final one; removed when the block ends.

    Args:
        folder: final folder, created if it is missing.
        needed: bytes to be downloaded.

    Raises:
        HubError: the disk has less free space.
    """
    staging = folder / _PARTIAL
    if staging.exists():
        # Left by a killed pull.
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise HubError(f"{folder}: {needed} bytes needed, {free} free; free disk space and pull again")
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def waiting_path(path: Path) -> Path:
    """Temporary name of a complete file before its final rename."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def sync(path: Path) -> None:
    """Flushes a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
