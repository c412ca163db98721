"""Files of a store in a folder of a local or network file system."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

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
    from typing_extensions import Buffer

OPEN_FILES = 64
IOV_MAX = os.sysconf("SC_IOV_MAX")

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PERMISSION = "check the owner and permissions of the folder and that its file system has hard links"
_REMEDIES = {
    errno.ENOSPC: "free some space, then run again",
    errno.EFBIG: "raise the limit of file size (ulimit -f) or choose a smaller rows_per_unit",
    errno.EDQUOT: "free some space, then run again",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "choose a folder that can be written",
    errno.ENOTDIR: "a file has the name of a needed folder; choose another folder",
    errno.EEXIST: "a file has the name of a needed folder; choose another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk failed; see the system's log, then run again",
    errno.EOPNOTSUPP: "this file system has no hard links, which publishing needs; choose another folder",
}


def _explain(path: str, error: OSError) -> NoReturn:
    """Raises a one-line StoreError with a remedy for errors that have one, and any other error unchanged."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        raise error
    raise StoreError(f"{path}: {os.strerror(error.errno or 0).lower()}; {remedy}") from None


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _explain(path, error)


class _Handle:
    """An open file descriptor, closed with its last reference."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _OpenFiles:
    """LRU cache of file descriptors of one process: a forked child must not inherit a lock that a thread held."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._handles: OrderedDict[str, _Handle] = OrderedDict()

    def get(self, key: str) -> _Handle | None:
        with self._lock:
            handle = self._handles.get(key)
            if handle is not None:
                self._handles.move_to_end(key)
            return handle

    def add(self, key: str, handle: _Handle) -> None:
        with self._lock:
            self._handles[key] = handle
            if len(self._handles) > OPEN_FILES:
                self._handles.popitem(last=False)

    def drop(self, key: str) -> None:
        with self._lock:
            self._handles.pop(key, None)


class LocalStorage(Storage):
    """A store in a folder.

    Args:
        root: the folder; created with the first file.
        durable: False skips every fsync.
    """

    def __init__(self, root: Path, durable: bool = True) -> None:
        self.url = str(root)
        self.durable = durable
        self._root = os.path.abspath(root)
        self._settled: set[str] = set()
        self._open = _OpenFiles()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "durable": self.durable, "_root": self._root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _settled=set(), _open=_OpenFiles())

    def name(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def size(self, key: str) -> int | None:
        try:
            status = os.stat(self.name(key))
        except _ABSENT:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, key: str) -> bytes:
        path = self.name(key)
        try:
            with open(path, "rb") as file:
                return file.read()
        except _ABSENT:
            raise missing(path) from None
        except OSError as error:
            _explain(path, error)

    def read_into(self, key: str, offset: int, buffers: Sequence[Buffer]) -> None:
        handle = self._handle(key)
        views, wanted = byte_views(buffers)
        done = 0
        try:
            while done < wanted:
                count = os.preadv(handle.descriptor, views[:IOV_MAX], offset + done)
                done += count
                if done == wanted:
                    return
                if count == 0:
                    size = os.fstat(handle.descriptor).st_size
                    raise too_short(self.name(key), size, offset + wanted)
                views = after(views, count)
        except IsADirectoryError:
            raise missing(self.name(key)) from None
        except OSError as error:
            _explain(self.name(key), error)

    def replace(self, key: str, data: bytes) -> None:
        with self.create(key) as upload:
            upload.write([data])
            upload.overwrite()
        self._opened().drop(key)

    def create(self, key: str) -> LocalUpload:
        path = self.name(key)
        with _explained(path):
            return LocalUpload(self, path)

    def list(self, prefix: str) -> list[StoredFile]:
        folder = prefix.rstrip("/")
        entries = list(self._walk(check_key(folder)) if folder else self._walk(""))
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        path = self.name(key)
        with _explained(path), suppress(*_ABSENT):
            os.unlink(path)
            self._opened().drop(key)
            self.settle(os.path.dirname(path))

    def move(self, key: str, to: str) -> None:
        source, target = self.name(key), self.name(to)
        if not os.path.isfile(source):
            raise missing(source)
        with _explained(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(source, target)
            self.settle(os.path.dirname(target))
            self.settle(os.path.dirname(source))
        self._opened().drop(key)
        self._opened().drop(to)

    def settle(self, folder: str) -> None:
        """Syncs a folder's directory entries to disk and, once per process, those of its parent folders.

        Another process may have just created the parents without having synced them.
        """
        if not self.durable:
            return
        _sync_folder(folder)
        while folder not in self._settled and not os.path.ismount(folder):
            parent = os.path.dirname(folder)
            if len(folder) > len(self._root):
                _sync_folder(parent)
            else:
                # Folders above the store that this user cannot open were not created by this run.
                with suppress(OSError):
                    _sync_folder(parent)
            self._settled.add(folder)
            folder = parent

    def _opened(self) -> _OpenFiles:
        if self._open.process != os.getpid():
            self._open = _OpenFiles()
        return self._open

    def _handle(self, key: str) -> _Handle:
        opened = self._opened()
        handle = opened.get(key)
        if handle is None:
            path = self.name(key)
            try:
                handle = _Handle(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except _ABSENT:
                raise missing(path) from None
            except OSError as error:
                _explain(path, error)
            opened.add(key, handle)
        return handle

    def _walk(self, folder: str) -> Iterator[StoredFile]:
        path = os.path.join(self._root, folder)
        with _explained(path), suppress(*_ABSENT), os.scandir(path) as items:
            for item in items:
                key = f"{folder}/{item.name}" if folder else item.name
                if item.is_dir():
                    yield from self._walk(key)
                    continue
                # A partial file may have been removed since the folder was read.
                with suppress(FileNotFoundError):
                    status = item.stat()
                    yield StoredFile(key=key, bytes=status.st_size, modified=status.st_mtime)


class LocalUpload(Upload):
    """A partial file beside its final name; `publish` hard-links it, which fails if the name is taken."""

    def __init__(self, storage: LocalStorage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._folder = os.path.dirname(path)
        self._partial = partial_key(path)
        os.makedirs(self._folder, exist_ok=True)
        self._handle: _Handle | None = _Handle(
            os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        )

    def write(self, buffers: Sequence[Buffer]) -> None:
        assert self._handle is not None, "already published or aborted"
        views, wanted = byte_views(buffers)
        try:
            while wanted:
                count = os.writev(self._handle.descriptor, views[:IOV_MAX])
                wanted -= count
                views = after(views, count) if wanted else []
        except OSError as error:
            self.abort()
            _explain(self._path, error)

    def publish(self) -> bool:
        with self._finished():
            try:
                os.link(self._partial, self._path)
                won = True
            except FileExistsError:
                # NFS repeats a link request whose reply was lost and then finds the name taken by itself: a link count
                # above 1 shows that.
                won = os.stat(self._partial).st_nlink > 1
            os.unlink(self._partial)
            # Also when the name was taken: the other writer may not have synced it yet.
            self._storage.settle(self._folder)
        return won

    def overwrite(self) -> None:
        """Gives the file its final name, replacing an existing file."""
        with self._finished():
            os.replace(self._partial, self._path)
            self._storage.settle(self._folder)

    def abort(self) -> None:
        if self._handle is not None:
            self._handle = None
            with suppress(FileNotFoundError):
                os.unlink(self._partial)

    @contextmanager
    def _finished(self) -> Iterator[None]:
        """Syncs the bytes to disk before the block; an OSError discards them."""
        assert self._handle is not None, "already published or aborted"
        try:
            if self._storage.durable:
                os.fsync(self._handle.descriptor)
            yield
        except OSError as error:
            self.abort()
            _explain(self._path, error)
        self._handle = None


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
