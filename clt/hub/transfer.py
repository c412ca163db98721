"""Folders to and from repositories of the Hugging Face hub: activation stores as datasets, transcoders as models.

A push or a pull may end anywhere and be started again: a file that has arrived is known by its size and hash and does
not travel twice. The files named `last` (a store's manifest) travel when all others are there, so an unfinished copy is
known by their absence. Neither direction overwrites or deletes anything. Where the hub is and who is asking are the
library's own settings: HF_ENDPOINT, HF_TOKEN and `hf auth login`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from clt.errors import CLTError, HubError
from clt.hub.files import (
    HUB_FILE,
    WORKERS,
    HubFile,
    commit_groups,
    is_ignored,
    local_files,
    receiving_folder,
    refuse_conflicts,
    sync,
    waiting_path,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

RepositoryKind = Literal["dataset", "model"]

FILES_PER_COMMIT = 256

_LOGIN = "set HF_TOKEN or run 'hf auth login'"


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    kind: RepositoryKind = "dataset",
    private: bool = True,
    revision: str | None = None,
    last: Sequence[str] = (),
    ignore: Sequence[str] = (),
    message: str,
    files_per_commit: int = FILES_PER_COMMIT,
) -> str:
    """Sends the files of a folder that a repository does not hold yet, in several commits.

    Args:
        folder: what to send, with everything below it except `.git`, `.cache` and `.gitattributes`.
        repo_id: OWNER/NAME; the repository is made if it is missing.
        kind: type of the repository.
        private: visibility of a repository that is made.
        revision: branch, made from `main` if it is missing; None is `main`.
        last: names relative to the folder, committed together when all other files are there.
        ignore: wildcards of names that stay here; `*` matches `/` too.
        message: summary of each commit.
        files_per_commit: files in one commit, at most; a commit also ends after 8 GiB.

    Returns:
        Id of the commit that holds all files.

    Raises:
        HubError: the folder is not complete, the repository holds other contents under one of its names, access is
            refused, or the transfer failed; what has arrived stays.
    """
    if not folder.is_dir():
        raise HubError(f"{folder}: no such folder; name the folder to push")
    names = local_files(folder, ignore)
    for name in last:
        if name not in names:
            raise HubError(f"{folder / name}: missing, so the folder is not complete; finish it before the push")
    with _one_line(repo_id, kind, revision):
        repository = _Repository.named(repo_id, kind, revision)
        repository.create(private)
        commit = repository.head()
        present = repository.files(commit)
        refuse_conflicts(repo_id, folder, names, present)
        rest = [name for name in names if name not in present and name not in last]
        for group in commit_groups(folder, rest, files_per_commit):
            commit = repository.send(folder, group, message)
        if rest:
            # The repository may drop files without a word, and others may have been at work meanwhile.
            present = repository.files(commit)
            refuse_conflicts(repo_id, folder, last, present)
        for name in rest:
            if name not in present:
                raise HubError(
                    f"{repo_id}: '{name}' is missing after its push; remove the .gitignore there, push again"
                )
        closing = [name for name in last if name not in present]
        return repository.send(folder, closing, message, parent=commit) if closing else commit


def pull_folder(
    repo_id: str,
    folder: Path,
    *,
    kind: RepositoryKind = "dataset",
    revision: str | None = None,
    last: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> str:
    """Fetches the files of a repository that a folder does not hold yet; it ends up with those and no others.

    A file is checked against its hash, written to disk and only then given its name. One pull at a time per folder.

    Args:
        repo_id: OWNER/NAME.
        folder: new, or left by a pull that did not end.
        kind: type of the repository.
        revision: branch, tag or commit; None is the head of `main`.
        last: names that must be in the repository, and get their names when all other files have theirs.
        ignore: wildcards of names that are left out, on both sides; `*` matches `/` too.

    Returns:
        Id of the commit that was fetched.

    Raises:
        HubError: the repository is missing, unfinished or refuses access, the folder holds anything else, or the
            transfer failed; what has arrived stays.
    """
    with _one_line(repo_id, kind, revision):
        repository = _Repository.named(repo_id, kind, revision)
        commit = repository.head()
        present = {name: file for name, file in repository.files(commit).items() if not is_ignored(name, ignore)}
        for name in last:
            if name not in present:
                raise HubError(f"{repo_id}: has no '{name}', so its push did not end; push again, then pull")
        held = local_files(folder, ignore) if folder.exists() else []
        for name in held:
            if name not in present:
                raise HubError(f"{folder / name}: no file of {repo_id}; pull into a new folder")
        refuse_conflicts(repo_id, folder, held, present)
        missing = [present[name] for name in sorted(present) if name not in held]
        with receiving_folder(folder, sum(file.bytes for file in missing)) as staging:
            repository.receive(commit, missing, staging, folder, last)
        return commit


def cached_files(
    repo_id: str, names: Sequence[str], *, kind: RepositoryKind = "model", revision: str | None = None
) -> Path:
    """Files of a repository in the library's cache on this machine, fetched where they are missing.

    A file is checked against its hash when it arrives; those that are there already need no network when the revision
    is a commit, or HF_HUB_OFFLINE is set.

    Args:
        repo_id: OWNER/NAME.
        names: files at the top of the repository.
        kind: type of the repository.
        revision: branch, tag or commit; None is the head of `main`.

    Returns:
        Folder that holds them, with the name of the commit.

    Raises:
        HubError: the repository or a file is missing, access is refused, or the transfer failed.
    """
    with _one_line(repo_id, kind, revision):
        repository = _Repository.named(repo_id, kind, revision)
        with ThreadPoolExecutor(WORKERS) as pool:
            # The first one says which commit it is.
            first = repository.cache(names[0])
            rest = replace(repository, revision=first.parent.name)
            list(pool.map(rest.cache, names[1:]))
        return first.parent


@dataclass(frozen=True, kw_only=True)
class _Repository:
    """One branch, tag or commit of a repository."""

    api: HfApi
    repo_id: str
    kind: RepositoryKind
    revision: str | None

    @classmethod
    def named(cls, repo_id: str, kind: RepositoryKind, revision: str | None) -> _Repository:
        """Looks at the name only; asks nothing of the hub yet."""
        from huggingface_hub import HfApi

        if repo_id.count("/") != 1:
            raise HubError(f"{repo_id}: not the name of a repository; write OWNER/NAME")
        # The library reads the variable when it is first imported, which another module may have done long ago.
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        return cls(api=HfApi(endpoint=endpoint), repo_id=repo_id, kind=kind, revision=revision)

    def create(self, private: bool) -> None:
        """Makes the repository and the branch, unless they are there."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            self.api.repo_info(self.repo_id, repo_type=self.kind, revision=self.revision)
            return
        except RevisionNotFoundError:
            pass
        except RepositoryNotFoundError:
            self.api.create_repo(self.repo_id, repo_type=self.kind, private=private, exist_ok=True)
        if self.revision not in (None, "main"):
            self.api.create_branch(self.repo_id, branch=self.revision, repo_type=self.kind, exist_ok=True)

    def head(self) -> str:
        """Id of the newest commit."""
        commit = self.api.repo_info(self.repo_id, repo_type=self.kind, revision=self.revision).sha
        assert commit is not None
        return commit

    def files(self, commit: str) -> dict[str, HubFile]:
        """The files of a commit by name, without the one that the hub adds."""
        from huggingface_hub import RepoFile

        files = {}
        for entry in self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit, repo_type=self.kind):
            if isinstance(entry, RepoFile) and entry.path != HUB_FILE:
                if PurePosixPath(entry.path).is_absolute() or ".." in PurePosixPath(entry.path).parts:
                    raise HubError(f"{self.repo_id}: '{entry.path}' points outside of the folder; do not use it")
                sha256 = entry.lfs.sha256 if entry.lfs is not None else None
                files[entry.path] = HubFile(name=entry.path, bytes=entry.size, sha256=sha256, git=entry.blob_id)
        return files

    def send(self, folder: Path, names: Sequence[str], message: str, parent: str | None = None) -> str:
        """Commits files of a folder and returns the commit's id; with `parent`, only on top of that commit."""
        from huggingface_hub import CommitOperationAdd

        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        with _no_bars_in_logs():
            commit = self.api.create_commit(
                self.repo_id,
                additions,
                commit_message=message,
                repo_type=self.kind,
                revision=self.revision,
                parent_commit=parent,
            )
        log.info("%s: %d files committed, up to %s", self.repo_id, len(names), names[-1])
        return commit.oid

    def receive(self, commit: str, files: Sequence[HubFile], staging: Path, folder: Path, last: Sequence[str]) -> None:
        """Fetches files into `staging` and gives them their names in `folder`, those in `last` at the very end."""
        first = [file for file in files if file.name not in last]
        closing = [(file, folder / file.name) for file in files if file.name in last]
        total = sum(file.bytes for file in files)
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar, ThreadPoolExecutor(WORKERS) as pool:
            for file in pool.map(lambda file: self._fetch(commit, file, staging, folder / file.name), first):
                bar.update(file.bytes)
            for parent in {folder / parent for file in first for parent in PurePosixPath(file.name).parents}:
                sync(parent)
            for file, path in closing:
                bar.update(self._fetch(commit, file, staging, waiting_path(path)).bytes)
        # Nothing of ours may remain beside a finished copy, so this folder goes before the last files get their names.
        shutil.rmtree(staging)
        for _, path in closing:
            waiting_path(path).rename(path)
            sync(path.parent)

    def cache(self, name: str) -> Path:
        """A file in the library's cache; one that is new there is compared with its hash."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import RemoteEntryNotFoundError
        from huggingface_hub.utils import silent_tqdm

        known = try_to_load_from_cache(self.repo_id, name, revision=self.revision or "main", repo_type=self.kind)
        try:
            path = Path(
                self.api.hf_hub_download(
                    self.repo_id,
                    name,
                    repo_type=self.kind,
                    revision=self.revision,
                    tqdm_class=silent_tqdm,  # type: ignore[arg-type]
                )
            )
        except RemoteEntryNotFoundError:
            raise HubError(f"{self.repo_id}: has no '{name}': no transcoder, or one whose push did not end") from None
        # The library compares sizes only, and names what it keeps after its hash.
        kept = path.resolve()
        large = len(kept.name) == 64
        file = HubFile(name=name, bytes=kept.stat().st_size, sha256=kept.name if large else None, git=kept.name)
        if str(path) != known and not file.equals(kept):
            for damaged in (path, kept):
                damaged.unlink()
            raise HubError(f"{self.repo_id}: '{name}' arrived with another hash; run again")
        return path

    def _fetch(self, commit: str, file: HubFile, staging: Path, path: Path) -> HubFile:
        from huggingface_hub.utils import silent_tqdm

        received = Path(
            self.api.hf_hub_download(
                self.repo_id,
                file.name,
                repo_type=self.kind,
                revision=commit,
                local_dir=staging,
                tqdm_class=silent_tqdm,  # type: ignore[arg-type]
            )
        )
        # The library compares sizes only.
        if not file.equals(received):
            raise HubError(f"{self.repo_id}: '{file.name}' arrived with another hash; pull again")
        sync(received)
        path.parent.mkdir(parents=True, exist_ok=True)
        received.rename(path)
        return file


@contextmanager
def _no_bars_in_logs() -> Iterator[None]:
    """Keeps the library's progress bars, one per file, to terminals."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _one_line(repo_id: str, kind: RepositoryKind, revision: str | None) -> Iterator[None]:
    """Turns what the library and the network raise into a HubError."""
    try:
        yield
    except CLTError:
        raise
    except Exception as error:
        reason = _reason(error, kind, revision)
        if reason is None:
            raise
        raise HubError(f"{repo_id}: {' '.join(reason.split())}") from None


def _reason(error: BaseException, kind: RepositoryKind, revision: str | None) -> str | None:
    """What to tell the user; None for an error that is none of the user's."""
    from httpx2 import TransportError
    from huggingface_hub import errors

    if isinstance(error, (RuntimeError, errors.LocalEntryNotFoundError)) and error.__cause__ is not None:
        return _reason(error.__cause__, kind, revision)
    text = (str(error).splitlines() or [type(error).__name__])[0]
    match error:
        case errors.HFValidationError():
            return "not the name of a repository; write OWNER/NAME in letters, digits, '-', '_' and '.'"
        case errors.RevisionNotFoundError():
            return f"has no revision '{revision or 'main'}'; name one of its branches, tags or commits"
        case errors.GatedRepoError():
            return f"access has to be asked for on its page; then {_LOGIN}"
        case errors.RepositoryNotFoundError():
            return f"no such {kind} repository, or a private one; check the name, {_LOGIN}"
        case errors.HfHubHTTPError():
            details = f" ({error.server_message})" if error.server_message else ""
            return _status(error.response.status_code) + details
        case json.JSONDecodeError():
            return "the answer is not that of a hub; check HF_ENDPOINT"
        case TransportError() | ConnectionError():
            return f"the hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE ({text})"
        case OSError() if error.filename is not None:
            return f"{error.filename}: {error.strerror}; see to its permissions and to room on the disk, run again"
        case OSError() | RuntimeError():
            return f"the transfer failed; run again, what has arrived stays ({text})"
    return None


def _status(status: int) -> str:
    match status:
        case 401:
            return f"access token missing or not valid; {_LOGIN}"
        case 403:
            return f"the access token does not allow this; {_LOGIN} with one that does"
        case 412:
            return "somebody else changed the repository meanwhile; push again"
        case _:
            return f"the hub answers with error {status}; run again later, what has arrived stays"
