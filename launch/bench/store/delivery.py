"""Store benchmark, delivery of shuffled batches of all sites, as in training.

`ActivationLoader` against the same algorithm on other readers: a shuffle within windows, with threads that read blocks
into one window while batches are gathered from another. Streams continue between rounds, so that no round contains a
start, and all of them reuse the memory of windows and batches.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clt.capture.reading.loader import ActivationLoader
from clt.launch.bench.common.timing import TimedRun, interleave
from clt.launch.bench.store.data import BenchStore, Bits, Layout, ReadBlock
from clt.launch.bench.store.files import Reader, make_table
from clt.launch.bench.store.report import ThroughputTable

#: Tensors [s,B,d] of some sites each, together all sites.
SiteBatch = tuple[Tensor, ...]

LOADER = "clt loader"
#: Threads that read blocks for other readers; on two cores, one to four made less difference than two runs.
READER_THREADS = 2
#: Seconds before a round in which the other streams finish prefetching.
_PAUSE_S = 0.2
_SEED = 3


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Requested batches.

    Attributes:
        batch_tokens: B, tokens of a batch.
        window_tokens: tokens shuffled together, a multiple of B and of the chunk.
        dtype: of the batches, bfloat16 (as stored) or float32.
    """

    batch_tokens: int
    window_tokens: int
    dtype: torch.dtype


def delivery_table(
    key: str, title: str, store: BenchStore, readers: Sequence[Reader], delivery: Delivery, rounds: int
) -> ThroughputTable:
    """Times the delivery of all tokens of a store in shuffled batches, from the page cache.

    Args:
        key: of the table.
        title: of the table.
        store: the store.
        readers: other readers that fill windows.
        delivery: requested batches.
        rounds: rounds.
    """
    layout = store.layout
    expected = np.sort(_fingerprints(torch.from_numpy(store.expected).view(torch.bfloat16)))
    steps = layout.tokens // delivery.batch_tokens
    with ExitStack() as stack:
        streams = {LOADER: stack.enter_context(closing(_loader_batches(store, delivery)))}
        for reader in readers:
            if reader.open is not None:
                read = stack.enter_context(reader.open())
                streams[reader.name] = stack.enter_context(closing(window_batches(read, layout, delivery)))
        for name, stream in streams.items():
            _check_epoch(name, stream, steps, delivery, expected)
        runs = [
            TimedRun(name=name, run=partial(_drain, stream, steps), before=partial(time.sleep, _PAUSE_S))
            for name, stream in streams.items()
        ]
        timings = interleave(runs, rounds)
    checksums = {LOADER: True} | {reader.name: reader.checksums for reader in readers}
    return make_table(key, title, layout, rounds, checksums, timings)


def window_batches(read: ReadBlock, layout: Layout, delivery: Delivery) -> Generator[SiteBatch]:
    """Yields every token of a store once per epoch, without end, shuffled within windows of random blocks.

    Args:
        read: reads a block; called by several threads.
        layout: of the store.
        delivery: requested batches.

    Yields:
        All sites of B tokens; the memory is reused after two more batches.
    """
    free: queue.Queue[Bits | None] = queue.Queue()
    full: queue.Queue[Bits | BaseException] = queue.Queue()
    # One window is read while batches are gathered from the other.
    for _ in range(2):
        free.put(np.empty((delivery.window_tokens // layout.chunk_tokens, *layout.block_shape), np.uint16))

    def fill() -> None:
        try:
            with ThreadPoolExecutor(READER_THREADS) as pool:
                for blocks in _windows(layout.blocks, delivery.window_tokens // layout.chunk_tokens):
                    window = free.get()
                    if window is None:
                        return
                    list(pool.map(read, blocks, window))
                    full.put(window)
        except BaseException as error:  # raised again by the consumer
            full.put(error)

    random = np.random.default_rng(_SEED)
    shape = (layout.sites, delivery.batch_tokens, layout.width)
    batches = cycle([torch.empty(shape, dtype=delivery.dtype) for _ in range(3)])
    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            window = full.get()
            if isinstance(window, BaseException):
                raise window
            values = torch.from_numpy(window).view(torch.bfloat16)
            tokens = torch.from_numpy(random.permutation(delivery.window_tokens))
            for part in tokens.split(delivery.batch_tokens):
                batch = next(batches)
                _gather(values, part, batch)
                yield (batch,)
            free.put(window)
    finally:
        free.put(None)
        thread.join()


def _windows(n_blocks: int, per_window: int) -> Iterator[list[int]]:
    random = np.random.default_rng(_SEED)
    while True:
        yield from random.permutation(n_blocks).reshape(-1, per_window).tolist()


def _loader_batches(store: BenchStore, delivery: Delivery) -> Generator[SiteBatch]:
    opened = store.open()
    half = len(opened.sites) // 2
    loader = ActivationLoader(
        opened,
        x_sites=opened.sites[:half],
        y_sites=opened.sites[half:],
        batch_tokens=delivery.batch_tokens,
        window_tokens=delivery.window_tokens,
        seed=_SEED,
        as_stored=delivery.dtype == torch.bfloat16,
    )
    for batch in loader:
        yield batch.x, batch.y


def _gather(window: Tensor, tokens: Tensor, batch: Tensor) -> None:
    """Copies tokens [B] of a window [blocks,S,C,d] into a batch [S,B,d]."""
    _, sites, size, width = window.shape
    rows = window.view(-1, width)
    first = tokens // size * (sites * size) + tokens % size
    for site, out in enumerate(batch):
        index = first + site * size
        if out.dtype == rows.dtype:
            torch.index_select(rows, 0, index, out=out)
        else:
            out.copy_(rows.index_select(0, index))


def _drain(stream: Iterator[SiteBatch], steps: int) -> None:
    for _ in islice(stream, steps):
        pass


def _fingerprints(tokens: Tensor) -> NDArray[np.int64]:
    """[T] hash of every token [T,S,d], which depends on the position of each of its bits."""
    words = tokens.contiguous().view(torch.int64).flatten(1).numpy()
    weights = np.random.default_rng(_SEED).integers(1, 2**62, words.shape[1]) | 1
    return words @ weights


def _check_epoch(
    name: str, stream: Iterator[SiteBatch], steps: int, delivery: Delivery, expected: NDArray[np.int64]
) -> None:
    """Checks that the first epoch has every token exactly once with the right values at all sites."""
    found = []
    for parts in islice(stream, steps):
        batch = torch.cat(parts)
        assert batch.dtype == delivery.dtype and batch.shape[1] == delivery.batch_tokens, f"{name}: {batch.shape}"
        found.append(_fingerprints(batch.to(torch.bfloat16).transpose(0, 1)))
    assert np.array_equal(np.sort(np.concatenate(found)), expected), f"{name}: not every token delivered once"
