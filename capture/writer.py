"""Makes stores: one unit at a time, each committed as a whole or not at all.

A unit's shards and statistics are written first, forced to disk and checksummed; only then does its commit record
appear under its name. What has no commit record does not exist, and the next run removes it and captures that unit
again. The manifest comes last, when every unit of the plan is committed. A capture that was killed therefore ends with
the same bytes as one that was not.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clt.capture.files import check_file, seal, write_atomic
from clt.capture.moments import Moments
from clt.capture.order import unit_permutation
from clt.capture.schema import (
    CapturePlan,
    Manifest,
    StoreSpec,
    UnitRecord,
    commit_path,
    layout_of,
    parse,
    read_json,
    stats_path,
    store_id,
    to_json,
)
from clt.capture.shard import create_arrays, discard_unit, metadata_files, unit_files, write_unit
from clt.errors import StoreError
from clt.records import Modality, TokenTable


@dataclass(frozen=True, kw_only=True)
class UnitData:
    """A unit's tokens, its samples laid end to end.

    Attributes:
        acts: [n, sites, d_model] in the stored type.
        tokens: [n] where they come from.
        sample_ids: `example_id` of each sample.
        sample_tokens: tokens of each sample; they add up to n.
    """

    acts: Tensor
    tokens: TokenTable
    sample_ids: tuple[str, ...]
    sample_tokens: tuple[int, ...]


class StoreWriter:
    """Writes a store; opening one that was begun with the same spec and plan goes on with it.

    Args:
        root: folder of the store; made if it does not exist.
        spec: what the store holds.
        plan: which samples each unit holds.

    Raises:
        StoreError: the folder holds something else, or a store of another model, source or plan.
    """

    def __init__(self, root: Path, spec: StoreSpec, plan: CapturePlan) -> None:
        self.root, self.spec, self.plan = root, spec, plan
        self._layout = layout_of(spec, plan.n_units)
        root.mkdir(parents=True, exist_ok=True)
        if (root / "store.json").is_file():
            self._require_same(parse(StoreSpec, read_json(root / "store.json"), root / "store.json"))
        elif any(not path.name.endswith(".partial") for path in root.iterdir()):
            raise StoreError(f"{root}: the folder is not empty and holds no store; choose another output")
        else:
            write_atomic(root / "store.json", to_json(spec).encode())
        if (root / "plan.json").is_file():
            if parse(CapturePlan, read_json(root / "plan.json"), root / "plan.json") != plan:
                raise StoreError(f"{root}: holds a store with another plan of units; choose another output")
        else:
            write_atomic(root / "plan.json", to_json(plan).encode())
        create_arrays(root, self._layout)

    def pending(self) -> list[int]:
        """Units of the plan that are not committed."""
        return [unit for unit in range(self.plan.n_units) if not (self.root / commit_path(unit)).is_file()]

    def commit(self, unit: int, data: UnitData) -> None:
        """Writes a unit.

        Args:
            unit: number of a pending unit.
            data: its tokens in natural order; they are stored in the order of `unit_permutation`.

        Raises:
            StoreError: all activations are zero.
        """
        order = unit_permutation(len(data.acts), self.spec.seed, unit)
        rows = torch.from_numpy(order)
        acts = data.acts[rows]
        tokens = {f.name: getattr(data.tokens, f.name)[rows].numpy() for f in fields(TokenTable)}
        keep = data.tokens.modality[rows] != Modality.BOS
        statistics = Moments.pack(Moments.of(acts), Moments.of(acts[keep]))
        self.discard(unit)
        try:
            write_unit(self.root, self._layout, unit, acts, {**tokens, "natural_index": order.astype(np.uint32)})
            write_atomic(self.root / stats_path(unit), statistics)
            files = seal(self.root, (*unit_files(unit), stats_path(unit)))
        except BaseException:
            self.discard(unit)
            raise
        record = UnitRecord(
            unit=unit,
            n_tokens=len(acts),
            sample_start=self.plan.sample_starts[unit],
            sample_ids=data.sample_ids,
            sample_tokens=data.sample_tokens,
            files=files,
        )
        write_atomic(self.root / commit_path(unit), to_json(record).encode())

    def discard(self, unit: int) -> None:
        """Removes what an uncommitted unit left on disk."""
        discard_unit(self.root, unit)
        (self.root / stats_path(unit)).unlink(missing_ok=True)

    def finalize(self) -> str:
        """Completes the store.

        Returns:
            The store's id.

        Raises:
            StoreError: a unit is not committed, or a committed file is missing or truncated.
        """
        if pending := self.pending():
            raise StoreError(f"{self.root}: {len(pending)} units are not captured, first {pending[0]}; capture them")
        units = tuple(self._read_commit(unit) for unit in range(self.plan.n_units))
        manifest = Manifest(spec=self.spec, units=units, metadata=seal(self.root, metadata_files()))
        tree = {"id": store_id(manifest), **asdict(manifest)}
        write_atomic(self.root / "manifest.json", json.dumps(tree, indent=1).encode())
        return tree["id"]

    def _read_commit(self, unit: int) -> UnitRecord:
        path = self.root / commit_path(unit)
        record = parse(UnitRecord, read_json(path), path)
        try:
            for file in record.files:
                check_file(self.root, file)
        except StoreError as error:
            raise StoreError(f"{error}; to capture unit {unit} again, delete {path} first") from None
        return record

    def _require_same(self, found: StoreSpec) -> None:
        # The path to the model may differ between machines; its fingerprint may not.
        mine, theirs = ({**asdict(spec), **asdict(spec.model)} for spec in (self.spec, found))
        for key in mine:
            if key not in ("model", "name", "revision") and mine[key] != theirs[key]:
                raise StoreError(
                    f"{self.root}: holds a store with {key}={theirs[key]!r}, this capture has {mine[key]!r}; "
                    f"choose another output or the same settings"
                )
        self.spec = found
