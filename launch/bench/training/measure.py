"""Starts the ranks of the training benchmark and turns their results into rows of its tables."""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clt.launch.bench.training.rank import DENSE, RankResult, Task
from clt.launch.bench.training.roofline import least_time
from clt.launch.bench.training.sizes import TrainSize, planned_job
from clt.planning.counts import memory, traffic
from clt.planning.job import Job, MeshShape
from clt.planning.speed import MachineModel

log = logging.getLogger(__name__)

#: Runs a command in a new network namespace, whose loopback interface carries nothing else.
_ISOLATED = ("unshare", "--map-root-user", "--net")
#: Data, layer, column, ZeRO stage, by number of ranks: every axis alone, and combined.
MESHES: Mapping[int, tuple[tuple[int, int, int, int], ...]] = {
    1: ((1, 1, 1, 0),),
    2: ((1, 2, 1, 0), (1, 1, 2, 0), (2, 1, 1, 0), (2, 1, 1, 1)),
    4: ((1, 4, 1, 0), (1, 2, 2, 0), (1, 1, 4, 0), (2, 2, 1, 0), (4, 1, 1, 0), (2, 2, 1, 1)),
}


@dataclass(frozen=True, kw_only=True)
class VariantRow:
    """One variant of a size, or the dense baseline.

    Attributes:
        name: of the variant.
        tokens: per step.
        steps: seconds of every step by phase.
        peak_bytes: peak memory; None where the system does not report it.
        planned_bytes: memory by `clt plan`; None for the dense baseline.
        least_s: minimum seconds of a step by the roofline; None for the dense baseline.
        least: the same by part of the step.
        absent: reason why it was not measured, or None.
    """

    name: str
    tokens: int
    steps: tuple[dict[str, float], ...] = ()
    peak_bytes: int | None = None
    planned_bytes: float | None = None
    least_s: float | None = None
    least: dict[str, float] | None = None
    absent: str | None = None

    @property
    def seconds(self) -> tuple[float, ...]:
        """Seconds of every step."""
        return tuple(sum(step.values()) for step in self.steps)

    @property
    def best_s(self) -> float:
        """Seconds of the shortest step."""
        return min(self.seconds)

    @property
    def median_s(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.seconds)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of every phase in the shortest step."""
        return min(self.steps, key=lambda step: sum(step.values()))


@dataclass(frozen=True, kw_only=True)
class TrafficRow:
    """Bytes of a step on one mesh.

    Attributes:
        size: name of the size.
        mesh: the processes.
        counted: bytes sent by the rank that sends most, counted where collectives start.
        formula: bytes by `clt.planning.counts.traffic`.
        auxk: part of them for codes of dead features and their gradients.
        loopback: bytes per rank on the loopback interface, headers included; None where it is shared.
        peak_bytes: memory of the rank with the highest peak.
    """

    size: str
    mesh: MeshShape
    counted: int
    formula: float
    auxk: float
    loopback: float | None
    peak_bytes: int | None


def run_task(task: Task) -> list[RankResult]:
    """Runs the ranks of a task; returns their results in order of rank.

    Raises:
        RuntimeError: a rank failed, which is a bug; with the end of its standard error.
    """
    isolated = _ISOLATED if task.private_network else ()
    with tempfile.TemporaryDirectory(prefix="clt-bench-") as folder:
        command = (*isolated, sys.executable, "-m", "clt.launch.bench.training.rank", json.dumps(asdict(task)), folder)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{task}: exit code {done.returncode}\n{done.stderr[-4000:]}")
        texts = [(Path(folder) / f"{rank}.json").read_text() for rank in range(task.world)]
    return [RankResult(**json.loads(text)) for text in texts]


def can_isolate() -> bool:
    """True if this system allows a job its own network namespace."""
    if shutil.which(_ISOLATED[0]) is None:
        return False
    return subprocess.run([*_ISOLATED, "true"], capture_output=True, check=False).returncode == 0


def measure_size(size: TrainSize, steps: int, turns: int, machine: MachineModel) -> tuple[VariantRow, ...]:
    """Measures all variants of a size and the dense baseline in turns, each turn in its own process.

    Args:
        size: the size.
        steps: measured steps per turn.
        turns: of each variant; more than one where other load varies, so that it affects all variants.
        machine: measured rates.
    """
    planned = {variant.name: planned_job(size, variant) for variant in size.variants}
    names = [*planned, *(name for name, dtype in DENSE.items() if dtype in size.dense)]
    seen: dict[str, list[RankResult]] = {name: [] for name in names}
    for _ in range(turns):
        for name in names:
            seen[name] += run_task(Task(size=size.name, variant=name, steps=steps))
            last = seen[name][-1]
            best = min((sum(step.values()) for step in last.steps), default=math.nan)
            log.info("bench %s: %s: %s", size.name, name, last.absent or f"best_step_s={best:.4f}")
    return tuple(_row(size, name, seen[name], planned.get(name), machine) for name in names)


def _row(size: TrainSize, name: str, seen: Sequence[RankResult], job: Job | None, machine: MachineModel) -> VariantRow:
    """A row of the steps of all turns; `job` is None for the dense baseline."""
    least = None if job is None else least_time(job, machine)
    return VariantRow(
        name=name,
        tokens=size.batch_tokens,
        steps=tuple(step for turn in seen for step in turn.steps),
        peak_bytes=max((turn.peak_bytes for turn in seen if turn.peak_bytes is not None), default=None),
        planned_bytes=None if job is None else memory(job, job.shares()[0]).total,
        least_s=None if least is None else least.total,
        least=None if least is None else vars(least),
        absent=next((turn.absent for turn in seen if turn.absent), None),
    )


def measure_traffic(
    size: TrainSize, meshes: Sequence[tuple[int, int, int, int]], steps: int, private: bool
) -> tuple[tuple[TrafficRow, ...], float | None]:
    """Measures the bytes of a step of the first variant on some meshes.

    Args:
        size: the size.
        meshes: data, layer, column and ZeRO stage of each.
        steps: measured steps.
        private: whether the ranks get their own network namespace.

    Returns:
        One row per mesh, and the fastest link in bytes/s, None if every mesh has one rank.
    """
    rows, links = [], []
    for data, layer, column, zero in meshes:
        task = Task(
            size=size.name,
            variant=size.variants[0].name,
            steps=steps,
            data=data,
            layer=layer,
            column=column,
            zero=zero,
            private_network=private,
        )
        seen = run_task(task)
        job = planned_job(size, size.variants[0], data, layer, column, zero)
        planned = traffic(job)
        rows.append(
            TrafficRow(
                size=size.name,
                mesh=job.mesh,
                counted=max(sum((rank.sent or {}).values()) for rank in seen),
                formula=planned.total,
                auxk=planned.auxk,
                loopback=None if seen[0].loopback is None else seen[0].loopback / len(seen),
                peak_bytes=max((rank.peak_bytes for rank in seen if rank.peak_bytes is not None), default=None),
            )
        )
        links += [rank.link for rank in seen if rank.link is not None]
        log.info("bench %s: counted_bytes=%d formula_bytes=%d", job.mesh, rows[-1].counted, planned.total)
    return tuple(rows), max(links, default=None)
