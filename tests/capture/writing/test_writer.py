"""Writing stores: the same bytes for the same data, and units committed atomically by any worker."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import google_crc32c  # an independent implementation, which zarr depends on
import numpy as np
import pytest
import torch
from torch import Tensor

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.errors import StoreError

from ..stores import LENGTHS, TWO_GROUPS, identity, make_plan, make_spec, make_store, unit_data
from ..upkeep.damage import tree


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make_store(tmp_path / "store", LENGTHS)


def test_same_data_makes_the_same_bytes_and_id(tmp_path: Path, store: ActivationStore) -> None:
    again = make_store(tmp_path / "again", LENGTHS)
    assert again.id == store.id
    assert tree(again.location) == tree(store.location)
    other = make_store(tmp_path / "other", LENGTHS, seed=1)
    assert other.id != store.id


def test_records_hold_size_and_checksum_of_every_file(store: ActivationStore) -> None:
    files = tree(store.location)
    manifest = json.loads(files.pop("manifest.json"))["record"]
    recorded = [*manifest["files"], *(file for unit in manifest["units"] for file in unit["files"])]
    of_units = []
    for unit in range(3):
        of_units += json.loads(files[f"units/commits/{unit:06d}.json"])["record"]["files"]
    for file in recorded:
        contents = files[file["path"]]
        data = without_checksums(contents) if "/c/" in file["path"] else contents
        assert (file["bytes"], file["crc32c"]) == (len(contents), google_crc32c.value(data))
    assert sorted(file["path"] for file in recorded) == sorted(files)
    assert all(file in recorded for file in of_units)
    assert {file["path"] for file in of_units} == {
        path for path in files if path.startswith("units/stats/") or ("/c/" in path and "/stats/" not in path)
    }


def without_checksums(shard: bytes) -> bytes:
    """Chunks and index of a shard without their checksums."""
    for chunks in range(1, 17):
        index = np.frombuffer(shard[-4 - 16 * chunks : -4], "<u8").reshape(-1, 2)
        present = index[index[:, 0] != 2**64 - 1]
        if int(present[:, 1].sum()) + 16 * chunks + 4 == len(shard) and not present[0, 0]:
            return b"".join(shard[a : a + n - 4] for a, n in present.tolist()) + index.tobytes()
    raise AssertionError("no index at the end")


@pytest.mark.parametrize("name", ["token_id", "position", "patch_row", "image"])
def test_id_follows_from_every_stored_value(tmp_path: Path, store: ActivationStore, name: str) -> None:
    spec, plan = make_spec(), make_plan(LENGTHS)
    writer = StoreWriter(tmp_path / "other", spec, plan)
    for unit in range(3):
        data = unit_data(LENGTHS, plan.samples(unit), spec)
        column = getattr(data.tokens, name).clone()
        column[3] += unit == 1
        writer.commit(unit, replace(data, tokens=replace(data.tokens, **{name: column})))
    assert writer.finalize() != store.id


def test_id_follows_from_every_activation(tmp_path: Path, store: ActivationStore) -> None:
    """Swaps two values of a channel, which leaves its moments unchanged."""
    spec, plan = make_spec(), make_plan(LENGTHS)
    writer = StoreWriter(tmp_path / "other", spec, plan)
    for unit in range(3):
        data = unit_data(LENGTHS, plan.samples(unit), spec)
        acts = data.acts["lm"].clone()
        if unit == 1:
            acts[[3, 4]] = acts[[4, 3]]
        writer.commit(unit, replace(data, acts={"lm": acts}))
    assert writer.finalize() != store.id


def test_partial_files_and_whole_shards_of_a_killed_worker_do_no_harm(tmp_path: Path) -> None:
    expected = make_store(tmp_path / "expected", LENGTHS)
    spec, plan, root = make_spec(), make_plan(LENGTHS), tmp_path / "store"
    writer = StoreWriter(root, spec, plan)
    assert writer.commit(1, unit_data(LENGTHS, plan.samples(1), spec))
    with pytest.raises(StoreError, match="2 units are not captured, first 0"):
        writer.finalize()
    with pytest.raises(StoreError, match=r"has not finished \(no manifest\.json\)"):
        open_store(root)
    whole = "data.zarr/acts/lm/c/2/0/0"
    partial = ["data.zarr/acts/lm/c/0/0/.0.ab12.partial", "units/commits/.000000.json.ab12.partial"]
    for key in (whole, *partial):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes((Path(expected.location) / whole).read_bytes() if key == whole else b"torn")
    resumed = StoreWriter(root, spec, plan)
    assert resumed.pending() == [0, 2]
    for unit in resumed.pending():
        resumed.commit(unit, unit_data(LENGTHS, plan.samples(unit), spec))
    assert resumed.finalize() == expected.id
    assert {key: text for key, text in tree(root).items() if key not in partial} == tree(expected.location)


@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16", "int8"])
def test_second_owner_of_a_unit_agrees_with_the_first_about_every_file(tmp_path: Path, store_dtype: str) -> None:
    """Two machines differ in the last bits; the first one to write the activations decides for both."""
    spec, plan = make_spec(store_dtype=store_dtype), make_plan(LENGTHS)
    data = [unit_data(LENGTHS, plan.samples(unit), spec) for unit in range(3)]
    one, other = (StoreWriter(tmp_path / "store", spec, plan) for _ in range(2))
    if not one.calibrated:
        one.calibrate(data[0].acts)
    assert one.commit(0, data[0])
    before = tree(tmp_path / "store")
    nudged = replace(data[0], acts={"lm": data[0].acts["lm"] * 1.01})
    assert not other.commit(0, nudged), "the first owner's record is kept"
    assert tree(tmp_path / "store") == before
    # The first worker, killed between its files and its record, leaves files that the second one keeps.
    (tmp_path / "store/units/commits/000000.json").unlink()
    assert other.commit(0, nudged)
    after = tree(tmp_path / "store")
    assert after.keys() == before.keys()
    values = [key for key in before if "stats" not in key and "commits" not in key]
    assert {key: after[key] for key in values} == {key: before[key] for key in values}
    for unit in (1, 2):
        other.commit(unit, data[unit])
    other.finalize()
    store = open_store(tmp_path / "store")
    torch.testing.assert_close(store.read_unit(0, store.sites), store_values(store, data[0]))


def store_values(store: ActivationStore, data: UnitData) -> Tensor:
    acts = data.acts["lm"]
    if store.spec.store_dtype != "int8":
        return acts.to(store.stored_dtype)
    standardiser = store.standardiser("lm")
    scales = standardiser.scales(acts)
    return standardiser.restore(standardiser.quantise(acts, scales), scales)


def test_whole_shards_of_another_capture_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    spec, plan = make_spec(), make_plan(LENGTHS)
    data = unit_data(LENGTHS, plan.samples(0), spec)
    writer = StoreWriter(tmp_path / "store", spec, plan)
    writer.commit(0, data)
    (tmp_path / "store/units/commits/000000.json").unlink()
    other = replace(data, tokens=replace(data.tokens, token_id=data.tokens.token_id + 1))
    with pytest.raises(StoreError, match="tokens/token_id/c/0: belongs to another capture; run 'clt store gc'"):
        writer.commit(0, other)
    assert writer.pending() == [0, 1, 2]


def test_folder_of_something_else_is_not_touched(tmp_path: Path, store: ActivationStore) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and holds no store"):
        StoreWriter(tmp_path, make_spec(), make_plan(LENGTHS))
    before = tree(store.location)
    for changes, message in (
        ({"model": identity(fingerprint="0" * 64)}, "holds a store with fingerprint='fff"),
        ({"seed": 5}, "seed=0, this capture has 5"),
        ({"store_dtype": "bfloat16"}, "store_dtype='float32', this capture has 'bfloat16'"),
        ({"groups": TWO_GROUPS}, "holds a store with groups="),
        ({"chunk_tokens": 32}, "chunk_tokens=16, this capture has 32"),
    ):
        with pytest.raises(StoreError, match=message):
            StoreWriter(store.location, make_spec(**changes), make_plan(LENGTHS))
    with pytest.raises(StoreError, match="another plan of units"):
        StoreWriter(store.location, make_spec(), make_plan(LENGTHS[:-1]))
    StoreWriter(store.location, make_spec(model=replace(identity(), name="elsewhere")), make_plan(LENGTHS))
    assert tree(store.location) == before
