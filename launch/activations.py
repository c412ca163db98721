"""Activations of a training job, from a store or from the running model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from clt.capture.planning import CaptureConfig, plan_capture
from clt.capture.reading.loader import ActivationLoader
from clt.capture.reading.open_store import open_store
from clt.capture.reading.token_filter import TokenFilter, token_counts
from clt.capture.streaming import CaptureRing, StreamingLoader
from clt.capture.writing.workers import Schedule
from clt.config import load_config
from clt.errors import ConfigError
from clt.launch.logs import job_rank, job_world
from clt.records import ModelIdentity, SiteStats
from clt.training.deepspeed_engine import local_device
from clt.training.settings import DataSettings, StreamingSettings, TrainConfig
from clt.training.trainer import BatchSource


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Activations to train on, from a store or from the running model.

    Attributes:
        model: the model that they belong to.
        id: hash of their content, for checkpoints.
        stats: moments of sites over the tokens that pass a filter.
        token_counts: [c] tokens that pass a filter, by modality.
        batches: makes the batches of a rank from (x sites, y sites, filter, data rank, data size).
    """

    model: ModelIdentity
    id: str
    stats: Callable[[Sequence[str], TokenFilter], SiteStats]
    token_counts: Callable[[TokenFilter], Tensor]
    batches: Callable[[Sequence[str], Sequence[str], TokenFilter, int, int], BatchSource]


def open_activations(config: TrainConfig) -> Activations:
    """Opens the store of a job, or loads the model that it streams from.

    Args:
        config: the job.

    Returns:
        Its activations.

    Raises:
        StoreError: the store is missing or damaged, or the ring's folder holds something else.
        ModelError: the model cannot be loaded.
        ConfigError: the capture config is wrong, or the ring cannot be shared by the job's processes.
    """
    if config.streaming is not None:
        return _from_model(config.streaming, config.data, config.seed)
    assert config.store is not None, "checked by TrainConfig"
    store = open_store(config.store)

    def batches(x: Sequence[str], y: Sequence[str], where: TokenFilter, rank: int, world: int) -> BatchSource:
        return ActivationLoader(
            store,
            x_sites=x,
            y_sites=y,
            batch_tokens=config.data.batch_tokens,
            window_tokens=config.data.window_tokens,
            seed=config.seed,
            data_rank=rank,
            data_world=world,
            where=where,
            device=local_device(),
        )

    counts = partial(token_counts, store)
    return Activations(model=store.model, id=store.id, stats=store.stats, token_counts=counts, batches=batches)


def _from_model(settings: StreamingSettings, data: DataSettings, seed: int) -> Activations:
    if settings.ring.startswith("memory://") and job_world() > 1:
        raise ConfigError(
            f"streaming.ring={settings.ring}: {job_world()} processes cannot share the memory of one process; use a "
            "folder, for instance /dev/shm/ring"
        )
    job = plan_capture(replace(load_config(CaptureConfig, settings.capture), output=settings.ring))
    ring = CaptureRing(job, settings.ring, settings.units, seed, Schedule())

    def batches(x: Sequence[str], y: Sequence[str], where: TokenFilter, rank: int, world: int) -> BatchSource:
        return StreamingLoader(
            ring,
            x_sites=x,
            y_sites=y,
            batch_tokens=data.batch_tokens,
            window_tokens=data.window_tokens,
            seed=seed,
            data_rank=rank,
            data_world=world,
            where=where,
            device=local_device(),
            removes=job_rank() == 0,
        )

    return Activations(
        model=job.spec.model,
        id=f"streamed:{ring.digest}",
        stats=ring.stats,
        token_counts=ring.token_counts,
        batches=batches,
    )
