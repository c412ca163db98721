"""Reading and writing a store's JSON files.

The manifest and the commit records are sealed: the file holds the SHA-256 of the rest of its text, so that any changed
byte is detected.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from clt.capture.storage.base import Storage
from clt.capture.store.schema import MANIFEST, SCHEMA_VERSION, CapturePlan, Manifest, StoreSpec
from clt.errors import StoreError

T = TypeVar("T")

_HEAD, _TAIL = '{"id": "%s", "record": ', "}\n"
#: Cached, because making an adapter takes longer than using it.
_adapters: dict[type, TypeAdapter[Any]] = {}


def to_json(record: Any) -> bytes:
    """A record as JSON text; equal records give equal text."""
    return json.dumps(asdict(record), indent=1).encode()


def store_digest(spec: StoreSpec, plan: CapturePlan) -> str:
    """Hash of the spec and plan of a store; commit records carry it, so that those of another store are detected."""
    return hashlib.sha256(to_json(spec) + to_json(plan)).hexdigest()


def sealed(record: Any) -> tuple[str, bytes]:
    """SHA-256 of a record, and the contents of the file with both."""
    body = json.dumps(asdict(record), separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    return digest, (_HEAD % digest + body + _TAIL).encode()


def unsealed(cls: type[T], contents: bytes, name: str) -> tuple[str, T]:
    """Reads a sealed file.

    Args:
        cls: dataclass of the record.
        contents: bytes of the file.
        name: full name of the file, for error messages.

    Returns:
        The hash and the record.

    Raises:
        StoreError: the file is damaged, or its schema has another major version.
    """
    body = contents[len(_HEAD % ("0" * 64)) : -len(_TAIL)]
    digest = hashlib.sha256(body).hexdigest()
    if contents != (_HEAD % digest).encode() + body + _TAIL.encode():
        check_version(contents, name)
        raise StoreError(f"{name}: contents do not match their hash; restore it or run 'clt store repair'")
    return digest, parse(cls, body, name)


def read_manifest(storage: Storage) -> tuple[str, Manifest]:
    """Id and manifest of a complete store.

    Raises:
        StoreError: the file is missing or damaged, or of another major version.
    """
    return unsealed(Manifest, storage.read(MANIFEST), storage.name(MANIFEST))


def parse(cls: type[T], contents: bytes, name: str) -> T:
    """A record from JSON text; unknown keys are ignored.

    Args:
        cls: dataclass of the record.
        contents: the text.
        name: full name of the file, for error messages.

    Returns:
        The record.

    Raises:
        StoreError: the text is damaged, or its schema has another major version.
    """
    check_version(contents, name)
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    try:
        record: T = _adapters[cls].validate_json(contents)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        message = " ".join(str(first["msg"]).split())
        raise StoreError(f"{name}: damaged at '{key}' ({message}); restore it or run 'clt store repair'") from None
    return record


def check_version(contents: bytes, name: str) -> None:
    """Raises StoreError if a file has another major schema version; missing keys are damage only in this one."""
    try:
        tree = json.loads(contents)
    except ValueError:
        return
    for key in ("record", "spec"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    version = str(tree.get("schema_version", SCHEMA_VERSION)) if isinstance(tree, dict) else SCHEMA_VERSION
    if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise StoreError(f"{name}: store schema '{version}', this program reads {SCHEMA_VERSION}; capture again")
