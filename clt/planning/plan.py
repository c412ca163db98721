"""Plans of training jobs, printed by `clt plan`: resources that a job needs, and whether it fits.

Counted from the configuration: parameters and memory of a rank, bytes on each axis of the mesh, arithmetic
(`clt.planning.counts`) and bytes of the store. Projected: seconds of a step on a named machine (`clt.planning.speed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from clt.checkpoint.training_output import METRICS_FILE, read_metrics
from clt.distributed.mesh import check_world
from clt.errors import ConfigError
from clt.planning.counts import (
    Flops,
    RankMemory,
    StepTraffic,
    dense_flops,
    flops,
    memory,
    store_bytes_per_token,
    traffic,
)
from clt.planning.job import Job, MeshShape, Numerics, Parameters, numerics_of, pairs, parameters
from clt.planning.speed import MachineModel, StepTime, step_time
from clt.training.metrics import BYTES_PER_STEP
from clt.training.settings import TrainConfig
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import target_layers

#: World sizes tried in search of the smallest one that fits.
WORLDS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned job.

    Attributes:
        job: the job.
        machine: the machine, one device per rank.
        tokens: tokens to train on.
        parameters: of the whole transcoder.
        pairs: (source, target) decoders.
        rank_parameters: of the rank with most parameters, and of the one with fewest.
        memory: of the rank that needs most memory.
        traffic: bytes that a rank receives in a step.
        flops: of a step over all ranks.
        dense_flops: of a step that decodes every feature.
        store_bytes: activations of `tokens` tokens in bfloat16.
        step: projected seconds of a step.
    """

    job: Job
    machine: MachineModel
    tokens: float
    parameters: Parameters
    pairs: int
    rank_parameters: tuple[int, int]
    memory: RankMemory
    traffic: StepTraffic
    flops: Flops
    dense_flops: float
    store_bytes: float
    step: StepTime

    @property
    def fits(self) -> bool:
        """True if the rank that needs most memory fits on a device."""
        return self.memory.total <= self.machine.memory * self.machine.usable

    @property
    def tokens_per_second(self) -> float:
        """Projected tokens/s over all ranks, if the store is fast enough."""
        return self.job.config.data.batch_tokens / self.step.total

    @property
    def seconds(self) -> float:
        """Projected seconds for all tokens."""
        return self.tokens / self.tokens_per_second

    @property
    def store_rate(self) -> float:
        """Bytes/s that the store must deliver to all nodes together at that speed."""
        return self.tokens_per_second * self.store_bytes / self.tokens


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """Speed and traffic that a run of a job reported.

    Attributes:
        tokens_per_second: over all ranks.
        bytes_per_step: sent by the reporting rank.
    """

    tokens_per_second: float
    bytes_per_step: float


def plan(
    config: TrainConfig,
    architecture: CLTConfig,
    machine: MachineModel,
    *,
    world: int | None = None,
    tokens: float | None = None,
    numerics: Numerics | None = None,
) -> Plan:
    """Plans a job on the mesh of its configuration.

    Args:
        config: the job.
        architecture: its architecture.
        machine: the machine, one device per rank.
        world: processes; default: one model group.
        tokens: tokens to train on; default: all steps of the job.
        numerics: dtypes of weights and optimizer; default: those of the configuration.

    Returns:
        The plan.

    Raises:
        ConfigError: the mesh does not divide the processes, the layers, the width or the batch; names the key.
    """
    group = config.mesh.layer * config.mesh.column
    world = world or group
    check_world(world, config.mesh.layer, config.mesh.column)
    numerics, data = numerics or numerics_of(config.optimizer), world // group
    zero = config.zero_stage(data) if config.mesh.zero_stage is not None or data > 1 else numerics.zero[0]
    shape = MeshShape(data=data, layer=config.mesh.layer, column=config.mesh.column, zero=zero)
    if config.data.batch_tokens % shape.data:
        raise ConfigError(
            f"data.batch_tokens={config.data.batch_tokens} does not divide over {shape.data} data ranks; "
            f"take a multiple of {shape.data}"
        )
    if shape.zero not in numerics.zero:
        raise ConfigError(
            f"mesh.zero_stage={shape.zero} is not supported with {numerics.name}; set it to {numerics.zero[0]}"
        )
    if data > 1 and not numerics.replicas:
        raise ConfigError(
            f"{numerics.name} does not support data parallelism ({data} replicas requested); raise mesh.layer or "
            "mesh.column"
        )
    job = Job(config=config, architecture=architecture, mesh=shape, numerics=numerics)
    return _planned(job, machine, tokens or config.steps * config.data.batch_tokens)


def _planned(job: Job, machine: MachineModel, tokens: float) -> Plan:
    shares = job.shares()
    own = [parameters(job.architecture, share).total for share in shares]
    return Plan(
        job=job,
        machine=machine,
        tokens=tokens,
        parameters=parameters(job.architecture),
        pairs=pairs(job.architecture),
        rank_parameters=(max(own), min(own)),
        memory=max((memory(job, share) for share in shares), key=lambda need: need.total),
        traffic=traffic(job),
        flops=flops(job),
        dense_flops=dense_flops(job),
        store_bytes=tokens * store_bytes_per_token(job.architecture),
        step=step_time(job, machine),
    )


def meshes(job: Job, world: int) -> Iterator[MeshShape]:
    """Every mesh on which the job can run, with the job's ZeRO stage where there are replicas, else 0.

    Args:
        job: the job.
        world: processes.
    """
    for layer in _divisors(world, len(target_layers(job.architecture))):
        for column in _divisors(world // layer, job.architecture.d_model):
            data = world // layer // column
            if job.architecture.d_model % column == 0 and job.config.data.batch_tokens % data == 0:
                zero = job.config.zero_stage(data) if data > 1 else 0
                yield MeshShape(data=data, layer=layer, column=column, zero=zero)


def alternatives(chosen: Plan, world: int | None = None, numerics: Numerics | None = None) -> list[Plan]:
    """Plans of the job on every mesh where it fits: fastest first, of equally fast ones those with few columns first.

    Args:
        chosen: a plan of the job.
        world: number of processes; default: that of the plan.
        numerics: dtypes of weights and optimizer; default: as in that plan.

    Returns:
        The plans; empty if the job fits on no mesh.
    """
    job = replace(chosen.job, numerics=numerics or chosen.job.numerics)
    found = []
    for shape in meshes(job, world or job.mesh.world):
        if shape.data > 1 and not job.numerics.replicas:
            continue
        if shape.zero not in job.numerics.zero:
            shape = replace(shape, zero=job.numerics.zero[0])
        found.append(_planned(replace(job, mesh=shape), chosen.machine, chosen.tokens))
    fitting = [candidate for candidate in found if candidate.fits]
    # To three digits: a projection is not more precise.
    return sorted(fitting, key=lambda p: (-float(f"{p.tokens_per_second:.3g}"), p.job.mesh.column, p.job.mesh.layer))


def smallest(chosen: Plan, numerics: Numerics | None = None) -> Plan | None:
    """Plan on the fewest devices (of `WORLDS`) on which the job fits, on the fastest mesh; None if it fits on none."""
    for world in WORLDS:
        fitting = alternatives(chosen, world, numerics)
        if fitting:
            return fitting[0]
    return None


def measured_run(output: Path) -> MeasuredRun | None:
    """Medians over the second half of the reports in a run's `metrics.jsonl`; None without such a run.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = output / METRICS_FILE
    if not path.exists():
        return None
    reports = [report for report in read_metrics(path) if "tokens_per_second" in report]
    late = reports[len(reports) // 2 :]
    if not late:
        return None
    sent = [sum(value for tag, value in report.items() if tag.startswith(f"{BYTES_PER_STEP}/")) for report in late]
    return MeasuredRun(
        tokens_per_second=sorted(report["tokens_per_second"] for report in late)[len(late) // 2],
        bytes_per_step=sorted(sent)[len(late) // 2],
    )


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
