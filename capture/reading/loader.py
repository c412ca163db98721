"""Shuffled, resumable batches of a store for training, the same for any number of ranks; and one pass in stored order.

`clt.capture.reading.read_order.ReadOrder` gives the order, `clt.capture.reading.window_pool` reads its windows ahead
and gathers batches. One background thread prefetches a few batches; its errors are raised where batches are consumed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.batch_buffers import BatchBuffers, BufferSizes
from clt.capture.reading.blocks import BlockSource, StoreBlocks
from clt.capture.reading.prefetch import prefetch
from clt.capture.reading.read_order import ReadOrder, Visit
from clt.capture.reading.token_filter import ALL_TOKENS, TokenFilter
from clt.capture.reading.window_pool import GatheredRows, WindowPool, WindowRead, pool_bytes
from clt.errors import CheckpointError, ConfigError
from clt.records import ActivationBatch

log = logging.getLogger(__name__)

#: Batches in use besides the prefetched ones: the current one, and the previous one until it is freed.
_BATCHES_IN_USE = 2
_MOST_READERS = 4
#: There are as many spare slots as windows while all slots fit into this, else a quarter as many.
_SMALL_POOL_BYTES = 2**30


class ActivationLoader:
    """Shuffled batches of a store, an endless iterator over epochs.

    The ranks' batches of a step, joined in rank order, are the batch that a single rank would read. An epoch reads each
    token once, except (tokens mod batch_tokens) dropped tokens, different ones each epoch. Threads and memory belong to
    iterators: a loader that is not being iterated can be pickled and forked.

    Args:
        store: the store.
        x_sites: sites of `ActivationBatch.x`; only these and `y_sites` are read.
        y_sites: sites of `ActivationBatch.y`.
        batch_tokens: tokens of a step over all ranks.
        window_tokens: most tokens shuffled together in memory, over all ranks; at least one block of chunk_tokens per
            stream, of which there are gcd(batch_tokens, 64).
        seed: random seed of the order.
        data_rank: rank on the data axis.
        data_world: ranks on the data axis, a divisor of gcd(batch_tokens, 64).
        where: token filter.
        device: device of `x` and `y`; tokens stay on the host.
        as_stored: return bfloat16 as stored instead of float32; int8 always becomes float32.
        reader_threads: reading threads; default: number of cores - 1, at most four.
        read_ahead: number of prefetched batches.

    Attributes:
        steps_per_epoch: steps of an epoch.
        dropped_tokens: tokens that pass `where` and are not read in an epoch.
        memory_bytes: memory of an iterator: window_tokens as stored, twice up to 1 GiB and else 1.25 times, one batch
            as stored, and read_ahead + 2 batches; plus the token columns that the loader keeps of a small store.

    Raises:
        StoreError: a site is not stored, or token tables cannot be read.
        ConfigError: fewer tokens than a batch pass the filter, or the ranks cannot share a batch evenly.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        x_sites: Sequence[str],
        y_sites: Sequence[str],
        batch_tokens: int,
        window_tokens: int,
        seed: int,
        data_rank: int = 0,
        data_world: int = 1,
        where: TokenFilter = ALL_TOKENS,
        device: torch.device | str = "cpu",
        as_stored: bool = False,
        reader_threads: int | None = None,
        read_ahead: int = 2,
    ) -> None:
        self._blocks = StoreBlocks(store, x_sites, y_sites, where)
        self._store_id, self._n_x, self._where = store.id, len(x_sites), where
        self._seed, self._batch_tokens, self._window_tokens = seed, batch_tokens, window_tokens
        self._device, self._read_ahead = torch.device(device), read_ahead
        self._reader_threads = reader_threads or max(1, min(len(os.sched_getaffinity(0)) - 1, _MOST_READERS))
        self._epoch = self._step = 0
        passing = int(self._blocks.rows.sum())
        if passing == 0:
            raise ConfigError(f"{store.location}: no token passes the filter ({where}); loosen it")
        order = self._order(0)
        self._streams, self._share = order.streams_of(data_rank, data_world), order.share
        self.steps_per_epoch: int = order.steps
        self.dropped_tokens: int = order.dropped_rows
        sizes = BufferSizes(
            slots=len(self._streams),
            slot_rows=order.window_rows - 1 + self._blocks.chunk_tokens,
            batch_rows=batch_tokens // data_world,
            batches=read_ahead + _BATCHES_IN_USE,
            widen=not as_stored,
        )
        self._sizes = _with_spare(sizes, self._blocks)
        self.memory_bytes: int = pool_bytes(self._blocks, self._sizes) + self._blocks.kept_bytes
        log.info(
            "loader: store=%s tokens=%d (of %d after filter %s) steps_per_epoch=%d batch_tokens=%d dropped_tokens=%d "
            "streams=%d (of %d) memory_gb=%.1f",
            store.location,
            passing,
            store.num_tokens,
            where,
            order.steps,
            batch_tokens,
            order.dropped_rows,
            len(self._streams),
            order.streams,
            self.memory_bytes / 1e9,
        )

    def __iter__(self) -> Iterator[ActivationBatch]:
        with closing(self._prefetched(self._epoch, self._step)) as stream:
            for epoch, step, rows in stream:
                last = step + 1 == self.steps_per_epoch
                self._epoch, self._step = (epoch + 1, 0) if last else (epoch, step + 1)
                yield self._batch(rows)

    def epoch(self, number: int, first_step: int = 0) -> Iterator[ActivationBatch]:
        """Batches of one epoch; leaves `state_dict` unchanged.

        Args:
            number: number of the epoch.
            first_step: first step within it.
        """
        with closing(self._prefetched(number, first_step, number + 1)) as stream:
            for _, _, rows in stream:
                yield self._batch(rows)

    def state_dict(self) -> dict[str, int | str]:
        """Position: the next batch is step `step` of epoch `epoch`; the other keys are checked on load."""
        return {"epoch": self._epoch, "step": self._step, **self._settings()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continues at the position of another loader; existing iterators are not affected.

        Args:
            state: `state_dict` of a loader of the same store and settings, with any number of ranks.

        Raises:
            CheckpointError: it is of another store or other settings.
        """
        require_same(state, self._settings())
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def _settings(self) -> dict[str, int | str]:
        return {
            "store": self._store_id,
            "seed": self._seed,
            "batch_tokens": self._batch_tokens,
            "window_tokens": self._window_tokens,
            "where": str(self._where),
        }

    def _order(self, epoch: int) -> ReadOrder:
        return ReadOrder(
            self._blocks.rows,
            seed=self._seed,
            epoch=epoch,
            batch_rows=self._batch_tokens,
            window_rows=self._window_tokens,
        )

    def _readings(self, epoch: int, step: int, stop: int | None) -> Iterator[WindowRead]:
        """Windows that the batches from a step on need, in that order."""
        while epoch != stop:
            order = self._order(epoch)
            for visit in order.visits(self._streams, step):
                yield WindowRead(
                    stream=visit.stream,
                    segments=order.window_segments(visit.stream, visit.window),
                    picks=partial(_picks, order, visit),
                )
            epoch, step = epoch + 1, 0

    def _prefetched(self, epoch: int, step: int, stop: int | None = None) -> Generator[tuple[int, int, GatheredRows]]:
        return prefetch(partial(self._batches, epoch, step, stop), self._read_ahead, "activation-loader")

    def _batches(self, epoch: int, step: int, stop: int | None) -> Generator[tuple[int, int, GatheredRows]]:
        """Batches with their epoch and step, up to an epoch or endlessly."""
        slots = _slots(self._blocks, self._sizes, self._device)
        readings = self._readings(epoch, step, stop)
        with closing(WindowPool(self._blocks, self._sizes, readings, self._reader_threads, slots)) as pool:
            while epoch != stop:
                for now in range(step, self.steps_per_epoch):
                    yield epoch, now, pool.batch((stream, self._share) for stream in self._streams)
                epoch, step = epoch + 1, 0

    def _batch(self, rows: GatheredRows) -> ActivationBatch:
        if rows.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(rows.ready)
            rows.acts.record_stream(stream)
        return ActivationBatch(x=rows.acts[: self._n_x], y=rows.acts[self._n_x :], tokens=rows.tokens)


def require_same(state: Mapping[str, int | str], settings: Mapping[str, int | str]) -> None:
    """Checks that a loader's state was saved with the same settings.

    Raises:
        CheckpointError: a setting differs.
    """
    for key, mine in settings.items():
        if state.get(key) != mine:
            raise CheckpointError(
                f"loader state: {key} was {state.get(key)!r} and is now {mine!r}; resume with the saved value"
            )


def iterate_store(
    store: ActivationStore,
    x_sites: Sequence[str],
    y_sites: Sequence[str],
    batch_tokens: int,
    where: TokenFilter = ALL_TOKENS,
    max_tokens: int | None = None,
    data_rank: int = 0,
    data_world: int = 1,
) -> Iterator[ActivationBatch]:
    """Reads a store once in the stored order, for evaluation.

    Args:
        store: the store.
        x_sites: sites of `ActivationBatch.x`.
        y_sites: sites of `ActivationBatch.y`.
        batch_tokens: tokens of a batch; the last one may have fewer.
        where: token filter.
        max_tokens: number of tokens to read; default: all.
        data_rank: index of the range of these tokens to read, one of `data_world`; it may be empty.
        data_world: number of ranges, of nearly equal size.

    Yields:
        Batches in float32.

    Raises:
        StoreError: a site is not stored, or a shard is missing, truncated or damaged.
    """
    source = StoreBlocks(store, x_sites, y_sites, where)
    total = int(source.rows.sum())
    total = total if max_tokens is None else min(max_tokens, total)
    start, stop = (total * rank // data_world for rank in (data_rank, data_rank + 1))
    if start == stop:
        return
    sizes = BufferSizes(
        slots=3,
        slot_rows=source.chunk_tokens,
        batch_rows=min(batch_tokens, stop - start),
        batches=_BATCHES_IN_USE,
        widen=True,
    )
    with closing(WindowPool(source, sizes, _stretch(source, start, stop), reader_threads=1)) as pool:
        for first in range(start, stop, batch_tokens):
            rows = pool.batch([(0, min(batch_tokens, stop - first))])
            yield ActivationBatch(x=rows.acts[: len(x_sites)], y=rows.acts[len(x_sites) :], tokens=rows.tokens)


def _stretch(source: BlockSource, start: int, stop: int) -> Iterator[WindowRead]:
    """Reads the rows `start` to `stop` of those that pass the filter, block by block."""
    first_row = 0
    for block, rows in enumerate(source.rows.tolist()):
        first, last = max(0, start - first_row), min(rows, stop - first_row)
        if first < last:
            yield WindowRead(stream=0, segments=[(block, first, last)], picks=partial(np.arange, last - first))
        first_row += rows


def _picks(order: ReadOrder, visit: Visit) -> NDArray[np.int64]:
    return order.window_permutation(visit.stream, visit.window)[visit.first : visit.stop]


def _with_spare(sizes: BufferSizes, source: BlockSource) -> BufferSizes:
    """Adds spare slots for prefetching: all windows of an epoch end together, and the next epoch needs as many."""
    slot_bytes = pool_bytes(source, replace(sizes, slots=1, batch_rows=0))
    spare = min(sizes.slots, _SMALL_POOL_BYTES // slot_bytes - sizes.slots)
    return replace(sizes, slots=sizes.slots + max(1, sizes.slots // 4, spare))


def _slots(source: BlockSource, sizes: BufferSizes, device: torch.device) -> BatchBuffers | None:
    """Buffers for batches on a CUDA device; None on the CPU."""
    if device.type == "cpu":
        return None
    from clt.capture.reading.cuda_batch_buffers import cuda_buffers

    return cuda_buffers(source, sizes, device)
