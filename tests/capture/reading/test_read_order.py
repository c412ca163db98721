"""The read order: each row once, the same batches for any number of ranks, direct access to any step, window sizes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.capture.reading.read_order import ReadOrder, Visit
from clt.capture.store.row_order import pack_units, permutation
from clt.errors import ConfigError

from .read_order_rows import rows_of_batch


def test_the_order_is_the_same_on_every_machine() -> None:
    # Fixed values: a change breaks the resume of every training run.
    assert permutation(8, seed=7, stream=(1, 2, 3, 4)).tolist() == [0, 1, 3, 7, 4, 6, 5, 2]
    order = ReadOrder([5, 0, 7, 3, 6], seed=1, epoch=2, batch_rows=4, window_rows=8)
    assert rows_of_batch(order, 1).tolist() == [[4, 3], [0, 1], [3, 2], [2, 2]]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 63, 64, 65, 1000])
def test_permutations_hold_each_number_once(n: int) -> None:
    assert sorted(permutation(n, 0, (0, 0, 0, 0)).tolist()) == list(range(n))


def test_permutations_of_other_names_and_seeds_differ() -> None:
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
    """Orders of ragged blocks, empty ones among them, and of equal blocks."""
    blocks = draw(
        st.lists(st.integers(0, 20), min_size=1, max_size=40)
        | st.builds(lambda rows, n: [rows] * n, st.sampled_from([4, 16]), st.integers(1, 64))
    )
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
    seen = np.concatenate([rows_of_batch(order, step) for step in range(order.steps)])
    assert len(seen) == order.steps * order.batch_rows == order.num_rows - order.dropped_rows
    assert len(np.unique(seen, axis=0)) == len(seen)
    assert order.dropped_rows < order.batch_rows


@settings(deadline=None)
@given(orders(), st.data())
def test_ranks_joined_in_order_read_the_batch_of_one_rank(order: ReadOrder, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, order.steps - 1))
    for world in (1, 2, 4, 8):
        if order.streams % world == 0:
            joined = np.concatenate([rows_of_batch(order, step, rank, world) for rank in range(world)])
            assert np.array_equal(joined, rows_of_batch(order, step))


def rows_of(order: ReadOrder, visit: Visit) -> list[list[int]]:
    segments = order.window_segments(visit.stream, visit.window)
    line = [[block, row] for block, first, stop in segments for row in range(first, stop)]
    picks = order.window_permutation(visit.stream, visit.window)[visit.first : visit.stop]
    return [line[pick] for pick in picks.tolist()]


@settings(deadline=None)
@given(orders(), st.data())
def test_visits_come_in_the_order_in_which_the_batches_need_them(order: ReadOrder, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, order.steps))
    world = data.draw(st.sampled_from([w for w in (1, 2, 4) if order.streams % w == 0]))
    rank = data.draw(st.integers(0, world - 1))
    streams = order.streams_of(rank, world)
    visits = order.visits(streams, first)
    held: dict[int, list[list[int]]] = {stream: [] for stream in streams}
    for step in range(first, order.steps):
        batch = []
        for stream in streams:
            while len(held[stream]) < order.share:
                visit = next(visits)
                assert visit.stream == stream, "the next visit is the one needed next"
                held[stream] += rows_of(order, visit)
            batch += held[stream][: order.share]
            del held[stream][: order.share]
        assert batch == rows_of_batch(order, step, rank, world).tolist()
    assert next(visits, None) is None
    assert not any(held.values()), "an epoch ends with every window used up"


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=4, max_size=40), st.sampled_from([1, 2, 4]), st.integers(1, 300))
def test_windows_are_no_larger_than_asked_or_hold_one_block(blocks: list[int], batch: int, window_rows: int) -> None:
    order = ReadOrder(blocks, seed=0, epoch=0, batch_rows=batch, window_rows=window_rows)
    for visit in order.visits(range(order.streams)):
        assert 0 <= visit.first < visit.stop <= visit.window.stop - visit.window.start
        sizes = [stop - first for _, first, stop in order.window_segments(visit.stream, visit.window)]
        assert all(sizes)
        assert sum(sizes) == visit.window.stop - visit.window.start
        assert sum(sizes[:-1]) < order.window_rows
        assert len(sizes) == 1 or sum(sizes) * order.streams <= window_rows


@settings(deadline=None)
@given(orders())
def test_an_epoch_reads_few_blocks_twice(order: ReadOrder) -> None:
    visits = order.visits(range(order.streams))
    read = Counter(block for v in visits for block, _, _ in order.window_segments(v.stream, v.window))
    # Twice where two parts share a block, and where a stream returns to the window in which it began.
    first_windows = sum(len(order.window_segments(v, order.window_at(v, 0))) for v in range(order.streams))
    assert sum(read.values()) <= len(read) + order.streams + first_windows


def test_orders_of_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> np.ndarray:
        return rows_of_batch(ReadOrder([16] * 50, seed=seed, epoch=epoch, batch_rows=64, window_rows=256), 0)

    assert np.array_equal(first(1, 0), first(1, 0))
    assert not np.array_equal(first(1, 0), first(1, 1))
    assert not np.array_equal(first(1, 0), first(2, 0))


def test_a_batch_mixes_the_whole_window() -> None:
    order = ReadOrder([64] * 500, seed=0, epoch=0, batch_rows=256, window_rows=64 * 64)
    blocks = np.unique(rows_of_batch(order, order.steps // 2)[:, 0])
    assert len(blocks) >= 64, "one block at least for each of 64 streams"


@pytest.mark.parametrize("window_blocks", [1, 4])
@pytest.mark.parametrize("last_block", [512, 100])
def test_streams_come_to_new_windows_at_different_steps(window_blocks: int, last_block: int) -> None:
    # Otherwise equal blocks in equal parts would end together, with an idle disk in between.
    order = ReadOrder(
        [512] * 2047 + [last_block], seed=0, epoch=0, batch_rows=1024, window_rows=64 * 512 * window_blocks
    )
    taken, entered = Counter[int](), Counter[int]()
    for visit in order.visits(range(64)):
        entered[taken[visit.stream] // order.share] += 1
        taken[visit.stream] += visit.stop - visit.first
    later = [entered[step] for step in range(1, order.steps)]
    assert max(later) <= 2 * sum(later) / len(later) + 3


def test_million_blocks_are_planned_at_once_and_reached_anywhere() -> None:
    order = ReadOrder(np.full(1_000_000, 512), seed=0, epoch=0, batch_rows=8192, window_rows=65_536)
    assert rows_of_batch(order, order.steps - 1, 3, 8).shape == (1024, 2)
    assert len(list(order.visits(range(64), order.steps - 1))) >= 64
