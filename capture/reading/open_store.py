"""Opens stores for reading: complete ones, or the committed units of an unfinished one.

`docs/store.md` shows the files of a store. `clt.capture.reading.loader` reads an opened store for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.storage.base import Storage
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.committed_units import committed_units, read_commit, unit_entry
from clt.capture.store.file_records import check_size, record_file
from clt.capture.store.json_files import parse, read_manifest, sealed, store_digest
from clt.capture.store.schema import MANIFEST, PLAN, QUANTISATION, SPEC, CapturePlan, Manifest, StoreSpec
from clt.errors import StoreError


def open_store(location: str | Path | Storage) -> ActivationStore:
    """Opens a complete store for reading.

    Args:
        location: folder or URL of the store, or its storage.

    Returns:
        The store. Existence and size of every file are checked now, contents when they are read.

    Raises:
        StoreError: there is no store, its capture has not finished, or a file is missing, truncated or damaged.
    """
    storage = open_storage(location)
    if storage.size(MANIFEST) is None:
        if storage.size(SPEC) is None:
            raise StoreError(f"{storage.url}: no activation store here; check the path or run the capture first")
        raise StoreError(f"{storage.url}: the capture has not finished (no {MANIFEST}); run the same capture again")
    store_id, manifest = read_manifest(storage)
    sizes = {entry.key: entry.bytes for entry in storage.list("")}
    for record in manifest.all_files:
        check_size(storage, record, sizes.get(record.path))
    return ActivationStore(storage, store_id, manifest)


def open_committed(location: str | Path | Storage, units: Sequence[int] | None = None) -> ActivationStore:
    """Opens committed units of a store whose capture may still be running.

    Args:
        location: folder or URL of the store, or its storage.
        units: numbers of committed units; default: all.

    Returns:
        A store of these units in ascending order; its id is the hash of their files.

    Raises:
        StoreError: there is no store, a unit is not committed, or a file is missing, truncated or damaged.
    """
    storage = open_storage(location)
    if storage.size(SPEC) is None:
        raise StoreError(f"{storage.url}: no activation store here; check the path or run the capture first")
    spec = parse(StoreSpec, storage.read(SPEC), storage.name(SPEC))
    plan = parse(CapturePlan, storage.read(PLAN), storage.name(PLAN))
    digest = store_digest(spec, plan)
    numbers = sorted(committed_units(storage) if units is None else units)
    entries = tuple(unit_entry(*read_commit(storage, unit, digest)) for unit in numbers)
    if not entries:
        raise StoreError(f"{storage.url}: no unit is committed yet; start the capture or wait for it")
    files = (record_file(storage, QUANTISATION),) if spec.store_dtype == "int8" else ()
    manifest = Manifest(spec=spec, units=entries, files=files, quantisation={})
    for record in manifest.all_files:
        check_size(storage, record, storage.size(record.path))
    return ActivationStore(storage, sealed(manifest)[0], manifest)
