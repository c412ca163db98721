"""The toy training job in processes that die where they are told to.

As a script it is a server: it imports everything once and then forks a rank for each job that comes as a line of JSON
on its standard input. A rank is a process like any other, and what kills it is a real SIGKILL. It runs the code of
every training; only what the standard library and safetensors do to files is noted on the way, so that the blow falls
at a named point of a checkpoint.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

sys.path.insert(0, str(Path(__file__).parent))

#: What PyTorch, DeepSpeed and the reports import when a rank is first in need of it: seconds on a busy machine.
LATE_IMPORTS = ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard")

#: Where the blow can fall in a checkpoint: what is done to which file of the output folder.
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
class Job:
    """What a rank does.

    Attributes:
        output: folder of the job.
        scratch: folder in which ranks note their process and their last act.
        rank: number of the process.
        world: how many there are.
        port: where they meet.
        mesh: keys of `mesh`.
        steps: to train.
        point: one of `POINTS` at which this rank strikes; None: nowhere.
        arrival: when it comes there for the so-manieth time.
        victim: rank that is struck.
        hanging_step: step whose batch this rank never gets.
        defect_step: step whose batch shows a defect on this rank.
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


class Doom:
    """Watches what a rank does to the files of its output folder, and strikes."""

    def __init__(self, job: Job) -> None:
        self._job, self._left = job, job.arrival
        self._scratch, self._output = Path(job.scratch), f"{job.output}/"
        self._trace = os.open(self._scratch / f"trace_{job.rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def at(self, act: str, path: Any) -> bool:
        """Notes an act and says whether it is the one."""
        name = str(path).removeprefix(self._output)
        os.pwrite(self._trace, f"{act} {name}".ljust(100).encode(), 0)
        if self._job.point is None:
            return False
        doomed, files = POINTS[self._job.point]
        if act != doomed or not re.fullmatch(files, name):
            return False
        self._left -= 1
        return self._left == 0

    def strike(self) -> None:
        """Kills the victim; does not return when that is this process."""
        os.kill(int((self._scratch / f"pid_{self._job.victim}").read_text()), signal.SIGKILL)

    def watch(self) -> None:
        """Wraps what writes, renames and removes files."""
        from clt.checkpoint import manifest

        os.replace = self._around(os.replace, lambda _source, target: target)  # type: ignore[assignment]
        Path.mkdir = self._around(Path.mkdir, lambda folder, *_: folder)  # type: ignore[method-assign]
        Path.write_text = self._half(Path.write_text)  # type: ignore[method-assign]
        manifest.write_tensors = self._half(manifest.write_tensors)
        remove = shutil.rmtree

        def rmtree(folder: Path, **options: Any) -> None:
            if self.at("removal", folder):
                next(iter(folder.iterdir())).unlink()
                self.strike()
            remove(folder, **options)

        shutil.rmtree = rmtree  # type: ignore[assignment]

    def _around(self, act: Callable[..., Any], name: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> None:
            if self.at("from", name(*arguments)):
                self.strike()
            act(*arguments, **options)
            if self.at("to", name(*arguments)):
                self.strike()

        return watched

    def _half(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Path, *arguments: Any, **options: Any) -> None:
            if self.at("half", path):
                write(path, *arguments, **options)
                os.truncate(path, path.stat().st_size // 2)
                self.strike()
            write(path, *arguments, **options)
            if self.at("whole", path):
                self.strike()

        return watched


def work(job: Job) -> int:
    """Trains to the end, or to the blow."""
    from toy_job import toy_config, toy_trainer

    from clt.distributed.job_control import JobControl
    from clt.distributed.mesh import Mesh
    from clt.training.deepspeed_engine import joined_job

    if job.world > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port), "WORLD_SIZE": str(job.world)}
        os.environ |= address | {"RANK": str(job.rank), "LOCAL_RANK": str(job.rank)}
    (Path(job.scratch) / f"pid_{job.rank}").write_text(str(os.getpid()))
    doom, batches = Doom(job), {"hanging_step": job.hanging_step, "defect_step": job.defect_step}
    config = toy_config(Path(job.output), mesh=job.mesh, steps=job.steps, checkpoint_every=2)
    control = JobControl()
    with joined_job(config.mesh.timeout_seconds, control):
        mesh = Mesh.create(config.mesh.layer, config.mesh.column)
        trainer = toy_trainer(config, mesh, control=control, **batches)
        doom.watch()
        (Path(job.scratch) / f"trains_{job.rank}").touch()
        trainer.fit()
    return 0


def serve(answers: TextIO) -> None:
    """Answers `{"fork": job}` with a process id and `{"wait": process id or -1}` with process id and wait status."""
    import deepspeed  # noqa: F401
    import toy_job  # noqa: F401

    for module in LATE_IMPORTS:
        importlib.import_module(module)
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = json.dumps(os.waitpid(request["wait"], 0))
        else:
            process = os.fork()
            if process == 0:
                status = 1
                try:
                    status = work(Job(**request["fork"]))
                except BaseException:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(status)
            answer = json.dumps(process)
        answers.write(answer + "\n")
        answers.flush()


if __name__ == "__main__":
    # What libraries print goes to the log; answers have the pipe for themselves.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(own)
