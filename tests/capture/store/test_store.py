"""Reading a store: exact values and statistics, samples, groups of sites, filters."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_committed, open_store
from clt.capture.reading.token_filter import TokenFilter, token_counts
from clt.capture.store.row_order import unit_permutation
from clt.capture.store.schema import TOKEN_CLASSES, SiteGroup, StoreSpec
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.errors import StoreError
from clt.records import Modality

from ..stores import LENGTHS, SITES, TWO_GROUPS, make_plan, make_spec, make_store, unit_data


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make_store(tmp_path / "store", LENGTHS)


def expected_rows(store: ActivationStore, unit: int, group: str = "lm") -> Tensor:
    """Captured activations of a unit, in the stored order."""
    data = unit_data(LENGTHS, make_plan(LENGTHS, store.spec.rows_per_unit).samples(unit), store.spec)
    return data.acts[group][store.natural_index(unit)]


def test_repr_describes_the_store(store: ActivationStore) -> None:
    assert repr(store) == (
        f"ActivationStore(id={store.id[:12]}, model={store.model.name!r}, tokens=132, sites={len(store.sites)}, "
        f"dtype=float32, location={store.location!r})"
    )


def test_rows_come_back_in_stored_order_with_their_tokens(store: ActivationStore) -> None:
    assert [u.n_tokens for u in store.units] == [63, 64, 5]
    assert store.num_tokens == sum(LENGTHS)
    plan = make_plan(LENGTHS)
    for unit in range(3):
        n = store.units[unit].n_tokens
        data = unit_data(LENGTHS, plan.samples(unit), store.spec)
        order = store.natural_index(unit)
        assert sorted(order.tolist()) == list(range(n))
        assert torch.equal(order, torch.from_numpy(unit_permutation(n, store.spec.seed, unit)))
        assert torch.equal(store.read(unit, 0, n, store.sites), data.acts["lm"][order])
        assert torch.equal(store.read_unit(unit, store.sites), data.acts["lm"])
        for name, column in vars(store.tokens(unit)).items():
            assert torch.equal(column, getattr(data.tokens, name)[order])
        assert torch.equal(store.modality(unit), data.tokens.modality[order])
        # float32 rounding of the same float64 sum
        norms = data.acts["lm"].double().square().sum(-1).sqrt().float()[order]
        torch.testing.assert_close(store.norms(unit, "lm"), norms, rtol=2.0**-22, atol=0)
    assert not torch.equal(store.natural_index(0), torch.arange(63)), "rows are permuted"


def test_part_of_the_rows_and_any_choice_of_sites_can_be_read(store: ActivationStore) -> None:
    whole = store.read(0, 0, 63, store.sites)
    chosen = ["lm.1.mlp_out", "lm.0.resid_mid", "lm.1.resid_mid"]
    assert torch.equal(store.read(0, 10, 40, chosen), whole[10:40, [3, 0, 1]])
    assert torch.equal(store.read(0, 16, 32, chosen), whole[16:32, [3, 0, 1]])
    assert store.read(0, 63, 63, chosen).shape == (0, 3, 4)
    with pytest.raises(StoreError, match=r"site 'lm\.0\.mlp_in' is not stored; it holds lm\.0\.resid_mid"):
        store.read(0, 0, 1, ["lm.0.mlp_in"])


def test_blocks_end_in_zeros_where_the_unit_ends(store: ActivationStore) -> None:
    out = np.full((2, 16, 4), np.nan, np.float32)
    store.read_block_into(0, 3, "lm", [1, 3], out)
    assert np.array_equal(out[:, :15].swapaxes(0, 1), store.read(0, 48, 63, ["lm.1.resid_mid", "lm.1.mlp_out"]))
    assert not out[:, 15:].any()
    store.read_block_into(2, 1, "lm", [0, 1], out)
    assert not out.any(), "a block beyond the unit's last row"
    columns = store.token_block(0, 3)
    assert {len(column) for column in columns.values()} == {15}
    assert np.array_equal(columns["natural_index"], store.natural_index(0)[48:])


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_bfloat16_survives_bit_by_bit(tmp_path: Path, compression: str) -> None:
    """Negatives, both zeros, subnormals, infinities and every payload of NaN."""
    group = SiteGroup(name="lm", sites=SITES, width=256)
    spec = make_spec(store_dtype="bfloat16", compression=compression, groups=(group,))
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(64, 4, 256)
    found = round_trip(tmp_path / "store", spec, bits.view(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.view(torch.uint16), bits)


def test_float32_survives_bit_by_bit(tmp_path: Path) -> None:
    # Every sign, exponent and top of the mantissa, with a low end that no narrower type keeps.
    bits = (torch.arange(2**16, dtype=torch.int64) * 2**16 + 0x1235).to(torch.uint32).view(torch.int32)
    spec = make_spec(groups=(SiteGroup(name="lm", sites=SITES, width=256),))
    found = round_trip(tmp_path / "store", spec, bits.view(torch.float32).view(64, 4, 256))
    assert torch.equal(found.view(torch.int32).flatten(), bits)


def round_trip(path: Path, spec: StoreSpec, acts: Tensor) -> Tensor:
    """One unit of 64 tokens, written and read in natural order."""
    data = unit_data([64], range(1), replace(spec, groups=()))
    writer = StoreWriter(path, spec, make_plan([64]))
    assert writer.commit(0, replace(data, acts={"lm": acts}))
    writer.finalize()
    return open_store(path).read_unit(0, spec.sites)


def test_rounding_to_bfloat16_is_to_nearest_even(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS, store_dtype="bfloat16")
    for unit in range(3):
        assert torch.equal(
            store.read(unit, 0, store.units[unit].n_tokens, store.sites), expected_rows(store, unit).bfloat16()
        )
    error = store.manifest.quantisation["lm.0.resid_mid"]
    assert 0 < error.fvu < 2.0**-16, "half a unit in the last of 8 bits, squared, over a variance of the same size"


def test_site_groups_have_arrays_and_widths_of_their_own(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS, groups=TWO_GROUPS)
    assert store.sites == TWO_GROUPS[0].sites + TWO_GROUPS[1].sites
    for group in TWO_GROUPS:
        for unit in range(3):
            n = store.units[unit].n_tokens
            assert torch.equal(store.read(unit, 0, n, group.sites), expected_rows(store, unit, group.name))
            assert store.norms(unit, group.name).shape == (n, len(group.sites))
        assert store.stats(group.sites).mean.shape == (len(group.sites), group.width)
    assert store.place(["vision.2.resid_mid", "vision.0.resid_mid"]) == ("vision", [2, 0])
    with pytest.raises(StoreError, match="sites of groups lm and vision differ in width; read them apart"):
        store.read(0, 0, 1, ["lm.0.mlp_out", "vision.0.resid_mid"])


def all_rows(store: ActivationStore, sites: list[str]) -> tuple[Tensor, Tensor]:
    rows = torch.cat([store.read(u.unit, 0, u.n_tokens, sites) for u in store.units]).double()
    return rows, torch.cat([store.modality(u.unit) for u in store.units])


def mixed(data: UnitData) -> UnitData:
    """The same unit with tokens of every class, image tokens at their patches."""
    n = len(data.tokens.sample)
    kinds = torch.arange(n) % 5
    modality = torch.where(kinds < 2, data.tokens.modality, (kinds - 1).clamp(max=2).to(torch.uint8))
    patch = torch.where(modality == Modality.IMAGE, kinds, -1).short()
    image = torch.where((modality == Modality.IMAGE) | (modality == Modality.IMAGE_SPECIAL), 0, -1).short()
    tokens = replace(data.tokens, modality=modality, patch_row=patch, patch_col=patch, image=image)
    return replace(data, tokens=tokens)


def mixed_store(path: Path, **changes: object) -> ActivationStore:
    spec, plan = make_spec(**changes), make_plan(LENGTHS)
    writer = StoreWriter(path, spec, plan)
    for unit in range(plan.n_units):
        writer.commit(unit, mixed(unit_data(LENGTHS, plan.samples(unit), spec)))
    writer.finalize()
    return open_store(path)


@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
def test_stats_are_the_moments_of_the_stored_values_by_class(tmp_path: Path, store_dtype: str) -> None:
    store = mixed_store(tmp_path / "store", store_dtype=store_dtype)
    sites = ["lm.1.mlp_out", "lm.0.resid_mid"]
    rows, modality = all_rows(store, sites)
    moments = store.moments("lm").select([3, 0])
    # 1e-13: float64 rounding of two different orders of summation
    close = {"atol": 1e-13, "rtol": 1e-13}
    for number in range(len(TOKEN_CLASSES)):
        mine = rows[modality == number]
        assert moments.count[number] == len(mine) > 0
        torch.testing.assert_close(moments.mean[number], mine.mean(0), **close)
        torch.testing.assert_close(moments.m2[number], (mine - mine.mean(0)).square().sum(0), **close)
        torch.testing.assert_close(moments.norm[number], mine.square().sum(-1).sqrt().sum(0), **close)
        assert torch.equal(moments.absmax[number].double(), mine.abs().amax(0))
    others = rows[modality != Modality.BOS]
    torch.testing.assert_close(store.mean_norms("lm")[[3, 0]], others.square().sum(-1).sqrt().mean(0), **close)


@pytest.mark.parametrize(
    "where",
    [None, TokenFilter(drop_bos=True), TokenFilter(modalities=("image",)), TokenFilter(norm_cap=1.2)],
    ids=["all", "no bos", "image", "norm cap"],
)
def test_stats_follow_a_filter(tmp_path: Path, where: TokenFilter | None) -> None:
    store = mixed_store(tmp_path / "store")
    sites = ["lm.1.mlp_out", "lm.0.resid_mid"]
    rows, modality = all_rows(store, sites)
    if where is not None:
        keep = [(where.keep(store, unit.unit), unit.n_tokens) for unit in store.units]
        passing = torch.from_numpy(np.concatenate([np.ones(n, bool) if k is None else k for k, n in keep]))
        rows, modality = rows[passing], modality[passing]
        assert 0 < len(rows) < sum(LENGTHS)
    stats = store.stats(sites, where)
    assert stats.count == len(rows)
    expected = [int((modality == number).sum()) for number in range(4)]
    assert token_counts(store, where or TokenFilter()).tolist() == expected and sum(expected) == stats.count
    assert stats.mean.dtype == stats.rms.dtype == torch.float64
    # float64 rounding of two different orders of summation
    torch.testing.assert_close(stats.mean, rows.mean(0), atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(stats.rms, (rows - rows.mean(0)).square().mean((0, 2)).sqrt(), atol=1e-13, rtol=1e-13)


def test_stats_of_bos_tokens_alone_are_finite(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [1, 1], rows_per_unit=16)
    stats = store.stats(store.sites, TokenFilter(drop_bos=True))
    assert stats.count == 0
    assert torch.isfinite(stats.mean).all() and torch.isfinite(stats.rms).all()
    assert torch.equal(store.mean_norms("lm"), torch.zeros(4, dtype=torch.float64))


def test_samples_are_seen_in_the_order_of_the_prompt(store: ActivationStore) -> None:
    plan = make_plan(LENGTHS)
    for unit in range(3):
        data = unit_data(LENGTHS, plan.samples(unit), store.spec)
        begin = 0
        for sample, view in zip(plan.samples(unit), store.samples(unit, store.sites), strict=True):
            rows = slice(begin, begin + LENGTHS[sample])
            assert (view.sample, view.example_id) == (sample, f"sample-{sample}")
            assert torch.equal(view.acts, data.acts["lm"][rows].transpose(0, 1))
            for name, column in vars(view.tokens).items():
                assert torch.equal(column, getattr(data.tokens, name)[rows])
            begin += LENGTHS[sample]
    view = store.sample(3, ["lm.1.mlp_out"])
    assert view.tokens.position.tolist() == list(range(40))
    assert torch.equal(view.acts, store.sample("sample-3", ["lm.1.mlp_out"]).acts)
    with pytest.raises(StoreError, match="holds no sample 6; samples are numbered from 0"):
        store.sample(6, store.sites)


def test_store_survives_pickling_after_it_was_read(store: ActivationStore) -> None:
    rows = store.read(1, 0, 64, store.sites)
    again = pickle.loads(pickle.dumps(store))
    assert again.id == store.id
    assert torch.equal(again.read(1, 0, 64, again.sites), rows)


def test_committed_units_of_an_unfinished_store_can_be_read(tmp_path: Path, store: ActivationStore) -> None:
    spec, plan = make_spec(), make_plan(LENGTHS)
    writer = StoreWriter(tmp_path / "unfinished", spec, plan)
    with pytest.raises(StoreError, match="no unit is committed yet"):
        open_committed(tmp_path / "unfinished")
    for unit in (0, 1):
        writer.commit(unit, unit_data(LENGTHS, plan.samples(unit), spec))
    found = open_committed(tmp_path / "unfinished")
    assert [unit.unit for unit in found.units] == [0, 1]
    for unit in (0, 1):
        assert torch.equal(found.read_unit(unit, found.sites), store.read_unit(unit, store.sites))
    assert found.stats(found.sites).count == 63 + 64


def test_opening_a_folder_without_a_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no activation store here"):
        open_store(tmp_path / "missing")
    with pytest.raises(StoreError, match="no activation store here"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="no activation store here"):
        open_committed(tmp_path)
