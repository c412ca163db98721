"""Projection of a job to many devices from the phases of a step measured on one.

Each phase is scaled by the work that `clt.planning.counts` and `clt.planning.speed` count for the rank with the most
work, so that it keeps its measured efficiency; bytes between ranks move at assumed rates, without overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from clt.launch.bench.training.measure import VariantRow
from clt.launch.bench.training.roofline import least_time
from clt.launch.bench.training.sizes import DEFAULT, TrainSize, planned_job, train_config
from clt.planning.counts import RankMemory, memory, traffic
from clt.planning.job import Job, MeshShape
from clt.planning.plan import alternatives, plan
from clt.planning.speed import MACHINES, MachineModel

#: Projected jobs, and numbers of devices.
PROJECTED = ("gpt2", "llava-slice")
DEVICES = (8, 16, 32, 64)
#: MachineModel whose memory, links and nodes are assumed.
LINKED = MACHINES["h200"]


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Measurement that a projection starts from.

    Attributes:
        size: the size.
        row: of the default variant; AuxK is part of its phases, and an equal part of the job's.
        machine: measured rates of the device at that size.
    """

    size: TrainSize
    row: VariantRow
    machine: MachineModel


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A job on many devices.

    Attributes:
        job: name of its size.
        pieces: name of the measured size.
        mesh: the processes.
        tokens: per step.
        seconds: of a step, by phase, scaled from the measurement.
        links_s: seconds of the bytes between ranks at assumed rates.
        model_bytes: bytes that a rank receives inside its model group.
        data_bytes: bytes that a rank receives from its data-parallel replicas.
        memory_bytes: largest memory of a rank by `clt plan`.
    """

    job: str
    pieces: str
    mesh: MeshShape
    tokens: int
    seconds: dict[str, float]
    links_s: float
    model_bytes: float
    data_bytes: float
    memory_bytes: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of a step over its seconds."""
        return self.tokens / (sum(self.seconds.values()) + self.links_s)


def project(pieces: Pieces, job_size: TrainSize, devices: tuple[int, ...] = DEVICES) -> Iterator[Projection]:
    """Projects a job to several numbers of devices, with constant tokens per step and with tokens per device constant.

    Args:
        pieces: the measurement.
        job_size: size of the job.
        devices: numbers of devices.
    """
    for world in devices:
        for tokens in dict.fromkeys((job_size.batch_tokens, job_size.batch_tokens * world // devices[0])):
            job = _best_job(replace(job_size, batch_tokens=tokens), world)
            if job is not None:
                yield _projected(pieces, job_size.name, job)


def _best_job(size: TrainSize, world: int) -> Job | None:
    """The job on the fastest mesh by `clt plan`."""
    config = train_config(size, DEFAULT, Path(), zero=0)
    found = alternatives(plan(config, size.architecture, LINKED), world)
    return found[0].job if found else None


def _projected(pieces: Pieces, name: str, job: Job) -> Projection:
    took = pieces.row.phases
    measured = planned_job(pieces.size, DEFAULT)
    known, wanted = (_work(each, pieces.machine) for each in (measured, job))
    moved = traffic(job)
    links_s = moved.model_axis / _rate(job.mesh.model) + (moved.data_axis + moved.bookkeeping) / _rate(job.mesh.world)
    return Projection(
        job=name,
        pieces=pieces.size.name,
        mesh=job.mesh,
        tokens=job.config.data.batch_tokens,
        seconds={piece: took[piece] * wanted[piece] / known[piece] for piece in known},
        links_s=links_s,
        model_bytes=moved.model_axis,
        data_bytes=moved.data_axis,
        memory_bytes=_largest(job).total,
    )


def _work(job: Job, machine: MachineModel) -> dict[str, float]:
    """Work of each phase, in any unit, for the rank with the most work."""
    plain = replace(job, config=replace(job.config, auxk=replace(job.config.auxk, coefficient=0.0)))
    least, need = least_time(plain, machine), _largest(plain)
    return {
        "encode": least.encode,
        "decode": least.decode,
        "backward": least.decoder_gradients + least.encoder_gradients,
        "optimizer": least.optimizer,
        # Exchange receives codes and groups them by feature; other reads and standardises inputs.
        "exchange": need.codes,
        "other": need.inputs,
    }


def _largest(job: Job) -> RankMemory:
    return max((memory(job, share) for share in job.shares()), key=lambda need: need.total)


def _rate(ranks: int) -> float:
    return LINKED.node_link if ranks <= LINKED.per_node else LINKED.network
