"""A local stand-in for the Hugging Face hub: the endpoints that huggingface_hub calls, over HTTP on loopback.

Two servers, as with the real one: the hub (repositories, commits, listings, small files), and the storage of large
files, which are addressed by URL alone, without a token. Everything is kept in memory. Attributes of `HubStandIn`
switch faults on; `requests` is the log.

The protocol is that of huggingface_hub 2.4, which uploads large files to xet storage if hf-xet is installed and
HF_HUB_DISABLE_XET is not set, else to the LFS endpoints. For xet, `xet_storage` is the address given to hf-xet (such as
`local://FOLDER`), and `xet_hashes` are the hashes it requests there.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

#: Token -> (user, may write).
TOKENS = {"hf_alice": ("alice", True), "hf_reader": ("alice", False), "hf_bob": ("bob", True)}

_REGULAR_BYTES = 10 << 20
_ID = r"(?P<id>[^/]+/[^/]+?)"
_API = re.compile(rf"/api/(?P<kind>model|dataset)s/{_ID}(?:/(?P<verb>[a-z-]+)/(?P<revision>[^/]+))?")
_BATCH = re.compile(rf"/(?P<kind>datasets/)?{_ID}\.git/info/lfs/objects/batch")
_RESOLVE = re.compile(rf"/(?P<kind>datasets/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Content of a file; `data` is None when only xet storage has it."""

    size: int
    data: bytes | None
    large: str | None = None  # sha256 of a file kept in storage

    @property
    def git(self) -> str:
        """Name of the git object: of the content, or of the pointer to it."""
        data = self.large.encode() if self.large else self.data or b""
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Branches and commits of a repository."""

    owner: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def add(self, branch: str, changes: dict[str, Blob]) -> str:
        """Adds a commit to a branch and returns its id."""
        parent = self.branches.get(branch)
        commit = hashlib.sha1(f"{parent} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = {**self.commits.get(parent or "", {}), **changes}
        self.branches[branch] = commit
        return commit


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request in the log."""

    method: str
    path: str
    bytes: int
    authorized: bool


@dataclass
class HubStandIn:
    """State of the stand-in, its faults and its log.

    Attributes:
        endpoint: address of the hub.
        storage: address of its storage.
        page: entries per page of a listing.
        refuse_uploads_after: PUT requests that are accepted; the next ones are answered with 507.
        failing: status that every request to the hub is answered with, and a page that is no JSON.
        intruder: whether somebody else makes a commit just before each one that names its parent.
        short: files whose body ends early, with headers that fit.
        cut: files whose connection breaks once in the middle of the body.
        damaged: files that arrive with a wrong byte.
        stall_after: file bodies that are sent whole; the next one stops in the middle until `release` is set.
    """

    endpoint: str = ""
    storage: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    page: int = 1000
    refuse_uploads_after: int | None = None
    failing: int | None = None
    intruder: bool = False
    short: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    stall_after: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    xet_storage: str = ""
    xet_hashes: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tree(self, repository: str, branch: str = "main", kind: str = "dataset") -> dict[str, bytes | None]:
        """Contents of a repository's files by name."""
        found = self.repositories[f"{kind}:{repository}"]
        files = found.commits[found.branches[branch]]
        return {name: blob.data for name, blob in sorted(files.items()) if name != ".gitattributes"}

    def history(self, repository: str, branch: str = "main", kind: str = "dataset") -> list[set[str]]:
        """Names of the files that each commit added, oldest first."""
        commits = list(self.repositories[f"{kind}:{repository}"].commits.values())
        return [set(new) - set(old) for old, new in itertools.pairwise(commits)]

    def count(self, method: str, pattern: str = "") -> int:
        """Requests of a method whose path contains a pattern."""
        return sum(request.method == method and bool(re.search(pattern, request.path)) for request in self.requests)

    def fetched(self) -> list[str]:
        """Sorted names of the files whose bodies were requested."""
        found = (re.search(r"/resolve/[^/]+/(.+)|[?]name=(.+)", r.path) for r in self.requests if r.method == "GET")
        return sorted({unquote(match[1] or match[2]) for match in found if match})

    def bytes_received(self) -> int:
        """Bytes of all request bodies."""
        return sum(request.bytes for request in self.requests)


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Context manager that runs a stand-in."""
    hub = HubStandIn()
    servers = [_Server(("127.0.0.1", 0), _handler(hub, role)) for role in (_Hub, _Storage)]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}) for server in servers]
    try:
        for thread in threads:
            thread.start()
        yield hub
    finally:
        hub.release.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def environment(hub: HubStandIn, tmp_path: Path) -> dict[str, str]:
    """Environment of a process that uses the stand-in as alice."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_alice",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


class _Server(ThreadingHTTPServer):
    """Server that does not wait for killed clients, nor log their errors."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler(hub: HubStandIn, role: type[_Handler]) -> type[_Handler]:
    return type(role.__name__, (role,), {"hub": hub})


class _RefusedError(Exception):
    """An error response."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class _Handler(BaseHTTPRequestHandler):
    """Base of both servers: reads requests, writes responses, keeps the log."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        authorized = "Authorization" in self.headers
        request = Request(method=self.command, path=self.path, bytes=len(body), authorized=authorized)
        self.hub.requests.append(request)
        try:
            with self.hub.lock:
                answer = self.route(urlsplit(self.path).path, body)
        except _RefusedError as refused:
            self.send(refused.status, b"<html>", {key: value for key, value in refused.headers.items() if value})
        else:
            answer()

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def route(self, path: str, body: bytes) -> Any:
        """Function that writes the response."""
        raise NotImplementedError

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        """Sends a body, with Range support and the faults of this file."""
        if self.command == "HEAD":
            return self.send(200, data, headers)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if name in self.hub.short:
            data = data[: len(data) // 2]
        if name in self.hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        ranged = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        body, status = data[start:], 206 if start else 200
        with self.hub.lock:
            cut = name in self.hub.cut
            self.hub.cut.discard(name)
            stall = self.hub.stall_after == 0
            if self.hub.stall_after:
                self.hub.stall_after -= 1
        if not cut and not stall:
            return self.send(status, body, {**headers, **ranged})
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers, **ranged}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        if stall:
            self.hub.stalled.set()
            self.hub.release.wait(60)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """No output: `requests` is the log."""


class _Storage(_Handler):
    """Large files by hash; the URL alone grants access."""

    def route(self, path: str, body: bytes) -> Any:
        digest = path.rsplit("/", 1)[-1]
        if self.command == "PUT":
            allowed = self.hub.refuse_uploads_after
            if allowed is not None and self.hub.count("PUT") > allowed:
                raise _RefusedError(507, message="storage is full")
            if hashlib.sha256(body).hexdigest() != digest:
                raise _RefusedError(400, message="content does not match its hash")
            self.hub.objects[digest] = body
            return lambda: self.send(200, b"")
        name = parse_qs(urlsplit(self.path).query)["name"][0]
        return lambda: self.send_file(name, self.hub.objects[digest], {"ETag": f'"{digest}"'})


class _Hub(_Handler):
    """Repositories, commits, listings and small files."""

    def route(self, path: str, body: bytes) -> Any:
        if self.hub.failing is not None:
            raise _RefusedError(self.hub.failing)
        if self.token() is not None and self.token() not in TOKENS:
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return lambda: self.send(200, {"errors": [], "warnings": []})
        for pattern, act in ((_API, self.api), (_BATCH, self.batch), (_RESOLVE, self.resolve)):
            match = pattern.fullmatch(path)
            if match:
                return act(match, body)
        raise _RefusedError(404)

    def token(self) -> str | None:
        header = self.headers.get("Authorization")
        return header.removeprefix("Bearer ") if header else None

    def create(self, wanted: dict[str, Any]) -> Any:
        user, writes = TOKENS.get(self.token() or "", (None, False))
        if user is None:
            raise _RefusedError(401, message="Invalid username or password.")
        key = f"{wanted.get('type', 'model')}:{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != user or not writes:
            raise _RefusedError(403, message="You don't have the rights to create a repository here")
        prefix = "datasets/" if wanted.get("type") == "dataset" else ""
        url = f"{self.hub.endpoint}/{prefix}{wanted['organization']}/{wanted['name']}"
        if key in self.hub.repositories:
            return lambda: self.send(409, {"error": "You already created this repo", "url": url})
        repository = Repository(owner=user, private=wanted.get("visibility") == "private")
        repository.add("main", {".gitattributes": Blob(size=5, data=b"# lfs")})
        self.hub.repositories[key] = repository
        return lambda: self.send(200, {"url": url})

    def repository(self, kind: str, name: str, write: bool = False) -> Repository:
        """The repository, or an error if the caller's token has no access."""
        user, writes = TOKENS.get(self.token() or "", (None, False))
        found = self.hub.repositories.get(f"{kind}:{name}")
        if found is None or (found.private and user != found.owner):
            raise _RefusedError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and not (writes and user == found.owner):
            raise _RefusedError(403 if user else 401, message="this token may not write")
        return found

    def api(self, match: re.Match[str], body: bytes) -> Any:
        verb = match["verb"] or "revision"
        write = verb in ("preupload", "commit", "branch", "xet-write-token")
        repository = self.repository(match["kind"], match["id"], write)
        revision = unquote(match["revision"] or "main")
        if verb == "branch":
            repository.branches[revision] = repository.branches["main"]
            return lambda: self.send(201, {})
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb == "revision":
            answer = {"id": match["id"], "sha": commit, "private": repository.private}
            return lambda: self.send(200, answer)
        if verb == "tree":
            return self.listing(repository.commits[commit])
        if verb == "preupload":
            return self.upload_modes(repository.commits[commit], json.loads(body))
        if verb == "commit":
            return self.commit(repository, revision, [json.loads(line) for line in body.splitlines()])
        if verb.startswith("xet-"):
            token = {"casUrl": self.hub.xet_storage, "accessToken": "xet", "exp": int(time.time()) + 3600}
            names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
            headers = {name: str(value) for name, value in zip(names, token.values(), strict=True)}
            return lambda: self.send(200, token, headers)
        raise _RefusedError(404)

    def listing(self, files: dict[str, Blob]) -> Any:
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("cursor", ["0"])[0])
        names = sorted(files)
        folders = {name.rsplit("/", 1)[0] for name in names if "/" in name}
        entries: list[dict[str, Any]] = [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
        for name in names:
            blob = files[name]
            entry = {"type": "file", "path": name, "size": blob.size, "oid": blob.git}
            if blob.large:
                entry["lfs"] = {"oid": blob.large, "size": blob.size, "pointerSize": 134}
                entry["xetHash"] = self.hub.xet_hashes.get(blob.large)
            entries.append(entry)
        stop = start + self.hub.page
        url = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive=true&cursor={stop}"
        link = {"Link": f'<{url}>; rel="next"'} if stop < len(entries) else {}
        return lambda: self.send(200, entries[start:stop], link)

    def upload_modes(self, files: dict[str, Blob], wanted: dict[str, Any]) -> Any:
        ignored = (files[".gitignore"].data or b"").decode().split() if ".gitignore" in files else []
        answer = []
        for file in wanted["files"]:
            name = file["path"]
            binary = b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if file["size"] >= _REGULAR_BYTES or binary else "regular"
            entry = {"path": name, "uploadMode": mode, "shouldIgnore": name in ignored}
            if name in files:
                entry["oid"] = files[name].large or files[name].git
            answer.append(entry)
        return lambda: self.send(200, {"files": answer})

    def commit(self, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> Any:
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and self.hub.intruder:
            repository.add(branch, {"intruder": Blob(size=0, data=b"")})
        if parent is not None and parent != repository.branches[branch]:
            raise _RefusedError(412, message="A commit has happened since")
        changes = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                changes[value["path"]] = Blob(size=len(data), data=data)
            elif line["key"] == "lfsFile":
                stored = self.hub.objects.get(value["oid"])
                if stored is None and not self.hub.xet_storage:
                    raise _RefusedError(400, message="pointer to an object that was not uploaded")
                changes[value["path"]] = Blob(size=value["size"], data=stored, large=value["oid"])
            else:
                raise _RefusedError(400, message=f"{line['key']} is not for this stand-in")
        commit = repository.add(branch, changes)
        url = f"{self.hub.endpoint}{urlsplit(self.path).path.removeprefix('/api').split('/commit/')[0]}/commit/{commit}"
        return lambda: self.send(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def batch(self, match: re.Match[str], body: bytes) -> Any:
        self.repository("dataset" if match["kind"] else "model", match["id"], write=True)
        answer = []
        for wanted in json.loads(body)["objects"]:
            entry = dict(wanted)
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.storage}/{wanted['oid']}"}}
            answer.append(entry)
        return lambda: self.send(200, {"transfer": "basic", "objects": answer})

    def resolve(self, match: re.Match[str], body: bytes) -> Any:
        kind = "dataset" if match["kind"] else "model"
        repository = self.repository(kind, match["id"])
        revision = unquote(match["revision"])
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        name = unquote(match["name"])
        blob = repository.commits[commit].get(name)
        if blob is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.git}"'}
        if blob.large is None:
            return lambda: self.send_file(name, blob.data or b"", headers)
        headers |= {"X-Linked-Etag": f'"{blob.large}"', "X-Linked-Size": str(blob.size)}
        headers["Location"] = f"{self.hub.storage}/{blob.large}?name={match['name']}"
        if blob.large in self.hub.xet_hashes:
            headers["X-Xet-Hash"] = self.hub.xet_hashes[blob.large]
            route = f"/api/{kind}s/{match['id']}/xet-read-token/{commit}"
            headers["X-Xet-Refresh-Route"] = f"{self.hub.endpoint}{route}"
        return lambda: self.send(302, b"", headers)
