"""Existing files under the names that a worker writes are of the same capture or an error."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clt.capture.storage.base import StoredFile
from clt.capture.storage.local import LocalStorage
from clt.capture.upkeep.verify_store import verify_store
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.errors import StoreError

from ..stores import LENGTHS, make_plan, make_spec, make_store, unit_data


def data(unit: int, factor: float = 1.0) -> UnitData:
    spec = make_spec()
    found = unit_data(LENGTHS, make_plan(LENGTHS).samples(unit), spec)
    return replace(found, acts={name: acts * factor for name, acts in found.acts.items()})


def test_workers_that_begin_a_store_at_once_both_go_on(tmp_path: Path) -> None:
    class Late(LocalStorage):
        """Another worker begins the store between this one's check for a store and its check for other files."""

        def list(self, prefix: str) -> list[StoredFile]:
            StoreWriter(LocalStorage(tmp_path / "store"), make_spec(), make_plan(LENGTHS))
            return super().list(prefix)

    writer = StoreWriter(Late(tmp_path / "store"), make_spec(), make_plan(LENGTHS))
    assert writer.pending() == [0, 1, 2]


@pytest.mark.parametrize("left", ["data.zarr/norms/lm/c/0/0", "units/stats/000000.safetensors"])
def test_norms_and_statistics_of_other_activations_are_not_adopted(tmp_path: Path, left: str) -> None:
    other = StoreWriter(tmp_path / "other", make_spec(), make_plan(LENGTHS))
    other.commit(0, data(0, 1.01))
    writer = StoreWriter(tmp_path / "store", make_spec(), make_plan(LENGTHS))
    target = tmp_path / "store" / left
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "other" / left, target)
    with pytest.raises(StoreError, match=f"{Path(left).name}: belongs to another capture; run 'clt store gc'"):
        writer.commit(0, data(0))
    assert writer.pending() == [0, 1, 2]


def test_activations_of_fewer_rows_are_not_adopted(tmp_path: Path) -> None:
    short = StoreWriter(tmp_path / "short", make_spec(), make_plan([5]))
    short.commit(0, unit_data([5], range(1), make_spec()))
    writer = StoreWriter(tmp_path / "store", make_spec(), make_plan(LENGTHS))
    target = tmp_path / "store/data.zarr/acts/lm/c/0/0/0"
    target.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "short/data.zarr/acts/lm/c/0/0/0", target)
    with pytest.raises(StoreError, match="belongs to another capture"):
        writer.commit(0, data(0))


def test_merged_statistics_of_other_units_are_not_adopted(tmp_path: Path) -> None:
    make_store(tmp_path / "other", [20, 30])
    writer = StoreWriter(tmp_path / "store", make_spec(), make_plan(LENGTHS))
    for unit in range(3):
        writer.commit(unit, data(unit))
    shutil.copytree(tmp_path / "other/data.zarr/stats/lm/mean", tmp_path / "store/data.zarr/stats/lm/mean")
    with pytest.raises(StoreError, match="does not match the committed units"):
        writer.finalize()
    shutil.rmtree(tmp_path / "store/data.zarr/stats/lm/mean")
    writer.finalize()
    assert verify_store(tmp_path / "store", level="full").ok
