"""The read order: each row once, the same batches for every number of ranks, and resumable at any step."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.capture.loader import ActivationLoader, iterate_store
from clt.capture.order import ReadOrder, pack_units, permutation
from clt.capture.shard import unit_files
from clt.capture.store import ActivationStore
from clt.errors import CheckpointError, ConfigError, StoreError
from clt.records import ActivationBatch, Modality

from .conftest import make_store

X, Y = ("lm.0.resid_mid", "lm.1.resid_mid"), ("lm.0.mlp_out", "lm.1.mlp_out")
LENGTHS = [int(n) for n in np.random.RandomState(0).randint(3, 40, size=40)]
TOTAL = sum(LENGTHS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("loader") / "store", LENGTHS, rows_per_unit=256)


def loader(store: ActivationStore, **changes: Any) -> ActivationLoader:
    arguments: dict[str, Any] = {"x_sites": X, "y_sites": Y, "batch_tokens": 32, "window_tokens": 200, "seed": 3}
    return ActivationLoader(store, **{**arguments, **changes})


def keys(batch: ActivationBatch) -> list[tuple[int, int]]:
    return list(zip(batch.tokens.sample.tolist(), batch.tokens.position.tolist(), strict=True))


def test_the_order_is_the_same_on_every_machine() -> None:
    # Written down once: a change here breaks the resume of every training run.
    assert permutation(8, seed=7, stream=(1, 2, 3, 4)).tolist() == [0, 1, 3, 7, 4, 6, 5, 2]
    assert sorted(permutation(1000, 0, (0, 0, 0, 0))) == list(range(1000))
    assert not np.array_equal(permutation(50, 0, (0, 1, 0, 0)), permutation(50, 0, (0, 0, 0, 1)))
    assert not np.array_equal(permutation(50, -1, (0, 0, 0, 0)), permutation(50, 1, (0, 0, 0, 0)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 90))
def test_packing_covers_all_samples_in_order_and_fills_units(lengths: list[int], rows: int) -> None:
    starts = pack_units(lengths, rows)
    assert (starts[0], starts[-1]) == (0, len(lengths))
    for first, stop in pairwise(starts):
        assert 0 < sum(lengths[first:stop]) <= rows
        if stop < len(lengths):
            assert sum(lengths[first : stop + 1]) > rows, "the next sample would not have fitted"


def test_sample_longer_than_a_unit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="sample 1 has 31 tokens, rows_per_unit=30; raise"):
        pack_units([5, 31], 30)


@st.composite
def orders(draw: st.DrawFn) -> ReadOrder:
    blocks = draw(st.lists(st.integers(0, 20), min_size=1, max_size=40))
    total = sum(blocks)
    batch = draw(st.sampled_from([1, 4, 8, 12, 64, 192]).filter(lambda b: b <= max(total, 1)))
    blocks[0] += max(0, batch - total)
    return ReadOrder(
        blocks, seed=draw(st.integers(0, 5)), epoch=draw(st.integers(0, 3)), batch_rows=batch,
        window_rows=draw(st.integers(1, 300)),
    )  # fmt: skip


@settings(deadline=None)
@given(orders())
def test_each_row_comes_at_most_once_and_few_are_left_out(order: ReadOrder) -> None:
    seen = np.concatenate([order.rows(step) for step in range(order.steps)])
    assert len(seen) == order.steps * order.batch_rows == order.num_rows - order.dropped_rows
    assert len(np.unique(seen, axis=0)) == len(seen)
    assert order.dropped_rows < order.batch_rows


@settings(deadline=None)
@given(orders(), st.data())
def test_ranks_joined_in_order_read_the_batch_of_one_rank(order: ReadOrder, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, order.steps - 1))
    for world in (1, 2, 4):
        if order.streams % world == 0:
            joined = np.concatenate([order.rows(step, rank, world) for rank in range(world)])
            assert np.array_equal(joined, order.rows(step))


def test_orders_of_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> np.ndarray:
        return ReadOrder([16] * 50, seed=seed, epoch=epoch, batch_rows=64, window_rows=256).rows(0)

    assert np.array_equal(first(1, 0), first(1, 0))
    assert not np.array_equal(first(1, 0), first(1, 1))
    assert not np.array_equal(first(1, 0), first(2, 0))


def test_a_batch_mixes_the_whole_window() -> None:
    order = ReadOrder([64] * 500, seed=0, epoch=0, batch_rows=256, window_rows=64 * 64)
    blocks = np.unique(order.rows(order.steps // 2)[:, 0])
    assert len(blocks) >= 64, "one block at least for each of 64 streams"


def test_million_blocks_are_planned_at_once_and_reached_anywhere() -> None:
    order = ReadOrder(np.full(1_000_000, 512), seed=0, epoch=0, batch_rows=8192, window_rows=65_536)
    assert order.rows(order.steps - 1, 3, 8).shape == (1024, 2)


def test_impossible_batches_and_worlds_are_errors(store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match=f"batch_tokens=1024 exceeds the {TOTAL} tokens"):
        loader(store, batch_tokens=1024)
    with pytest.raises(ConfigError, match="3 data ranks cannot share"):
        loader(store, data_world=3)
    with pytest.raises(ConfigError, match="batch_tokens=6 is read as 2 streams, which 4 data ranks"):
        loader(store, batch_tokens=6, data_world=4)
    with pytest.raises(StoreError, match=r"lm\.9\.mlp_out"):
        loader(store, y_sites=["lm.9.mlp_out"])


def test_batches_hold_the_values_that_their_tokens_name(store: ActivationStore) -> None:
    for batch in islice(loader(store), 5):
        assert batch.x.shape == batch.y.shape == (2, 32, 4)
        assert batch.x.dtype == batch.y.dtype == torch.float32
        for sites, tensor in ((X, batch.x), (Y, batch.y)):
            for i, site in enumerate(sites):
                assert torch.equal(tensor[i, :, 0], batch.tokens.sample + 1.0)
                assert torch.equal(tensor[i, :, 1], batch.tokens.position.float())
                assert (tensor[i, :, 2] == store.sites.index(site)).all()
        assert torch.equal(batch.tokens.token_id, (batch.tokens.sample * 7 + batch.tokens.position).int())


def test_an_epoch_reads_each_token_once(store: ActivationStore) -> None:
    one = loader(store)
    assert one.steps_per_epoch == TOTAL // 32
    assert one.dropped_tokens == TOTAL % 32
    batches = [keys(batch) for batch in islice(one, 2 * one.steps_per_epoch)]
    for epoch in (batches[: one.steps_per_epoch], batches[one.steps_per_epoch :]):
        seen = [key for batch in epoch for key in batch]
        assert len(set(seen)) == len(seen) == 32 * one.steps_per_epoch
    assert batches[0] != batches[one.steps_per_epoch]


@pytest.mark.parametrize("world", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(store: ActivationStore, world: int) -> None:
    steps = TOTAL // 32 + 3
    single = list(islice(loader(store), steps))
    ranks = [list(islice(loader(store, data_rank=r, data_world=world), steps)) for r in range(world)]
    for step, whole in enumerate(single):
        assert torch.equal(torch.cat([rank[step].x for rank in ranks], dim=1), whole.x)
        assert torch.equal(torch.cat([rank[step].y for rank in ranks], dim=1), whole.y)
        assert [key for rank in ranks for key in keys(rank[step])] == keys(whole)


def test_drop_bos_leaves_out_bos_and_nothing_else(store: ActivationStore) -> None:
    one = loader(store, drop_bos=True, batch_tokens=8)
    seen = [key for batch in islice(one, one.steps_per_epoch) for key in keys(batch)]
    assert all(position > 0 for _, position in seen)
    assert len(set(seen)) == len(seen)
    assert len(seen) + one.dropped_tokens == TOTAL - len(LENGTHS)


@pytest.mark.parametrize("taken", [0, 1, 7, TOTAL // 32, TOTAL // 32 + 2])
def test_resumed_stream_goes_on_exactly(store: ActivationStore, taken: int) -> None:
    original = loader(store)
    stream = iter(original)
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(original.state_dict()))
    assert all(isinstance(value, int | str) for value in state.values())
    expected = list(islice(stream, 4))
    resumed = loader(store)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for mine, theirs in zip(islice(resumed, 4), expected, strict=True):
        assert torch.equal(mine.x, theirs.x) and keys(mine) == keys(theirs)
    shared = loader(store, data_rank=1, data_world=2)
    shared.load_state_dict(state)
    assert keys(next(iter(shared))) == keys(expected[0])[16:]


def test_state_of_another_job_is_an_error(store: ActivationStore, tmp_path: Path) -> None:
    state = loader(store).state_dict()
    for change, key in (
        ({"seed": 4}, "seed"),
        ({"batch_tokens": 64}, "batch_tokens"),
        ({"drop_bos": True}, "drop_bos"),
    ):
        with pytest.raises(CheckpointError, match=f"loader state: {key} was"):
            loader(store, **change).load_state_dict(state)
    other = make_store(tmp_path / "other", LENGTHS, rows_per_unit=1024)
    with pytest.raises(CheckpointError, match="loader state: store was"):
        loader(other).load_state_dict(state)


def test_only_the_sites_asked_for_are_read(store: ActivationStore) -> None:
    batch = next(iter(loader(store, x_sites=[X[1]], y_sites=[])))
    assert (batch.x.shape, batch.y.shape) == ((1, 32, 4), (0, 32, 4))
    assert (batch.x[0, :, 2] == 1).all()


def test_error_in_the_background_is_raised_where_batches_are_taken(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS, rows_per_unit=1024)
    one = loader(store)
    for unit in store.units:
        (store.path / unit_files(unit.unit)[0]).unlink()
    with pytest.raises(StoreError, match="missing from the store"):
        next(iter(one))
    assert not [t for t in threading.enumerate() if t.name == "activation-loader"]


def test_background_thread_ends_with_the_iterator(store: ActivationStore) -> None:
    stream: Iterator[ActivationBatch] = iter(loader(store))
    next(stream)
    assert [t for t in threading.enumerate() if t.name == "activation-loader"]
    stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "activation-loader"]


@pytest.mark.parametrize("drop_bos", [False, True])
@pytest.mark.parametrize("batch_tokens", [7, 16, 100, 10_000])
def test_iterate_store_goes_through_everything_in_stored_order(
    store: ActivationStore, batch_tokens: int, drop_bos: bool
) -> None:
    expected = [
        (int(s), int(p))
        for unit in store.units
        for s, p in zip(store.tokens(unit.unit).sample, store.tokens(unit.unit).position, strict=True)
        if not (drop_bos and p == 0)
    ]
    batches = list(iterate_store(store, X, Y, batch_tokens, drop_bos=drop_bos))
    assert [key for batch in batches for key in keys(batch)] == expected
    assert all(len(keys(batch)) == batch_tokens for batch in batches[:-1])
    for batch in batches:
        assert torch.equal(batch.y[1, :, 0], batch.tokens.sample + 1.0)
        assert not (drop_bos and (batch.tokens.modality == Modality.BOS).any())
    some = list(iterate_store(store, X, Y, batch_tokens, drop_bos=drop_bos, max_tokens=50))
    assert [key for batch in some for key in keys(batch)] == expected[:50]


def test_bfloat16_store_reads_as_the_rounded_values(tmp_path: Path) -> None:
    exact = next(iter(loader(make_store(tmp_path / "exact", LENGTHS, rows_per_unit=1024))))
    rounded = next(iter(loader(make_store(tmp_path / "rounded", LENGTHS, rows_per_unit=1024, store_dtype="bfloat16"))))
    assert torch.equal(rounded.x, exact.x.bfloat16().float())
