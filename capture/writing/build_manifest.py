"""Builds a store's manifest from its committed units.

The result depends on the committed files alone, merged in unit order, so that any worker writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from clt.capture.storage.base import Storage
from clt.capture.store.committed_units import merged_moments, read_commit, unit_entry
from clt.capture.store.file_records import FileRecord, check_size, put_same, record_file, record_of
from clt.capture.store.layout import StoreArrays, stats_arrays
from clt.capture.store.moments import Moments
from clt.capture.store.schema import (
    PLAN,
    QUANTISATION,
    SPEC,
    TOKEN_CLASSES,
    CapturePlan,
    Manifest,
    QuantisationError,
    SiteGroup,
    UnitEntry,
)
from clt.capture.store.shard import standing_shard
from clt.capture.store.shard_rows import read_rows, write_rows
from clt.errors import StoreError

_BOS = TOKEN_CLASSES.index("bos")


def build_manifest(storage: Storage, arrays: StoreArrays, plan: CapturePlan, digest: str) -> Manifest:
    """Checks all commit records, merges the moments and writes them as Zarr arrays.

    Args:
        storage: the store's files.
        arrays: its arrays.
        plan: its plan; all units are committed.
        digest: `store_digest` that all commit records carry.

    Returns:
        The manifest, not yet written.

    Raises:
        StoreError: a record does not belong to this store, or a committed file is missing or truncated.
    """
    sizes = {entry.key: entry.bytes for entry in storage.list("")}
    units: list[UnitEntry] = []
    for unit in range(plan.n_units):
        commit, record = read_commit(storage, unit, digest)
        if record.n_tokens != plan.unit_tokens[unit]:
            raise StoreError(
                f"{storage.name(commit.path)}: has {record.n_tokens} tokens, the plan {plan.unit_tokens[unit]}; "
                f"run 'clt store repair'"
            )
        for file in record.files:
            check_size(storage, file, sizes.get(file.path))
        units.append(unit_entry(commit, record))
    total = merged_moments(storage, units, arrays.spec.groups)
    common = [SPEC, PLAN, *([QUANTISATION] if arrays.spec.store_dtype == "int8" else []), *arrays.metadata_files()]
    stats = [file for group in arrays.spec.groups for file in _write_stats(storage, group, total[group.name])]
    return Manifest(
        spec=arrays.spec,
        units=tuple(units),
        files=(*(record_file(storage, key) for key in common), *stats),
        quantisation=dict(_quantisation(arrays.spec.groups, total)),
    )


def _write_stats(storage: Storage, group: SiteGroup, moments: Moments) -> Iterator[FileRecord]:
    for name, array in stats_arrays(group).items():
        put_same(storage, f"{array.key}/zarr.json", array.metadata())
        yield record_of(f"{array.key}/zarr.json", array.metadata())
        rows = getattr(moments, name).numpy()
        written = write_rows(storage, array, 0, rows)
        if written is None:
            reader = standing_shard(storage, array, 0)
            written, found = reader.record(), read_rows(reader, array, len(rows))
            # Merging is elementwise, so it gives the same bits on every machine.
            if not np.array_equal(found, rows, equal_nan=True):
                raise StoreError(
                    f"{storage.name(written.path)}: does not match the committed units; delete it and run again"
                )
        yield written


def _quantisation(
    groups: tuple[SiteGroup, ...], total: Mapping[str, Moments]
) -> Iterator[tuple[str, QuantisationError]]:
    for group in groups:
        # Without beginning-of-sequence tokens, whose variance exceeds that of all others together.
        moments = total[group.name].over([c for c in range(len(TOKEN_CLASSES)) if c != _BOS])
        error, m2 = moments.error[0], moments.m2[0]
        # Constant channels have no variance and count as 0.
        by_channel = torch.where(m2 > 0, error / m2, 0.0)
        pooled = torch.where(m2 > 0, error, 0.0).sum(1) / m2.sum(1)
        for site, name in enumerate(group.sites):
            worst = float(np.quantile(by_channel[site].numpy(), 0.99))
            yield name, QuantisationError(fvu=float(pooled[site].nan_to_num()), fvu_p99=worst)
