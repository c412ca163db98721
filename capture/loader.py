"""Reads a store for training: a shuffled, resumable stream of batches, the same for every number of ranks.

The order is `clt.capture.order.ReadOrder`; this module turns it into tensors. Each virtual stream keeps one shuffled
window in memory in the stored type; a batch is assembled from slices of them and widened to float32 once. One
background thread works a few batches ahead; what goes wrong there is raised where the batches are consumed.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clt.capture.blocks import BlockReader, Part, join, unpack_tokens
from clt.capture.order import ReadOrder, Window
from clt.capture.store import ActivationStore
from clt.errors import CheckpointError
from clt.records import ActivationBatch

log = logging.getLogger(__name__)

_READ_AHEAD = 4


class ActivationLoader:
    """Shuffled batches of a store, epoch after epoch, without end.

    The ranks' batches of a step, joined in rank order, are the batch that a single rank would read. Every token comes
    once in an epoch, but for the (tokens mod batch_tokens) that are left out, other ones each epoch.

    Args:
        store: the store.
        x_sites: sites that become `ActivationBatch.x`; only these and `y_sites` are read.
        y_sites: sites that become `ActivationBatch.y`.
        batch_tokens: tokens of a step over all ranks.
        window_tokens: tokens shuffled together in memory, over all ranks; at least one block of chunk_tokens for each
            of gcd(batch_tokens, 64) streams is.
        seed: seed of the order.
        data_rank: this rank on the data axis.
        data_world: ranks on the data axis, a divisor of gcd(batch_tokens, 64).
        drop_bos: leave out beginning-of-sequence tokens.

    Raises:
        StoreError: a site is not stored, or token tables cannot be read.
        ConfigError: the store holds fewer tokens than a batch, or the ranks cannot share it.
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
        drop_bos: bool = False,
    ) -> None:
        self._blocks = BlockReader(store, x_sites, y_sites, drop_bos)
        self._store_id, self._n_x = store.id, len(x_sites)
        self._seed, self._batch_tokens, self._window_tokens = seed, batch_tokens, window_tokens
        self._rank, self._world, self._drop_bos = data_rank, data_world, drop_bos
        self._epoch = self._step = 0
        order = self._order(0)
        order.streams_of(data_rank, data_world)
        self.steps_per_epoch: int = order.steps
        self.dropped_tokens: int = order.dropped_rows
        log.info(
            "%s: %d tokens, %d steps of %d an epoch, %d tokens left out, %d streams",
            store.path,
            order.num_rows,
            order.steps,
            batch_tokens,
            order.dropped_rows,
            order.streams,
        )

    def __iter__(self) -> Iterator[ActivationBatch]:
        for epoch, step, batch in _ahead(self._produce(self._epoch, self._step)):
            last = step + 1 == self.steps_per_epoch
            self._epoch, self._step = (epoch + 1, 0) if last else (epoch, step + 1)
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """Where the stream stands: the next batch is step `step` of epoch `epoch`; the rest guards against misuse."""
        return {"epoch": self._epoch, "step": self._step, **self._settings()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Goes on where another loader stood; iterators made before are not moved.

        Args:
            state: from `state_dict` of a loader of the same store and settings, on any number of ranks.

        Raises:
            CheckpointError: it comes from another store or from other settings.
        """
        for key, mine in self._settings().items():
            if state.get(key) != mine:
                raise CheckpointError(
                    f"loader state: {key} was {state.get(key)!r} and is now {mine!r}; make them equal"
                )
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def _settings(self) -> dict[str, int | str]:
        return {
            "store": self._store_id,
            "seed": self._seed,
            "batch_tokens": self._batch_tokens,
            "window_tokens": self._window_tokens,
            "drop_bos": int(self._drop_bos),
        }

    def _order(self, epoch: int) -> ReadOrder:
        return ReadOrder(
            self._blocks.rows,
            seed=self._seed,
            epoch=epoch,
            batch_rows=self._batch_tokens,
            window_rows=self._window_tokens,
        )

    def _produce(self, epoch: int, step: int) -> Iterator[tuple[int, int, ActivationBatch]]:
        while True:
            order = self._order(epoch)
            windows: dict[int, _Held] = {}
            for now in range(step, order.steps):
                parts = []
                for stream in order.streams_of(self._rank, self._world):
                    parts += self._take(order, windows, stream, now * order.share, (now + 1) * order.share)
                yield epoch, now, _batch(parts, self._n_x)
            epoch, step = epoch + 1, 0

    def _take(self, order: ReadOrder, windows: dict[int, _Held], stream: int, position: int, stop: int) -> list[Part]:
        """Rows of a stream; a window is read when the stream enters it, and replaces the one before."""
        parts = []
        while position < stop:
            held = windows.get(stream)
            if held is None or not held.window.start <= position < held.window.stop:
                windows.pop(stream, None)
                window = order.window_at(stream, position)
                rows = torch.from_numpy(order.window_permutation(stream, window))
                acts, tokens = join([self._blocks.read(*part) for part in order.window_segments(stream, window)])
                held = windows[stream] = _Held(window, acts.index_select(0, rows), tokens.index_select(0, rows))
            until = min(stop, held.window.stop)
            rows_now = slice(position - held.window.start, until - held.window.start)
            parts.append((held.acts[rows_now], held.tokens[rows_now]))
            position = until
        return parts


def iterate_store(
    store: ActivationStore,
    x_sites: Sequence[str],
    y_sites: Sequence[str],
    batch_tokens: int,
    drop_bos: bool = False,
    max_tokens: int | None = None,
) -> Iterator[ActivationBatch]:
    """Goes through a store once, in the order of storage, for evaluation.

    Args:
        store: the store.
        x_sites: sites that become `ActivationBatch.x`.
        y_sites: sites that become `ActivationBatch.y`.
        batch_tokens: tokens of a batch; the last one may have fewer.
        drop_bos: leave out beginning-of-sequence tokens.
        max_tokens: stop after so many tokens; absent: all.

    Yields:
        Batches in float32.

    Raises:
        StoreError: a site is not stored, or a shard is missing, truncated or damaged.
    """
    blocks = BlockReader(store, x_sites, y_sites, drop_bos)
    ends = np.cumsum(blocks.rows)
    total = int(ends[-1]) if max_tokens is None else min(max_tokens, int(ends[-1]))
    held: tuple[int, Part] | None = None
    for first in range(0, total, batch_tokens):
        position, stop = first, min(first + batch_tokens, total)
        parts = []
        while position < stop:
            block = int(np.searchsorted(ends, position, side="right"))
            if held is None or held[0] != block:
                held = block, blocks.read(block, 0, int(blocks.rows[block]))
            base = int(ends[block] - blocks.rows[block])
            rows = slice(position - base, min(stop, int(ends[block])) - base)
            parts.append((held[1][0][rows], held[1][1][rows]))
            position = base + rows.stop
        yield _batch(parts, len(x_sites))


@dataclass(frozen=True)
class _Held:
    """A window in memory, its rows shuffled."""

    window: Window
    acts: Tensor
    tokens: Tensor


def _batch(parts: Sequence[Part], n_x: int) -> ActivationBatch:
    """Joins rows [B, sites, D] and turns them into layer-first float32."""
    acts, tokens = join(parts)
    wide = torch.empty(acts.shape[1], acts.shape[0], acts.shape[2])
    wide.copy_(acts.transpose(0, 1))
    return ActivationBatch(x=wide[:n_x], y=wide[n_x:], tokens=unpack_tokens(tokens))


def _ahead(source: Iterator[tuple[int, int, ActivationBatch]]) -> Iterator[tuple[int, int, ActivationBatch]]:
    """Runs an endless iterator a few items ahead in one thread; its exception is raised in its turn."""
    items: queue.Queue[tuple[int, int, ActivationBatch] | BaseException] = queue.Queue(_READ_AHEAD)
    stop = threading.Event()

    def put(item: tuple[int, int, ActivationBatch] | BaseException) -> None:
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in source:
                put(item)
                if stop.is_set():
                    return
        except BaseException as error:  # handed over, raised by the consumer
            put(error)

    thread = threading.Thread(target=run, name="activation-loader", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
