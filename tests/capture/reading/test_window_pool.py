"""The pool returns exactly the rows of the read order, for any sizes of blocks, windows and slots."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.reading.batch_buffers import BufferSizes, Recycler
from clt.capture.reading.blocks import BlockSource
from clt.capture.reading.read_order import ReadOrder
from clt.capture.reading.window_pool import GatheredRows, WindowPool, WindowRead, pool_bytes
from clt.capture.store.arrays import TOKEN_DTYPES
from clt.capture.store.quantise import Standardiser
from clt.errors import StoreError

from .read_order_rows import rows_of_batch

SITES, WIDTH = 3, 8


class Numbered:
    """Blocks in memory whose values and tokens encode block, row and site; a `BlockSource`."""

    def __init__(self, used: list[NDArray[np.bool_]], dtype: torch.dtype = torch.float32) -> None:
        self._used = used
        self.rows = np.array([mask.sum() for mask in used], dtype=np.int64)
        self.chunk_tokens = max(len(mask) for mask in used) + 1
        self.n_sites, self.width, self.dtype = SITES, WIDTH, dtype
        self.standardiser = None
        if dtype == torch.int8:
            generator = torch.Generator().manual_seed(0)
            mean, std = torch.randn(2, SITES, WIDTH, generator=generator)
            self.standardiser = Standardiser(mean=mean, std=std.abs() + 0.1)
        self.broken: int | None = None

    def kept(self, block: int) -> NDArray[np.int64] | None:
        mask = self._used[block]
        return None if mask.all() else np.flatnonzero(mask)

    def read_into(self, block: int, acts: NDArray[Any], scales: NDArray[np.float32] | None) -> None:
        if block == self.broken:
            raise StoreError(f"block {block} is damaged")
        assert acts.shape == (SITES, self.chunk_tokens, WIDTH) and all(site.flags.c_contiguous for site in acts)
        acts[...] = 0
        acts[:, : len(self._used[block])] = self.stored(block)
        if scales is not None:
            scales[...] = 0
            scales[:, : len(self._used[block])] = self.scales(block)

    def tokens(self, block: int) -> Mapping[str, NDArray[Any]]:
        rows = np.arange(len(self._used[block]))
        columns = {name: rows.astype(dtype) for name, dtype in TOKEN_DTYPES.items()}
        return {**columns, "sample": np.full(len(rows), block, dtype=np.int64)}

    def stored(self, block: int) -> NDArray[Any]:
        """[S,rows,D] stored bits: any pattern, NaN, negative zeros and subnormals among them."""
        bits = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8}[self.dtype]
        words = np.random.default_rng(block).integers(0, 2**16, (SITES, len(self._used[block]), WIDTH))
        return words.astype(bits)

    def scales(self, block: int) -> NDArray[np.float32]:
        return np.random.default_rng(block).random((SITES, len(self._used[block])), dtype=np.float32)

    def values(self, block: int) -> Tensor:
        """[S,rows,D] values of the stored bits."""
        stored = torch.from_numpy(self.stored(block)).view(self.dtype)
        if self.standardiser is None:
            return stored
        scales = torch.from_numpy(self.scales(block))[:, :, None]
        return stored * scales * self.standardiser.std[:, None] + self.standardiser.mean[:, None]


def readings(order: ReadOrder, streams: range, first_step: int = 0) -> Iterator[WindowRead]:
    for visit in order.visits(streams, first_step):
        picks = order.window_permutation(visit.stream, visit.window)[visit.first : visit.stop]
        segments = order.window_segments(visit.stream, visit.window)
        yield WindowRead(stream=visit.stream, segments=segments, picks=partial(np.array, picks))


def deliver(
    source: BlockSource,
    order: ReadOrder,
    *,
    rank: int = 0,
    world: int = 1,
    spare: int = 1,
    threads: int = 2,
    first_step: int = 0,
    widen: bool = True,
) -> list[GatheredRows]:
    """Batches of an epoch; all are kept referenced, so that an overwritten one would be detected."""
    streams = order.streams_of(rank, world)
    sizes = BufferSizes(
        slots=len(streams) + spare,
        slot_rows=order.window_rows - 1 + source.chunk_tokens,
        batch_rows=order.batch_rows // world,
        batches=3,
        widen=widen,
    )
    with closing(WindowPool(source, sizes, readings(order, streams, first_step), threads)) as pool:
        return [pool.batch((stream, order.share) for stream in streams) for _ in range(first_step, order.steps)]


def check(source: Numbered, rows: GatheredRows, expected: NDArray[np.int64]) -> None:
    """Asserts that each row of a batch holds the values and tokens of the expected (block, passing row)."""
    named = [(int(block), int(np.flatnonzero(source._used[block])[row])) for block, row in expected]
    assert list(zip(rows.tokens.sample.tolist(), rows.tokens.position.tolist(), strict=True)) == named
    assert rows.tokens.patch_row.dtype == torch.int16
    values = torch.stack([source.values(block)[:, row] for block, row in named], dim=1)
    assert_same_bits(rows.acts, values.to(rows.acts.dtype))


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    assert torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


@st.composite
def sources(draw: st.DrawFn) -> Numbered:
    """Ragged blocks of which any rows are used, at least one in all."""
    blocks = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=30))
    blocks[0][0] = True
    return Numbered([np.array(block) for block in blocks], draw(st.sampled_from([torch.float32, torch.bfloat16])))


@settings(deadline=None)
@given(sources(), st.data())
def test_batches_follow_the_read_order(source: Numbered, data: st.DataObject) -> None:
    total = int(source.rows.sum())
    batch = data.draw(st.sampled_from([b for b in (1, 2, 4, 12, 16, 64, 96) if b <= total]))
    order = ReadOrder(
        source.rows, seed=data.draw(st.integers(0, 5)), epoch=0, batch_rows=batch,
        window_rows=data.draw(st.sampled_from([1, 20, 100, 1000])),
    )  # fmt: skip
    world = data.draw(st.sampled_from([w for w in (1, 2, 4) if order.streams % w == 0]))
    rank = data.draw(st.integers(0, world - 1))
    first = data.draw(st.integers(0, order.steps - 1))
    batches = deliver(
        source,
        order,
        rank=rank,
        world=world,
        spare=data.draw(st.integers(0, 3)),
        threads=data.draw(st.integers(1, 3)),
        first_step=first,
    )
    for step, rows in enumerate(batches, start=first):
        check(source, rows, rows_of_batch(order, step, rank, world))


@pytest.mark.parametrize("spare", [0, 1, 5])
@pytest.mark.parametrize(
    ("blocks", "batch", "window"),
    [
        ([1] * 200, 64, 1),  # windows of a single row
        ([2, 1] * 100, 50, 4),  # a step takes many windows of each stream
        ([300], 64, 1),  # one block for all streams
        ([0, 40, 0, 0, 40, 1], 80, 10**6),  # one window for the epoch
    ],
)
def test_pool_never_locks_up(blocks: list[int], batch: int, window: int, spare: int) -> None:
    source = Numbered([np.ones(max(n, 1), np.bool_) if n else np.zeros(3, np.bool_) for n in blocks])
    order = ReadOrder(source.rows, seed=0, epoch=0, batch_rows=batch, window_rows=window)
    for step, rows in enumerate(deliver(source, order, spare=spare)):
        check(source, rows, rows_of_batch(order, step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("widen", [False, True])
def test_every_stored_type_is_delivered_exactly(dtype: torch.dtype, widen: bool) -> None:
    used = [np.random.default_rng(i).random(40) < 0.7 for i in range(20)]
    source = Numbered(used, dtype)
    order = ReadOrder(source.rows, seed=0, epoch=0, batch_rows=32, window_rows=200)
    batches = deliver(source, order, widen=widen)
    kept = dtype == torch.bfloat16 and not widen
    assert batches[0].acts.dtype == (torch.bfloat16 if kept else torch.float32)
    for step, rows in enumerate(batches):
        check(source, rows, rows_of_batch(order, step))


def test_damaged_block_ends_the_stream_where_it_is_needed() -> None:
    source = Numbered([np.ones(16, np.bool_) for _ in range(50)])
    order = ReadOrder(source.rows, seed=0, epoch=0, batch_rows=16, window_rows=64)
    source.broken = int(rows_of_batch(order, order.steps - 1)[0, 0])
    with pytest.raises(StoreError, match=f"block {source.broken} is damaged"):
        deliver(source, order)
    assert not [t for t in threading.enumerate() if t.name.startswith("activation-reader")]


def test_pool_takes_the_memory_it_states() -> None:
    source = Numbered([np.ones(15, np.bool_) for _ in range(9)], torch.bfloat16)
    sizes = BufferSizes(slots=6, slot_rows=36, batch_rows=8, batches=3, widen=True)
    rows, row = 6 * 36, SITES * WIDTH * 2
    tokens = 8 + 4 + 4 + 1 + 2 + 2 + 2
    assert pool_bytes(source, sizes) == rows * (row + tokens) + 8 * (row + 3 * 2 * row)


def test_recycler_gives_an_array_again_only_when_no_tensor_refers_to_it() -> None:
    recycler = Recycler((4, 5), np.float32, most=2)

    def place(array: NDArray[Any]) -> int:
        return array.__array_interface__["data"][0]

    first = torch.from_numpy(recycler.take())
    view, address = first[1:, 2], first.data_ptr()
    del first
    as_array = view.view(-1).numpy()
    del view
    assert place(recycler.take()) != address, "an array made from a view of a tensor still refers to it"
    weight = torch.ones((), requires_grad=True)
    del as_array
    again = torch.from_numpy(recycler.take())
    assert again.data_ptr() == address
    product = weight * again
    del again
    assert place(recycler.take()) != address, "the graph of autograd still refers to it"
    del product
    assert place(recycler.take()) == address
    held = [torch.from_numpy(recycler.take()) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in held}) == 5, "more than are kept can be in use"
