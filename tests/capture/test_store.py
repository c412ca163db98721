"""The store: exact values, exact statistics, all-or-nothing units, and damage that is always noticed."""

from __future__ import annotations

import json
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
import zarr

from clt.capture.order import unit_permutation
from clt.capture.shard import unit_files
from clt.capture.store import ActivationStore, open_store
from clt.capture.writer import StoreWriter
from clt.errors import StoreError
from clt.records import Modality

from .conftest import identity, make_plan, make_spec, make_store, unit_data

LENGTHS = [20, 30, 13, 40, 24, 5]


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make_store(tmp_path / "store", LENGTHS)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_rows_come_back_in_stored_order_with_their_tokens(store: ActivationStore) -> None:
    spec = store.spec
    assert [u.n_tokens for u in store.units] == [63, 64, 5]
    assert store.num_tokens == sum(LENGTHS)
    plan = make_plan(LENGTHS)
    for unit in range(3):
        n = store.units[unit].n_tokens
        data = unit_data(LENGTHS, plan.samples(unit), spec)
        order = store.natural_index(unit)
        assert sorted(order.tolist()) == list(range(n))
        assert torch.equal(order, torch.from_numpy(unit_permutation(n, spec.seed, unit)))
        assert torch.equal(store.read(unit, 0, n, store.sites), data.acts[order])
        assert torch.equal(store.tokens(unit).token_id, data.tokens.token_id[order])
        assert torch.equal(store.modality(unit), data.tokens.modality[order])
    assert not torch.equal(store.natural_index(0), torch.arange(63)), "rows are permuted"


def test_part_of_the_rows_and_any_choice_of_sites_can_be_read(store: ActivationStore) -> None:
    whole = store.read(0, 0, 63, store.sites)
    chosen = ["lm.1.mlp_out", "lm.0.resid_mid", "lm.1.resid_mid"]
    assert torch.equal(store.read(0, 10, 40, chosen), whole[10:40, [3, 0, 1]])
    with pytest.raises(StoreError, match=r"site 'lm\.0\.mlp_in' is not stored; it holds lm\.0\.resid_mid"):
        store.read(0, 0, 1, ["lm.0.mlp_in"])


def test_bfloat16_bits_survive(tmp_path: Path) -> None:
    lengths, spec = [40], make_spec(store_dtype="bfloat16")
    data = unit_data(lengths, range(1), spec)
    bits = torch.arange(0, 2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = bits[bits.isfinite()]
    index = torch.linspace(0, len(finite) - 1, data.acts.numel()).long()
    data.acts.copy_(finite[index].view(data.acts.shape))
    data.acts.view(-1)[-3:] = torch.tensor([-0.0, 0.0, -1e-40])  # signed zeros and a subnormal
    writer = StoreWriter(tmp_path / "store", spec, make_plan(lengths))
    writer.commit(0, data)
    writer.finalize()
    store = open_store(tmp_path / "store")
    found = store.read(0, 0, 40, store.sites)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.view(torch.uint16), data.acts[store.natural_index(0)].view(torch.uint16))
    array = zarr.open_array(tmp_path / "store/data.zarr/acts/lm", mode="r")
    assert (array.dtype, array.attrs["logical_dtype"]) == (np.uint16, "bfloat16")


def test_arrays_are_plain_sharded_zarr(store: ActivationStore) -> None:
    group = zarr.open_group(store.path / "data.zarr", mode="r")
    acts = group["acts/lm"]
    assert isinstance(acts, zarr.Array)
    assert (acts.shape, acts.shards, acts.chunks) == ((3 * 64, 4, 4), (64, 4, 4), (16, 1, 4))
    metadata = json.loads((store.path / "data.zarr/acts/lm/zarr.json").read_text())
    (sharding,) = metadata["codecs"]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert metadata["dimension_names"] == ["token", "site", "channel"]
    assert metadata["attributes"]["sites"] == list(store.sites)
    assert set(group["tokens"].array_keys()) == {  # type: ignore[union-attr]
        *("sample", "position", "token_id", "modality"),
        *("patch_row", "patch_col", "image", "natural_index"),
    }
    # The last unit has 5 of 64 rows: three of its four chunks per site are left out.
    sizes = [(store.path / unit_files(unit)[0]).stat().st_size for unit in range(3)]
    assert sizes[2] < sizes[1] / 2


@pytest.mark.parametrize("drop_bos", [False, True])
def test_stats_are_the_moments_of_the_stored_values(tmp_path: Path, drop_bos: bool) -> None:
    store = make_store(tmp_path / "store", LENGTHS, store_dtype="bfloat16")
    sites = ["lm.1.mlp_out", "lm.0.resid_mid"]
    rows = torch.cat([store.read(u.unit, 0, u.n_tokens, sites) for u in store.units]).double()
    if drop_bos:
        rows = rows[torch.cat([store.modality(u.unit) for u in store.units]) != Modality.BOS]
    stats = store.stats(sites, drop_bos)
    assert stats.count == len(rows) == sum(LENGTHS) - (len(LENGTHS) if drop_bos else 0)
    assert stats.mean.dtype == stats.rms.dtype == torch.float64
    # float64 rounding of two different orders of summation
    torch.testing.assert_close(stats.mean, rows.mean(0), atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(stats.rms, (rows - rows.mean(0)).square().mean((0, 2)).sqrt(), atol=1e-13, rtol=1e-13)


def test_stats_of_a_unit_of_bos_tokens_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [1, 1], rows_per_unit=16)
    stats = store.stats(store.sites, drop_bos=True)
    assert stats.count == 0
    assert torch.isfinite(stats.mean).all() and torch.isfinite(stats.rms).all()


def test_same_data_makes_the_same_bytes_and_id(tmp_path: Path, store: ActivationStore) -> None:
    again = make_store(tmp_path / "again", LENGTHS)
    assert again.id == store.id
    assert tree(again.path) == tree(store.path)
    other = make_store(tmp_path / "other", LENGTHS, seed=1)
    assert other.id != store.id


def test_commit_records_hold_size_and_checksum_of_every_file(store: ActivationStore) -> None:
    recorded = set()
    for unit in range(3):
        commit = json.loads((store.path / f"units/commits/{unit:06d}.json").read_text())
        for file in commit["files"]:
            contents = (store.path / file["path"]).read_bytes()
            assert (file["bytes"], file["crc32c"]) == (len(contents), google_crc32c.value(contents))
            recorded.add(file["path"])
    assert recorded == {path for path in tree(store.path) if "/c/" in path or path.startswith("units/stats")}


def test_uncommitted_unit_is_captured_again_over_its_remains(tmp_path: Path) -> None:
    spec, plan = make_spec(), make_plan(LENGTHS)
    expected = make_store(tmp_path / "expected", LENGTHS)
    root = tmp_path / "store"
    writer = StoreWriter(root, spec, plan)
    writer.commit(1, unit_data(LENGTHS, plan.samples(1), spec))
    with pytest.raises(StoreError, match="2 units are not captured, first 0"):
        writer.finalize()
    with pytest.raises(StoreError, match=r"has not finished \(no manifest\.json\)"):
        open_store(root)
    for remains in ("data.zarr/acts/lm/c/0/0/0", "data.zarr/acts/lm/c/2/0/0.ab12.partial"):
        (root / remains).parent.mkdir(parents=True)
        (root / remains).write_bytes(b"torn")
    for remains in ("data.zarr/tokens/image/c/2.ab12.partial", ".store.json.partial", "data.zarr/zarr.ab12.partial"):
        (root / remains).parent.mkdir(parents=True, exist_ok=True)
        (root / remains).write_bytes(b"torn")
    (root / ".store.json.partial").unlink()
    resumed = StoreWriter(root, spec, plan)
    assert resumed.pending() == [0, 2]
    for unit in resumed.pending():
        resumed.commit(unit, unit_data(LENGTHS, plan.samples(unit), spec))
    assert resumed.finalize() == expected.id
    assert tree(root) == tree(expected.path)


def test_damage_before_the_end_tells_how_to_capture_the_unit_again(tmp_path: Path) -> None:
    expected = make_store(tmp_path / "expected", LENGTHS)
    spec, plan = make_spec(), make_plan(LENGTHS)
    writer = StoreWriter(tmp_path / "store", spec, plan)
    for unit in writer.pending():
        writer.commit(unit, unit_data(LENGTHS, plan.samples(unit), spec))
    (writer.root / unit_files(1)[0]).unlink()
    commit = writer.root / "units/commits/000001.json"
    with pytest.raises(StoreError, match=f"c/1/0/0: missing .*to capture unit 1 again, delete {commit} first"):
        writer.finalize()
    commit.unlink()
    writer.commit(1, unit_data(LENGTHS, plan.samples(1), spec))
    assert writer.finalize() == expected.id


def test_failed_write_leaves_nothing_of_the_unit(tmp_path: Path) -> None:
    spec, plan = make_spec(), make_plan(LENGTHS)
    writer = StoreWriter(tmp_path / "store", spec, plan)
    before = set(tree(writer.root))
    data = unit_data(LENGTHS, plan.samples(0), spec)
    with pytest.raises(StoreError, match="all activations of unit 0 are zero"):
        writer.commit(0, type(data)(**{**vars(data), "acts": torch.zeros_like(data.acts)}))
    assert set(tree(writer.root)) == before
    assert writer.pending() == [0, 1, 2]


def test_folder_of_something_else_is_not_touched(tmp_path: Path, store: ActivationStore) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and holds no store"):
        StoreWriter(tmp_path, make_spec(), make_plan(LENGTHS))
    before = tree(store.path)
    with pytest.raises(StoreError, match="holds a store with fingerprint='fff"):
        StoreWriter(store.path, make_spec(model=identity(fingerprint="0" * 64)), make_plan(LENGTHS))
    with pytest.raises(StoreError, match="seed=0, this capture has 5"):
        StoreWriter(store.path, make_spec(seed=5), make_plan(LENGTHS))
    with pytest.raises(StoreError, match="another plan of units"):
        StoreWriter(store.path, make_spec(), make_plan(LENGTHS[:-1]))
    assert tree(store.path) == before


def test_opening_what_is_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no activation store here"):
        open_store(tmp_path / "missing")
    with pytest.raises(StoreError, match="no activation store here"):
        open_store(tmp_path)


COMMITTED = ["data.zarr/acts/lm/c/1/0/0", "data.zarr/tokens/modality/c/0", "units/stats/000002.safetensors"]


@pytest.mark.parametrize("path", [*COMMITTED, "data.zarr/acts/lm/zarr.json"])
def test_missing_or_truncated_file_is_noticed_at_opening(store: ActivationStore, path: str) -> None:
    file = store.path / path
    contents = file.read_bytes()
    file.write_bytes(contents[:-1])
    with pytest.raises(StoreError, match=rf"{path}: has {len(contents) - 1} bytes, expected {len(contents)}"):
        open_store(store.path)
    file.unlink()
    with pytest.raises(StoreError, match=f"{path}: missing from the store"):
        open_store(store.path)


def flip(file: Path, position: int) -> None:
    contents = bytearray(file.read_bytes())
    contents[position] ^= 16
    file.write_bytes(contents)


@pytest.mark.parametrize("position", [100, -3, -100], ids=["payload", "index checksum", "index"])
def test_flipped_bit_in_activations_is_noticed_when_read(store: ActivationStore, position: int) -> None:
    path = unit_files(1)[0]
    flip(store.path / path, position)
    damaged = open_store(store.path)
    damaged.read(0, 0, 63, damaged.sites)
    with pytest.raises(StoreError, match=f"{path}: cannot be read .*checksum"):
        damaged.read(1, 0, 64, damaged.sites)


def test_flipped_bit_elsewhere_is_noticed(store: ActivationStore) -> None:
    flip(store.path / "data.zarr/tokens/token_id/c/1", 10)
    flip(store.path / "units/stats/000002.safetensors", -5)
    damaged = open_store(store.path)
    with pytest.raises(StoreError, match="tokens/token_id/c/1: cannot be read"):
        damaged.tokens(1)
    with pytest.raises(StoreError, match=r"000002\.safetensors: checksum does not match"):
        damaged.stats(damaged.sites, False)
    flip(store.path / "data.zarr/acts/lm/zarr.json", 30)
    with pytest.raises(StoreError, match=r"acts/lm/zarr\.json: checksum does not match"):
        open_store(store.path)


def test_shard_deleted_after_opening_is_never_read_as_zeros(store: ActivationStore) -> None:
    (store.path / unit_files(0)[0]).unlink()
    with pytest.raises(StoreError, match="acts/lm/c/0/0/0: missing"):
        store.read(0, 0, 10, store.sites)


def test_damaged_or_foreign_manifest_is_an_error(store: ActivationStore) -> None:
    file = store.path / "manifest.json"
    text = file.read_text()
    manifest = json.loads(text)
    for changed, message in (
        (text[:-20], "not readable"),
        ("[]", "expected a JSON object"),
        (text.replace('"n_tokens": 63', '"n_tokens": 62'), "do not match the store's id"),
        (text.replace('"n_tokens": 63', '"n_tokens": "many"'), r"damaged at 'units\.0\.n_tokens'"),
        (json.dumps({**manifest, "spec": {**manifest["spec"], "schema_version": "2.0"}}), "store schema '2.0'"),
    ):
        file.write_text(changed)
        with pytest.raises(StoreError, match=message) as error:
            open_store(store.path)
        assert "manifest.json" in str(error.value) and "\n" not in str(error.value)
    file.write_text(json.dumps({**manifest, "from_the_future": 1}))
    assert open_store(store.path).id == store.id
