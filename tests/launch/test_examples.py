"""The example scripts are valid shell, and the commands that they start exist and accept their arguments."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted((ROOT / "launch" / "examples").glob("*.sh"))
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launch" / "examples" / script), *words],
        cwd=ROOT,
        env=os.environ | {"PATH": PATH, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def stand_in(folder: Path, name: str, body: str) -> None:
    """Replaces a command by a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_executable_shell(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_command_of_a_script_exists_and_accepts_its_options(script: Path) -> None:
    text = script.read_text().replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if "launch/" in line and not line.startswith("#")]
    words = shlex.split(command.replace("; then", ""))
    target = next(word for word in words if word.startswith("launch/"))
    assert (ROOT / target).exists()
    if "torchrun" not in words:
        return
    words = words[words.index("torchrun") + 1 :]
    options = {word for word in words[: words.index(target)] if word.startswith("--")}
    assert options <= _torchrun_options(), options


@functools.cache
def _torchrun_options() -> set[str]:
    command = [str(Path(sys.executable).parent / "torchrun"), "--help"]
    return set(re.findall(r"--[a-z-]+", subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def test_single_node_reaches_the_training_script() -> None:
    done = run("single_node.sh", "configs/train/toy.yaml", "steps=7", "--dry-run", GPUS="1")
    assert done.returncode == 0, done.stderr
    assert "steps: 7" in done.stdout


def test_multi_node_reaches_the_training_script_and_names_missing_variables() -> None:
    done = run("multi_node.sh", "configs/train/toy.yaml", "--dry-run", NODES="1", HEAD="127.0.0.1", PORT="0", GPUS="1")
    assert done.returncode == 0, done.stderr
    assert "n_features: 1024" in done.stdout
    missing = run("multi_node.sh", "configs/train/toy.yaml")
    assert missing.returncode != 0 and "NODES: number of machines" in missing.stderr


@pytest.mark.parametrize(
    ("ending", "requeued"),
    [
        ("exit 0", False),  # done
        ("echo step_00000500 >$OUTPUT/latest; exit 1", True),  # ended by the time limit, with a new checkpoint
        ("exit 1", False),  # failed where it started
    ],
)
def test_slurm_queues_again_only_what_got_further(tmp_path: Path, ending: str, requeued: bool) -> None:
    stand_in(tmp_path, "srun", f"echo srun $@; {ending}")
    stand_in(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo first; echo second; else echo scontrol $@; fi')
    output = tmp_path / "out"
    output.mkdir()
    done = run(
        "slurm.sh",
        "configs/train/toy.yaml",
        PATH=f"{tmp_path}{os.pathsep}{PATH}",
        OUTPUT=str(output),
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_GPUS_ON_NODE="8",
        SLURM_JOB_ID="42",
    )
    assert ("scontrol requeue 42" in done.stdout) == requeued
    assert (done.returncode == 0) == (ending == "exit 0")
    assert "--nnodes 2 --nproc-per-node 8" in done.stdout and "first:29500" in done.stdout
    assert done.stdout.splitlines()[0].endswith(f"launch/train.py configs/train/toy.yaml output={output}")


def test_slurm_gives_two_minutes_of_grace_and_the_ranks_nearly_all_of_it() -> None:
    text = (ROOT / "launch" / "examples" / "slurm.sh").read_text()
    (grace,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", text, re.MULTILINE)
    (timeout,) = re.findall(r"--shutdown-timeout (\d+)", text)
    assert int(timeout) < int(grace)
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)


def test_capture_on_two_processes_and_by_one_task_of_an_array_is_the_same_store(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: examples/toy_vlm/checkpoints/base\noutput: {tmp_path}/store\nrows_per_unit: 256\n"
        "chunk_tokens: 64\nsource: {toy: {n: 12}}\n"
    )
    done = run("capture.sh", str(job), WORKERS="2")
    assert done.returncode == 0, done.stderr
    task = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "2"}
    alone = run("capture_slurm.sh", str(job), f"output={tmp_path}/other", **task)
    assert alone.stdout == done.stdout != "", "one task does the work of all when no other comes"
    missing = run("capture_slurm.sh", str(job))
    assert missing.returncode != 0 and "sbatch --array" in missing.stderr


def test_capture_of_several_jobs_goes_on_after_one_that_fails(tmp_path: Path) -> None:
    stand_in(tmp_path, "torchrun", 'echo "$@"; [ "${@: -1}" != bad.yaml ]')
    done = run("capture_all.sh", "a.yaml", "bad.yaml", "c.yaml", PATH=f"{tmp_path}{os.pathsep}{PATH}", WORKERS="3")
    assert done.returncode == 1 and done.stderr.strip() == "failed: bad.yaml"
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["a.yaml", "bad.yaml", "c.yaml"]
    assert "--nproc-per-node 3" in done.stdout
    assert run("capture_all.sh", "a.yaml", PATH=f"{tmp_path}{os.pathsep}{PATH}").returncode == 0
