"""The toy training job on ranks that are killed at a point of a checkpoint, or after some time.

A rank runs the code of every training; what the standard library and safetensors do to files is noted on the way, so
that the kill happens at a named point of a checkpoint.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..worker_processes import Kill, KillPoint, WorkerServer, serve
from .launched import free_port

#: Modules that PyTorch, DeepSpeed and the reports import lazily: seconds on a busy machine.
LATE_IMPORTS = ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard")

#: Points of a checkpoint at which a rank can be killed: operation and file of the output folder.
#: half: half of it is on disk. from, to: before and after a rename, or the making of a folder.
POINTS = {
    "before-folder": ("from", r"\.step_\d+\.tmp"),
    "after-folder": ("to", r"\.step_\d+\.tmp"),
    "mid-weights": ("half", r".*/layer_\d+\.safetensors"),
    "after-weights": ("whole", r".*/layer_\d+\.safetensors"),
    "mid-optimizer": ("half", r".*/optimizer_\d+\.safetensors"),
    "after-optimizer": ("whole", r".*/optimizer_\d+\.safetensors"),
    "mid-checksums": ("half", r".*/files_\d+\.json"),
    "mid-scaling": ("half", r".*/scaling\.safetensors"),
    "mid-progress": ("half", r".*/progress\.json"),
    "mid-config": ("half", r".*/config\.yaml"),
    "mid-manifest": ("half", r".*/manifest\.json"),
    "after-manifest": ("whole", r".*/manifest\.json"),
    "after-rename": ("to", r"step_\d+"),
    "mid-pointer": ("half", r"\.latest\.tmp"),
    "before-pointer": ("from", r"latest"),
    "after-pointer": ("to", r"latest"),
    "mid-prune": ("to", r"\.step_\d+\.old\.tmp"),
    "mid-removal": ("removal", r"\.step_\d+\.old\.tmp"),
}


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """The job of a rank.

    Attributes:
        output: folder of the job.
        scratch: folder in which ranks note their process and their last step.
        rank: number of the process.
        world: number of ranks.
        port: of their rendezvous.
        mesh: keys of `mesh`.
        steps: to train.
        point: one of `POINTS` at which this rank kills the victim; None: nowhere.
        arrival: kill at this arrival there, counted from 1.
        victim: rank that is killed.
        hanging_step: step whose batch this rank never gets.
        defect_step: step whose batch raises on this rank.
    """

    output: str
    scratch: str
    rank: int = 0
    world: int = 1
    port: int = 0
    mesh: dict[str, Any]
    steps: int = 12
    point: str | None = None
    arrival: int = 1
    victim: int = 0
    hanging_step: int | None = None
    defect_step: int | None = None


class CheckpointKiller:
    """Records file operations of a rank in its output folder, and kills the victim at the rank's point."""

    def __init__(self, job: RankJob) -> None:
        self._scratch, self._output, self._victim = Path(job.scratch), f"{job.output}/", job.victim
        point = POINTS[job.point] if job.point else None
        self._point = KillPoint(self._scratch / f"trace_{job.rank}", point, job.arrival)

    def _reached(self, step: str, path: Any) -> bool:
        return self._point.reached(step, str(path).removeprefix(self._output))

    def _kill(self) -> None:
        """Kills the victim; does not return when that is this process."""
        os.kill(int((self._scratch / f"pid_{self._victim}").read_text()), signal.SIGKILL)

    def install(self) -> None:
        """Wraps the functions that write, rename and remove files."""
        from clt.checkpoint import manifest

        os.replace = self._around(os.replace, lambda _source, target: target)  # type: ignore[assignment]
        Path.mkdir = self._around(Path.mkdir, lambda folder, *_: folder)  # type: ignore[method-assign]
        Path.write_text = self._half(Path.write_text)  # type: ignore[method-assign]
        manifest.write_tensors = self._half(manifest.write_tensors)
        remove = shutil.rmtree

        def rmtree(folder: Path, **options: Any) -> None:
            if self._reached("removal", folder):
                next(iter(folder.iterdir())).unlink()
                self._kill()
            remove(folder, **options)

        shutil.rmtree = rmtree  # type: ignore[assignment]

    def _around(self, act: Callable[..., Any], name: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> None:
            if self._reached("from", name(*arguments)):
                self._kill()
            act(*arguments, **options)
            if self._reached("to", name(*arguments)):
                self._kill()

        return watched

    def _half(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Path, *arguments: Any, **options: Any) -> None:
            if self._reached("half", path):
                write(path, *arguments, **options)
                os.truncate(path, path.stat().st_size // 2)
                self._kill()
            write(path, *arguments, **options)
            if self._reached("whole", path):
                self._kill()

        return watched


@dataclass(frozen=True, kw_only=True)
class RankKill(Kill):
    """Time at which a rank is killed: when some rank arrives at a point, or some seconds after training began.

    Attributes:
        victim: rank that is killed.
        killer: rank that arrives at the point.
        alone: whether the other rank must detect it and end by itself.
    """

    victim: int = 0
    killer: int = 0
    alone: bool = False


def draw_kills(points: Sequence[str], at_random: int, world: int, writers: int, rng: random.Random) -> list[RankKill]:
    """Kills at points and at random moments, in random order, on random ranks.

    Args:
        points: of `POINTS`.
        at_random: number of kills at random moments.
        world: ranks of the job.
        writers: ranks that write layer files; everything else is written by the first.
        rng: draws.
    """
    kills = []
    for point in points:
        layers = "weights" in point or "optimizer" in point
        killer, arrival = rng.randrange(writers if layers else 1), rng.randint(1, 5 if layers else 2)
        kills.append(RankKill(point=point, victim=rng.randrange(world), killer=killer, arrival=arrival))
    kills += [
        RankKill(point="random", victim=rng.randrange(world), delay=rng.uniform(0, 0.6)) for _ in range(at_random)
    ]
    kills = [replace(kill, alone=world > 1 and rng.random() < 0.25) for kill in kills]
    rng.shuffle(kills)
    return kills


class Ranks(WorkerServer):
    """Ranks of the toy training job."""

    def __init__(self, folder: Path) -> None:
        super().__init__(__name__, folder, PATH="")
        self._folder, self._jobs = folder, 0

    def start(
        self, output: Path, mesh: dict[str, Any], world: int, fields: Mapping[int, Any]
    ) -> tuple[list[int], Path]:
        """Starts the ranks of a job; returns their processes, and the folder in which they note what they do.

        Args:
            output: folder of the job.
            mesh: keys of `mesh`.
            world: ranks.
            fields: by rank, further fields of its `RankJob`; None: the rank does not start.
        """
        self._jobs += 1
        scratch, port = self._folder / f"job-{self._jobs}", free_port()
        scratch.mkdir()
        common = {"output": str(output), "scratch": str(scratch), "world": world, "port": port, "mesh": mesh}
        jobs = [
            RankJob(rank=rank, **common, **fields.get(rank, {}))
            for rank in range(world)
            if fields.get(rank, {}) is not None
        ]
        return [self.fork(**asdict(job)) for job in jobs], scratch

    def run(self, output: Path, mesh: dict[str, Any], world: int, kill: RankKill | None) -> list[int]:
        """Runs a job to its end or to the kill; returns the exit codes of its ranks, negative for signals."""
        named = kill is not None and kill.point in POINTS
        fields = {kill.killer: {"point": kill.point, "arrival": kill.arrival, "victim": kill.victim}} if named else {}
        processes, scratch = self.start(output, mesh, world, fields)
        killer = threading.Thread(target=self._kill_later, args=(scratch, processes, kill), daemon=True)
        killer.start()
        codes = dict.fromkeys(processes, 0)
        for _ in processes:
            process, code = self.wait()
            codes[process] = code
            if code and not (kill is not None and kill.alone):
                self.kill_all()
        killer.join()
        return [codes[process] for process in processes]

    def trains(self, scratch: Path, rank: int, process: int) -> bool:
        """Waits until a rank trains; False if it has ended before that."""
        while process in self.alive and not (scratch / f"trains_{rank}").exists():
            time.sleep(0.002)
        return process in self.alive

    def _kill_later(self, scratch: Path, processes: list[int], kill: RankKill | None) -> None:
        if kill is None or kill.point in POINTS:
            return
        victim = processes[kill.victim]
        if self.trains(scratch, kill.victim, victim):
            time.sleep(kill.delay)
        self.kill(victim)


def work(**fields: Any) -> int:
    """Does a `RankJob`, to the end or to the kill."""
    from clt.distributed.job_control import JobControl
    from clt.distributed.mesh import Mesh
    from clt.training.deepspeed_engine import joined_job

    from .toy_job import toy_config, toy_trainer

    job = RankJob(**fields)
    if job.world > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port), "WORLD_SIZE": str(job.world)}
        os.environ |= address | {"RANK": str(job.rank), "LOCAL_RANK": str(job.rank)}
    (Path(job.scratch) / f"pid_{job.rank}").write_text(str(os.getpid()))
    killer, batches = CheckpointKiller(job), {"hanging_step": job.hanging_step, "defect_step": job.defect_step}
    config = toy_config(Path(job.output), mesh=job.mesh, steps=job.steps, checkpoint_every=2)
    control = JobControl()
    with joined_job(config.mesh.timeout_seconds, control):
        mesh = Mesh.create(config.mesh.layer, config.mesh.column)
        trainer = toy_trainer(config, mesh, control=control, **batches)
        killer.install()
        (Path(job.scratch) / f"trains_{job.rank}").touch()
        trainer.fit()
    return 0


def import_everything() -> None:
    """Imports the modules of all ranks before any is forked."""
    import deepspeed  # noqa: F401

    from . import toy_job  # noqa: F401

    for module in LATE_IMPORTS:
        importlib.import_module(module)
    torch.set_num_threads(1)


if __name__ == "__main__":
    serve(work, import_everything)
