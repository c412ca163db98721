"""Upload and download of folders to repositories of the Hugging Face hub: stores as datasets, transcoders as models.

An interrupted push or pull can be repeated: files that arrived are recognised by size and hash and not transferred
again. Files in `last` (a store's manifest) are transferred after all others, so that an incomplete copy lacks them.
Nothing is overwritten or deleted. Endpoint and account are the library's settings: HF_ENDPOINT, HF_TOKEN and
`hf auth login`.
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
    """Uploads the files of a folder that a repository does not have yet, in several commits.

    Args:
        folder: local folder; `.git`, `.cache` and `.gitattributes` are not uploaded.
        repo_id: OWNER/NAME; the repository is created if it is missing.
        kind: type of the repository.
        private: visibility of a repository that is created.
        revision: branch, created from `main` if it is missing; default: `main`.
        last: names relative to the folder, committed together after all other files.
        ignore: wildcards of names that are not uploaded; `*` matches `/` too.
        message: summary of each commit.
        files_per_commit: most files of a commit; a commit also ends after 8 GiB.

    Returns:
        Id of the commit that holds all files.

    Raises:
        HubError: the folder is incomplete, the repository has a different file of the same name, access is refused, or
            the transfer failed; uploaded files are kept.
    """
    if not folder.is_dir():
        raise HubError(f"{folder}: no such folder; name the folder to push")
    names = local_files(folder, ignore)
    for name in last:
        if name not in names:
            raise HubError(f"{folder / name}: missing, so the folder is not complete; complete it before pushing")
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
            # The repository may silently drop files (.gitignore), and others may have pushed meanwhile.
            present = repository.files(commit)
            refuse_conflicts(repo_id, folder, last, present)
        for name in rest:
            if name not in present:
                raise HubError(f"{repo_id}: '{name}' is missing after the upload; remove its .gitignore and push again")
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
    """Downloads the files of a repository that a folder does not have yet.

    Each file is checked against its hash and written to disk before it gets its name. One pull at a time per folder.

    Args:
        repo_id: OWNER/NAME.
        folder: new, or left by an interrupted pull.
        kind: type of the repository.
        revision: branch, tag or commit; default: the head of `main`.
        last: names that must be in the repository; renamed after all other files.
        ignore: wildcards of names to leave out, on both sides; `*` matches `/` too.

    Returns:
        Id of the downloaded commit.

    Raises:
        HubError: the repository is missing, incomplete or refuses access, the folder has other files, or the transfer
            failed; downloaded files are kept.
    """
    with _one_line(repo_id, kind, revision):
        repository = _Repository.named(repo_id, kind, revision)
        commit = repository.head()
        present = {name: file for name, file in repository.files(commit).items() if not is_ignored(name, ignore)}
        for name in last:
            if name not in present:
                raise HubError(f"{repo_id}: has no '{name}', its push is incomplete; push again, then pull")
        held = local_files(folder, ignore) if folder.exists() else []
        for name in held:
            if name not in present:
                raise HubError(f"{folder / name}: not a file of {repo_id}; pull into a new folder")
        refuse_conflicts(repo_id, folder, held, present)
        missing = [present[name] for name in sorted(present) if name not in held]
        with receiving_folder(folder, sum(file.bytes for file in missing)) as staging:
            repository.receive(commit, missing, staging, folder, last)
        return commit


def cached_files(
    repo_id: str, names: Sequence[str], *, kind: RepositoryKind = "model", revision: str | None = None
) -> Path:
    """Files of a repository in the library's local cache, downloaded if missing.

    Downloaded files are checked against their hash. Cached files need no network if the revision is a commit or
    HF_HUB_OFFLINE is set.

    Args:
        repo_id: OWNER/NAME.
        names: files in the root of the repository.
        kind: type of the repository.
        revision: branch, tag or commit; default: the head of `main`.

    Returns:
        Folder with the files, named after the commit.

    Raises:
        HubError: the repository or a file is missing, access is refused, or the transfer failed.
    """
    with _one_line(repo_id, kind, revision):
        repository = _Repository.named(repo_id, kind, revision)
        with ThreadPoolExecutor(WORKERS) as pool:
            # The first one resolves the commit.
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
        """Checks the name; sends no request."""
        from huggingface_hub import HfApi

        if repo_id.count("/") != 1:
            raise HubError(f"{repo_id}: not a repository name; write OWNER/NAME")
        # The library reads the variable only when it is first imported.
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        return cls(api=HfApi(endpoint=endpoint), repo_id=repo_id, kind=kind, revision=revision)

    def create(self, private: bool) -> None:
        """Creates the repository and the branch if they do not exist."""
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
        """Files of a commit by name, without the one that the hub creates."""
        from huggingface_hub import RepoFile

        files = {}
        for entry in self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit, repo_type=self.kind):
            if isinstance(entry, RepoFile) and entry.path != HUB_FILE:
                if PurePosixPath(entry.path).is_absolute() or ".." in PurePosixPath(entry.path).parts:
                    raise HubError(f"{self.repo_id}: '{entry.path}' is outside the folder; do not use this repository")
                sha256 = entry.lfs.sha256 if entry.lfs is not None else None
                files[entry.path] = HubFile(name=entry.path, bytes=entry.size, sha256=sha256, git=entry.blob_id)
        return files

    def send(self, folder: Path, names: Sequence[str], message: str, parent: str | None = None) -> str:
        """Commits files of a folder and returns the commit's id.

        Args:
            folder: local folder.
            names: files to commit.
            message: summary of the commit.
            parent: commit that must be the head, or None.
        """
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
        log.info("committed repo=%s files=%d last=%s", self.repo_id, len(names), names[-1])
        return commit.oid

    def receive(self, commit: str, files: Sequence[HubFile], staging: Path, folder: Path, last: Sequence[str]) -> None:
        """Downloads files into `staging` and renames them into `folder`.

        Args:
            commit: id of the commit.
            files: files to download.
            staging: temporary folder.
            folder: final folder.
            last: names that are renamed after all others.
        """
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
        # Remove the staging folder before the last files are renamed: a complete copy has no temporary files.
        shutil.rmtree(staging)
        for _, path in closing:
            waiting_path(path).rename(path)
            sync(path.parent)

    def cache(self, name: str) -> Path:
        """Path of a file in the library's cache; a newly downloaded one is checked against its hash."""
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
            raise HubError(f"{self.repo_id}: has no '{name}', its push is incomplete; push again") from None
        # The library compares sizes only; its cached files are named after their hash.
        kept = path.resolve()
        large = len(kept.name) == 64
        file = HubFile(name=name, bytes=kept.stat().st_size, sha256=kept.name if large else None, git=kept.name)
        if str(path) != known and not file.equals(kept):
            for damaged in (path, kept):
                damaged.unlink()
            raise HubError(f"{self.repo_id}: '{name}' does not match its hash after the download; run again")
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
            raise HubError(f"{self.repo_id}: '{file.name}' does not match its hash after the download; pull again")
        sync(received)
        path.parent.mkdir(parents=True, exist_ok=True)
        received.rename(path)
        return file


@contextmanager
def _no_bars_in_logs() -> Iterator[None]:
    """Shows the library's progress bars, one per file, on terminals only."""
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
    """Turns errors of the library and the network into a HubError of one line."""
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
    """Message and remedy; None for an error that the user cannot cause."""
    from httpx2 import TransportError
    from huggingface_hub import errors

    if isinstance(error, (RuntimeError, errors.LocalEntryNotFoundError)) and error.__cause__ is not None:
        return _reason(error.__cause__, kind, revision)
    text = (str(error).splitlines() or [type(error).__name__])[0]
    match error:
        case errors.HFValidationError():
            return "not a repository name; write OWNER/NAME in letters, digits, '-', '_' and '.'"
        case errors.RevisionNotFoundError():
            return f"has no revision '{revision or 'main'}'; name one of its branches, tags or commits"
        case errors.GatedRepoError():
            return f"gated repository; request access on its page, then {_LOGIN}"
        case errors.RepositoryNotFoundError():
            return f"no such {kind} repository, or a private one; check the name, {_LOGIN}"
        case errors.HfHubHTTPError():
            details = f" ({error.server_message})" if error.server_message else ""
            return _status(error.response.status_code) + details
        case json.JSONDecodeError():
            return "invalid response, not from a hub; check HF_ENDPOINT"
        case TransportError() | ConnectionError():
            return f"the hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE ({text})"
        case OSError() if error.filename is not None:
            return f"{error.filename}: {error.strerror}; check permissions and free disk space, run again"
        case OSError() | RuntimeError():
            return f"the transfer failed ({text}); run again to continue"
    return None


def _status(status: int) -> str:
    match status:
        case 401:
            return f"access token missing or not valid; {_LOGIN}"
        case 403:
            return f"the access token does not allow this; {_LOGIN} with one that does"
        case 412:
            return "the repository changed during the push; push again"
        case _:
            return f"the hub responded with error {status}; run again later to continue"
