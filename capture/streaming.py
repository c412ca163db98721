"""Streaming of activations from a running model to training, where no disk holds all of them.

A ring is a store of a capture job of which only some units exist at a time. The units of an epoch, in an order
determined by (seed, epoch), are split into generations. While the batches of one generation are read, a background
thread captures the next; generations that have been read are removed. Within a generation everything works as with a
store (shuffling, filters, any number of ranks, resuming), since it is read by `ActivationLoader`. The ring is in a
folder that all ranks reach, such as /dev/shm, or, for a single process, in its memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from clt.capture.planning import CaptureJob
from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.loader import ActivationLoader, require_same
from clt.capture.reading.open_store import open_committed
from clt.capture.reading.token_filter import ALL_TOKENS, TokenFilter
from clt.capture.run import capture_samples, first_tokens
from clt.capture.storage.open_storage import open_storage
from clt.capture.store.committed_units import read_commit
from clt.capture.store.layout import commit_path
from clt.capture.store.moments import Moments, pack_moments, unpack_moments
from clt.capture.store.row_order import permutation
from clt.capture.writing.workers import Schedule, assigned_units
from clt.capture.writing.writer import StoreWriter
from clt.errors import ConfigError
from clt.records import ActivationBatch, SiteStats

log = logging.getLogger(__name__)

_MOMENTS = "moments.safetensors"
_GENERATIONS = 5  # distinguishes the permutation of units from the other permutations of a seed


class CaptureRing:
    """The units of a capture that exist at a given time.

    Args:
        job: the capture.
        location: folder of the units, or `memory://name`.
        units: number of units of a generation.
        seed: seed of the order of units.
        schedule: assignment of units to processes.

    Attributes:
        digest: hash of the capture job.

    Raises:
        StoreError: the location holds something else.
    """

    def __init__(self, job: CaptureJob, location: str, units: int, seed: int, schedule: Schedule) -> None:
        self._job, self._location, self._seed, self._schedule = job, location, seed, schedule
        self._count = max(1, round(job.plan.n_units / units))
        self._writer = StoreWriter(location, job.spec, job.plan)
        self.digest = self._writer.digest
        if not self._writer.calibrated:
            self._writer.calibrate(first_tokens(job))

    def generations(self, epoch: int) -> list[list[int]]:
        """Units of each generation of an epoch, every unit once."""
        order = permutation(self._job.plan.n_units, self._seed, (_GENERATIONS, epoch, 0, 0))
        return [sorted(part.tolist()) for part in np.array_split(order, self._count)]

    def fill(self, units: Sequence[int], stop: threading.Event | None = None) -> None:
        """Captures units, together with other processes, until all of them are committed.

        Args:
            units: their numbers.
            stop: event that ends the work before the next unit.

        Raises:
            InputError: an example or an image cannot be read.
            NonFiniteError: an activation is NaN or infinite.
        """
        with closing(assigned_units(self._writer, self._schedule, units)) as assigned:
            for unit in assigned:
                if stop is not None and stop.is_set():
                    return
                self._writer.commit(unit, capture_samples(self._job, unit, self._job.plan.samples(unit)))

    def present(self) -> set[int]:
        """Units that are committed."""
        return self._writer.committed()

    def open(self, units: Sequence[int]) -> ActivationStore:
        """Opens committed units; must be called again for every generation, since file names are reused."""
        return open_committed(open_storage(self._location), units)

    def remove(self, units: Sequence[int]) -> None:
        """Removes units, commit records first, so that no unit is ever partly there."""
        storage = self._writer.storage
        for unit in units:
            if storage.size(commit_path(unit)) is not None:
                _, record = read_commit(storage, unit, self.digest)
                storage.delete(commit_path(unit))
                for file in record.files:
                    storage.delete(file.path)

    def moments(self) -> dict[str, Moments]:
        """Moments of the first generation by group; kept after its units, so that a resumed job has the same."""
        storage, groups = self._writer.storage, self._job.spec.groups
        if storage.size(_MOMENTS) is None:
            first = self.generations(0)[0]
            self.fill(first)
            store = self.open(first)
            storage.put(_MOMENTS, pack_moments({group.name: store.moments(group.name) for group in groups}))
        return unpack_moments(storage.read(_MOMENTS), [group.name for group in groups], storage.name(_MOMENTS))

    def stats(self, sites: Sequence[str], where: TokenFilter) -> SiteStats:
        """Statistics of sites over the tokens of the first generation that pass a filter without a norm cap."""
        group = next(group for group in self._job.spec.groups if set(sites) <= set(group.sites))
        return self.moments()[group.name].select([group.sites.index(site) for site in sites]).stats(where.classes)

    def token_counts(self, where: TokenFilter) -> torch.Tensor:
        """[c] int64: tokens of the first generation that pass a filter without a norm cap, by class."""
        return where.counts(self.moments()[self._job.spec.groups[0].name])


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Position of the next batch: step of a generation of an epoch."""

    epoch: int = 0
    generation: int = 0
    step: int = 0


class StreamingLoader:
    """Endless iterator over shuffled batches of a ring, epoch after epoch.

    The batches of all ranks of a step, concatenated in rank order, are the batch that a single rank would read. Tokens
    are shuffled within a generation; those that do not fill a batch at its end are dropped.

    Args:
        ring: the units.
        x_sites: sites of `ActivationBatch.x`.
        y_sites: sites of `ActivationBatch.y`.
        batch_tokens: tokens of a step over all ranks.
        window_tokens: tokens shuffled together in memory, over all ranks.
        seed: seed of the order.
        data_rank: this rank on the data axis.
        data_world: ranks on the data axis.
        where: filter of tokens.
        device: torch device of the batches.
        removes: whether this process removes read generations; exactly one of a job does.

    Raises:
        ConfigError: the filter has a norm cap, which needs the statistics of the whole.
    """

    def __init__(
        self,
        ring: CaptureRing,
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
        removes: bool = True,
    ) -> None:
        if where.norm_cap is not None:
            raise ConfigError("data.norm_cap needs the mean norms of a whole store; capture a store, or remove the key")
        self._ring, self._removes = ring, removes
        self._x_sites, self._y_sites = tuple(x_sites), tuple(y_sites)
        self._batch_tokens, self._window_tokens, self._seed = batch_tokens, window_tokens, seed
        self._rank, self._world, self._where, self._device = data_rank, data_world, where, device
        self._place = _Place()

    def state_dict(self) -> dict[str, int | str]:
        """Position of the stream, and settings that are checked when it is loaded."""
        return {**vars(self._place), **self._settings()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Resumes at the position of another loader; existing iterators are not moved.

        Raises:
            CheckpointError: the state is of another capture or of other settings.
        """
        require_same(state, self._settings())
        self._place = _Place(**{key: int(state[key]) for key in vars(_Place())})

    def __iter__(self) -> Iterator[ActivationBatch]:
        stop = threading.Event()
        coming = self._coming()
        with ThreadPoolExecutor(1, thread_name_prefix="capture-ring") as background:
            try:
                stale = self._ring.present()  # left by an earlier run of the job
                place, units = next(coming)
                self._ring.fill(units, stop)
                for following, next_units in coming:
                    filled = background.submit(self._ring.fill, next_units, stop)
                    for number, batch in enumerate(self._batches(place, units)):
                        # Ranks step together: a request for the second batch shows that every rank has the first one,
                        # and none still reads the previous generation.
                        if number == 1 and self._removes:
                            self._ring.remove(sorted(stale - set(units) - set(next_units)))
                            stale.clear()
                        yield batch
                    filled.result()  # raises errors of the background thread
                    stale.update(units)
                    place, units = following, next_units
            finally:
                stop.set()

    def _batches(self, place: _Place, units: Sequence[int]) -> Iterator[ActivationBatch]:
        """Remaining batches of a generation."""
        loader = ActivationLoader(
            self._ring.open(units),
            x_sites=self._x_sites,
            y_sites=self._y_sites,
            batch_tokens=self._batch_tokens,
            window_tokens=self._window_tokens,
            seed=self._seed,
            data_rank=self._rank,
            data_world=self._world,
            where=self._where,
            device=self._device,
        )
        log.info("epoch=%d generation=%d steps=%d", place.epoch, place.generation, loader.steps_per_epoch)
        for step, batch in enumerate(loader.epoch(place.epoch, place.step), start=place.step):
            last = step + 1 == loader.steps_per_epoch
            self._place = self._after(place) if last else _Place(**{**vars(place), "step": step + 1})
            yield batch

    def _coming(self) -> Iterator[tuple[_Place, list[int]]]:
        """Generations from the current place on."""
        place = self._place
        while True:
            yield place, self._ring.generations(place.epoch)[place.generation]
            place = self._after(place)

    def _after(self, place: _Place) -> _Place:
        """The start of the next generation."""
        last = place.generation + 1 == len(self._ring.generations(place.epoch))
        return _Place(epoch=place.epoch + last, generation=0 if last else place.generation + 1)

    def _settings(self) -> dict[str, int | str]:
        return {
            "ring": self._ring.digest,
            "generations": len(self._ring.generations(0)),
            "seed": self._seed,
            "batch_tokens": self._batch_tokens,
            "window_tokens": self._window_tokens,
            "where": str(self._where),
        }
