"""Ranks of one measurement of the training benchmark: processes that run `Trainer.fit`.

    python -m clt.launch.bench.training.rank TASK_JSON FOLDER

starts them and writes one result per rank to the folder. The batch source marks the steps and ends the run. In its own
network namespace, the job also reads the byte counter of the loopback interface.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clt.distributed.mesh import Mesh, deal_layers
from clt.launch.bench.training.dense import DenseTranscoder
from clt.launch.bench.training.lone_mesh import LoneMesh
from clt.launch.bench.training.meters import PeakMemory, PhaseClock, loopback_bytes, raise_loopback
from clt.launch.bench.training.sizes import SIZES, Dtype, TrainSize, train_config
from clt.records import ActivationBatch, TokenTable
from clt.step_phases import observed_by
from clt.training.deepspeed_engine import joined_job, local_device
from clt.training.metrics import MetricsWriter
from clt.training.trainer import Trainer
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

#: Names of the dense baseline, used in place of a variant, and its dtypes.
DENSE: dict[str, Dtype] = {"dense, float32": "float32", "dense, bfloat16": "bfloat16"}
#: Steps before the measured ones; from the second on, features are dead.
WARM_UP = 3
_LINK_BYTES, _LINK_ROUNDS = 2**25, 5


@dataclass(frozen=True, kw_only=True)
class Task:
    """One measurement.

    Attributes:
        size: a key of `SIZES`.
        variant: name of one of its variants, or a key of `DENSE`.
        data: data-parallel replicas.
        layer: ranks of the layer axis.
        column: ranks of the column axis.
        zero: ZeRO stage; default: that of a job.
        steps: measured steps.
        private_network: whether the loopback interface carries only this job and is read.
    """

    size: str
    variant: str
    steps: int
    data: int = 1
    layer: int = 1
    column: int = 1
    zero: int | None = None
    private_network: bool = False

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.data * self.layer * self.column


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """Measurements of one rank.

    Attributes:
        steps: seconds of every measured step by phase.
        sent: bytes sent per step by axis, counted by `Mesh.traffic`.
        peak_bytes: peak memory of the job (`PeakMemory`).
        loopback: bytes per step of all ranks on the loopback interface; None if not read.
        link: bytes/s received per rank in an all-gather over the world; None for one process.
        absent: reason why nothing was measured, or None.
    """

    steps: tuple[dict[str, float], ...] = ()
    sent: dict[str, int] | None = None
    peak_bytes: int | None = None
    loopback: float | None = None
    link: float | None = None
    absent: str | None = None


class _EnoughError(Exception):
    """Ends the run after the last measured step."""


class _Batches:
    """Source of the same batch at every step; marks the beginning of steps and records the bytes sent so far."""

    def __init__(self, x: Tensor, y: Tensor, task: Task, mesh: Mesh, clock: PhaseClock) -> None:
        nothing = torch.zeros(y.shape[1], dtype=torch.int64)
        self._batch = ActivationBatch(
            x=x, y=y, tokens=TokenTable(**{field.name: nothing for field in fields(TokenTable)})
        )
        self._task, self._mesh, self._clock = task, mesh, clock
        self.sent: list[dict[str, int]] = []
        self.loopback: list[int] = []

    def __iter__(self) -> Iterator[ActivationBatch]:
        for number in range(WARM_UP + self._task.steps + 1):
            if self._task.private_network and number in (WARM_UP, WARM_UP + self._task.steps):
                dist.barrier()
                self.loopback.append(loopback_bytes())
            self.sent.append(dict(self._mesh.traffic.by_axis()))
            self._clock.begin_step()
            if number < WARM_UP + self._task.steps:
                yield self._batch
        raise _EnoughError

    def state_dict(self) -> dict[str, Any]:
        """Empty: all steps see the same batch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing."""


def measure(task: Task) -> RankResult:
    """Trains as one rank of a job and measures it."""
    size, device = SIZES[task.size], local_device()
    with joined_job(), tempfile.TemporaryDirectory(prefix="clt-bench-") as scratch:
        link = _link() if dist.get_world_size() > 1 else None
        mesh = Mesh.create(task.layer, task.column)
        if size.ranks > 1:
            mesh = LoneMesh.of(mesh, size.ranks, size.n_features)
        _load_libraries(Path(scratch) / "imports")
        memory = PeakMemory(device)
        transcoder, x, y = _inputs(size, mesh, device)
        clock = PhaseClock(device)
        if task.variant in DENSE:
            dtype = getattr(torch, DENSE[task.variant])
            dense = DenseTranscoder(transcoder.to(device, dtype), size)
            return _dense(dense, x.to(dtype), y.to(dtype), task.steps, clock, memory)
        batches = _Batches(x, y, task, mesh, clock)
        variant = next(variant for variant in size.variants if variant.name == task.variant)
        layer = max(task.layer, size.ranks)
        config = train_config(size, variant, Path(scratch), layer, task.column, task.zero)
        trainer = Trainer(config, transcoder, batches, mesh, progress_bar=False)
        with observed_by(clock), suppress(_EnoughError):
            trainer.fit()
    last = dict(batches.sent[-1])
    for axis, sent in batches.sent[-2].items():
        last[axis] -= sent
    return RankResult(
        steps=tuple(clock.steps()[WARM_UP:]),
        sent=last,
        peak_bytes=memory.peak(),
        loopback=(batches.loopback[1] - batches.loopback[0]) / task.steps if batches.loopback else None,
        link=link,
    )


def _inputs(size: TrainSize, mesh: Mesh, device: torch.device) -> tuple[CrossLayerTranscoder, Tensor, Tensor]:
    """A rank's transcoder and its activations on the device, normal, so that features fire uniformly."""
    config = size.architecture
    share = deal_layers(config, mesh.layer_size, mesh.column_size)[mesh.model_rank]
    transcoder = CrossLayerTranscoder(config, Scaling.identity(config.n_layers, config.d_model), share)
    draw = torch.Generator(device).manual_seed(1 + mesh.data_rank)
    tokens = size.batch_tokens // mesh.data_size
    layers = len(share.sources), len(share.targets)
    x, y = (torch.randn(n, tokens, config.d_model, generator=draw, device=device) for n in layers)
    return transcoder, x, y


def _load_libraries(folder: Path) -> None:
    """Imports and maps libraries, 180 MB, before the memory of the job is measured."""
    MetricsWriter(folder, 0).close()
    toy = SIZES["toy"]
    config = toy.architecture
    transcoder = CrossLayerTranscoder(config, Scaling.identity(config.n_layers, config.d_model))
    x_LBD = torch.zeros(config.n_layers, toy.batch_tokens, config.d_model)
    DenseTranscoder(transcoder, toy).step(x_LBD, x_LBD)


def _dense(
    dense: DenseTranscoder, x: Tensor, y: Tensor, steps: int, clock: PhaseClock, memory: PeakMemory
) -> RankResult:
    for _ in range(WARM_UP + steps):
        clock.begin_step()
        dense.step(x, y)
    clock.begin_step()
    return RankResult(steps=tuple(clock.steps()[WARM_UP:]), peak_bytes=memory.peak())


def _link() -> float:
    """Bytes/s that a rank receives in the fastest of several all-gathers."""
    own = torch.zeros(_LINK_BYTES, dtype=torch.uint8)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    seconds = []
    for _ in range(_LINK_ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_gather(parts, own)
        seconds.append(time.perf_counter() - started)
    return (len(parts) - 1) * _LINK_BYTES / min(seconds)


def _run(task: Task, folder: Path, rank: int) -> None:
    try:
        result = measure(task)
    except torch.OutOfMemoryError:
        result = RankResult(absent="out of memory")
    (folder / f"{rank}.json").write_text(json.dumps(asdict(result)), encoding="utf-8")


def _rank(rank: int, task: Task, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    _run(task, folder, rank)


def main(task_json: str, folder: str) -> None:
    """Runs all ranks of a task.

    Args:
        task_json: fields of a `Task`.
        folder: for the results, RANK.json.
    """
    task = Task(**json.loads(task_json))
    if task.private_network:
        raise_loopback()
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    world = task.world
    if world == 1:
        _run(task, Path(folder), 0)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Ranks share the processor of the machine; speed is measured with one process only.
    common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= common | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.multiprocessing.spawn(_rank, (task, Path(folder)), nprocs=world)


if __name__ == "__main__":
    main(*sys.argv[1:])
