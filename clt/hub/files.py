"""What `clt.hub.transfer` needs to know of folders: the files they hold, whether the hub has the same, where new ones
arrive."""

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

#: The hub makes this file by itself, and takes no file below these folders.
HUB_FILE = ".gitattributes"
HUB_FOLDERS = (".git", ".cache")

WORKERS = 8

#: What one failure can cost is bounded in bytes too: shards are large.
_BYTES_PER_COMMIT = 8 << 30

#: Ending of the folder that files arrive in, and of a file that waits for its name.
_PARTIAL = ".pull.partial"


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository.

    Attributes:
        name: relative to the repository, with forward slashes.
        bytes: size.
        sha256: hash of the bytes; None for a small file, which is known by `git` alone.
        git: hash of the git object.
    """

    name: str
    bytes: int
    sha256: str | None
    git: str

    def equals(self, path: Path) -> bool:
        """Whether a local file has the same bytes."""
        if not path.is_file() or path.stat().st_size != self.bytes:
            return False
        git = hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, hashlib.sha256 if self.sha256 else lambda: git)
        return digest.hexdigest() == (self.sha256 or self.git)


def is_ignored(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the wildcards; `*` matches `/` too."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def local_files(folder: Path, ignore: Sequence[str]) -> list[str]:
    """Names of the files below a folder, sorted, without what belongs to the hub or to an unfinished pull.

    Args:
        folder: where to look; linked folders are followed.
        ignore: wildcards of names to leave out.

    Raises:
        HubError: something cannot be listed, or is neither a file nor a folder.
    """

    def fail(error: OSError) -> None:
        raise HubError(f"{error.filename}: cannot be listed ({error.strerror}); name a folder that can be read")

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
    """HubError if a file of the folder differs from the repository's file of that name."""
    both = [name for name in names if name in present]
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, equal in zip(both, pool.map(lambda name: present[name].equals(folder / name), both), strict=True):
            if not equal:
                remedy = "use another repository, branch or folder"
                raise HubError(f"{folder / name}: {repo_id} holds other contents under '{name}'; {remedy}")


def commit_groups(folder: Path, names: Sequence[str], files_per_commit: int) -> Iterator[list[str]]:
    """Cuts names into groups of at most so many files, and of 8 GiB unless one file is larger."""
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
    """The folder that files arrive in, on the file system of their final place; gone when the block ends.

    Args:
        folder: final place, made if it is missing.
        needed: bytes that are to come.

    Raises:
        HubError: there is no room for them.
    """
    staging = folder / _PARTIAL
    if staging.exists():
        # Left by a pull that was killed.
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise HubError(f"{folder}: {needed} bytes are to come and {free} are free; make room and pull again")
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def waiting_path(path: Path) -> Path:
    """Where a complete file waits until it may have its name."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
