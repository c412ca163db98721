"""How fast a job would be on many devices, from the pieces of a step that were measured on one.

Each measured piece is scaled by the work that `clt.planning.counts` and `clt.planning.speed` count for the rank with
most to do, so it keeps the efficiency that it was seen to have; bytes between ranks go at a named rate, which nobody
measured here, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from clt.launch.bench.training.anchors import least_time
from clt.launch.bench.training.measure import Row
from clt.launch.bench.training.sizes import DEFAULT, Size, planned_job, train_config
from clt.planning.counts import RankMemory, memory, traffic
from clt.planning.job import Job, MeshShape
from clt.planning.plan import alternatives, plan
from clt.planning.speed import MACHINES, MachineModel

#: Jobs that are projected, and on how many devices.
PROJECTED = ("gpt2", "llava-slice")
DEVICES = (8, 16, 32, 64)
#: Whose memory, links and nodes are taken.
LINKED = MACHINES["h200"]


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What one measured step took.

    Attributes:
        size: what was trained.
        row: of the default variant; AuxK is part of its phases, and as large a part of the job's.
        machine: ceilings of the device at that size.
    """

    size: Size
    row: Row
    machine: MachineModel


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A job on many devices.

    Attributes:
        job: name of its size.
        pieces: name of the size whose pieces were measured.
        mesh: the processes.
        tokens: of a step.
        seconds: of a step, by measured piece, as scaled.
        links_s: seconds of the bytes between ranks at assumed rates.
        model_bytes: received by a rank inside its model group.
        data_bytes: received by a rank from its replicas.
        memory_bytes: of the rank that needs most, by the plan.
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


def project(pieces: Pieces, job_size: Size, devices: tuple[int, ...] = DEVICES) -> Iterator[Projection]:
    """A job on more and more devices, with the same tokens of a step, and with tokens in proportion to devices.

    Args:
        pieces: what was measured.
        job_size: the job.
        devices: how many there are.
    """
    for world in devices:
        for tokens in dict.fromkeys((job_size.batch_tokens, job_size.batch_tokens * world // devices[0])):
            job = _best_job(replace(job_size, batch_tokens=tokens), world)
            if job is not None:
                yield _projected(pieces, job_size.name, job)


def _best_job(size: Size, world: int) -> Job | None:
    """The job on the mesh that `clt plan` finds the fastest."""
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
    """What each piece has to do, in any unit, for the rank with most to do."""
    plain = replace(job, config=replace(job.config, auxk=replace(job.config.auxk, coefficient=0.0)))
    least, need = least_time(plain, machine), _largest(plain)
    return {
        "encode": least.encode,
        "decode": least.decode,
        "backward": least.decoder_gradients + least.encoder_gradients,
        "optimizer": least.optimizer,
        # Codes are taken in and grouped by feature; what is left reads and standardises inputs.
        "exchange": need.codes,
        "other": need.inputs,
    }


def _largest(job: Job) -> RankMemory:
    return max((memory(job, share) for share in job.shares()), key=lambda need: need.total)


def _rate(ranks: int) -> float:
    return LINKED.node_link if ranks <= LINKED.per_node else LINKED.network
