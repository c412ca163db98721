"""Starts the ranks of the training benchmark and turns what they saw into rows of its tables."""

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

from clt.launch.bench.training.anchors import least_time
from clt.launch.bench.training.rank import DENSE, RankResult, Task
from clt.launch.bench.training.sizes import Size, planned_job
from clt.planning.counts import memory, traffic
from clt.planning.job import Job, MeshShape
from clt.planning.speed import MachineModel

log = logging.getLogger(__name__)

#: A network namespace of its own, in which the loopback interface carries nothing else.
_ISOLATED = ("unshare", "--map-root-user", "--net")
#: data, layer, column, ZeRO: every axis by itself, and together, by how many ranks there are.
MESHES: Mapping[int, tuple[tuple[int, int, int, int], ...]] = {
    1: ((1, 1, 1, 0),),
    2: ((1, 2, 1, 0), (1, 1, 2, 0), (2, 1, 1, 0), (2, 1, 1, 1)),
    4: ((1, 4, 1, 0), (1, 2, 2, 0), (1, 1, 4, 0), (2, 2, 1, 0), (4, 1, 1, 0), (2, 2, 1, 1)),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train a size, or the naive one.

    Attributes:
        name: who.
        tokens: of a step.
        steps: seconds of every step by phase.
        peak_bytes: memory at most; None where the system does not tell.
        planned_bytes: what `clt plan` says of it; None of the naive way.
        least_s: least seconds of a step by the ceilings of the machine; None of the naive way.
        least: the same by part of the step.
        absent: why it was not measured.
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
        size: what was trained.
        mesh: the processes.
        counted: sent by the rank that sends most, counted where collectives start.
        formula: `clt.planning.counts.traffic`.
        auxk: of these, codes of dead features and their gradients.
        loopback: per rank, read off the loopback interface, headers included; None where it carries other things too.
        peak_bytes: memory of the rank that takes most.
    """

    size: str
    mesh: MeshShape
    counted: int
    formula: float
    auxk: float
    loopback: float | None
    peak_bytes: int | None


def run_task(task: Task) -> list[RankResult]:
    """Runs the ranks of a task to their end; what each of them saw, in order of rank.

    Raises:
        RuntimeError: a rank failed, which is a defect; with its last words.
    """
    isolated = _ISOLATED if task.private_network else ()
    with tempfile.TemporaryDirectory(prefix="clt-bench-") as folder:
        command = (*isolated, sys.executable, "-m", "clt.launch.bench.training.rank", json.dumps(asdict(task)), folder)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{task}: code {done.returncode}\n{done.stderr[-4000:]}")
        texts = [(Path(folder) / f"{rank}.json").read_text() for rank in range(task.world)]
    return [RankResult(**json.loads(text)) for text in texts]


def can_isolate() -> bool:
    """Whether a job can have a loopback interface of its own here."""
    if shutil.which(_ISOLATED[0]) is None:
        return False
    return subprocess.run([*_ISOLATED, "true"], capture_output=True, check=False).returncode == 0


def measure_size(size: Size, steps: int, turns: int, machine: MachineModel) -> tuple[Row, ...]:
    """All variants of a size and the naive way, by turns, each turn in a process of its own.

    Args:
        size: what is trained.
        steps: measured steps of each turn.
        turns: of each; more than one where the machine has other work, which then strikes all of them.
        machine: its ceilings.
    """
    planned = {variant.name: planned_job(size, variant) for variant in size.variants}
    names = [*planned, *(name for name, dtype in DENSE.items() if dtype in size.dense)]
    seen: dict[str, list[RankResult]] = {name: [] for name in names}
    for _ in range(turns):
        for name in names:
            seen[name] += run_task(Task(size=size.name, variant=name, steps=steps))
            last = seen[name][-1]
            best = min((sum(step.values()) for step in last.steps), default=math.nan)
            log.info("bench: %s: %s: %s", size.name, name, last.absent or f"best step {best:.4f} s")
    return tuple(_row(size, name, seen[name], planned.get(name), machine) for name in names)


def _row(size: Size, name: str, seen: Sequence[RankResult], job: Job | None, machine: MachineModel) -> Row:
    """The steps of all turns; `job` is None for the naive way."""
    least = None if job is None else least_time(job, machine)
    return Row(
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
    size: Size, meshes: Sequence[tuple[int, int, int, int]], steps: int, private: bool
) -> tuple[tuple[TrafficRow, ...], float | None]:
    """Bytes of a step on some meshes, and the fastest link that two ranks or more saw.

    Args:
        size: what is trained, by its first variant.
        meshes: data, layer, column and ZeRO stage of each.
        steps: measured steps.
        private: whether the ranks get a network namespace of their own.
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
        log.info("bench: %s: %d bytes counted, %d by the formula", job.mesh, rows[-1].counted, planned.total)
    return tuple(rows), max(links, default=None)
