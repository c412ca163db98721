"""Faults of a running job: signals, lost and hanging ranks, a restarting launcher, a full disk, bad numbers."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clt.checkpoint.manifest import latest_folder, verify_folder
from clt.distributed.job_control import ONE_REQUEST_SECONDS, JobControl, stop_on_signals
from clt.distributed.mesh import Mesh
from clt.distributed.rendezvous import agree_on_token
from clt.distributed.watchdog import EXIT_LOST_RANK, Heartbeat, find_behind, find_lost
from clt.errors import CheckpointError, CLTError, NonFiniteError
from clt.training.deepspeed_engine import joined_job

from ..kill_worker import Ranks
from ..launched import SCRIPT, TORCHRUN, errors, free_port, same_bits, start, wait_for
from ..toy_job import toy_config, toy_trainer

#: Meshes of two processes, by name.
MESHES = {
    "data_zero0": {"layer": 1, "zero_stage": 0},
    "data_zero1": {"layer": 1, "zero_stage": 1},
    "data_zero2": {"layer": 1, "zero_stage": 2},
    "layer_zero1": {"layer": 2, "zero_stage": 1},
}


def _fit(output: Path, mesh: dict[str, int], job: dict[str, Any] | None = None, **batches: Any) -> str:
    """Trains; returns the error's class and message, or the name of the last checkpoint."""
    config = toy_config(output, mesh=mesh, **(job or {}))
    try:
        return toy_trainer(config, Mesh.create(config.mesh.layer), **batches).fit().name
    except CLTError as error:
        return f"{type(error).__name__}: {error}"


def _last(output: Path) -> Path:
    folder = latest_folder(output)
    assert folder is not None, output
    verify_folder(folder)
    return folder


def all_cases(root: str) -> dict[str, torch.Tensor]:
    """Every training of this file that needs two ranks that live."""
    folder, second, ends = Path(root), os.environ["RANK"] == "1", {}
    for name, mesh in MESHES.items():
        _fit(folder / "whole" / name, mesh)
        control = JobControl()
        extra = {"control": control, "stop": (control, 3) if second else None}
        ends[f"stopped {name}"] = _fit(folder / "stopped" / name, mesh, **extra)
        ends[f"resumed {name}"] = _fit(folder / "stopped" / name, mesh)
        ends[f"hopeless {name}"] = _fit(folder / "bad", mesh, {"steps": 20}, nan_steps=tuple(range(20)))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    _fit(folder / "limited", MESHES["layer_zero1"], broken_step=4)
    if second:
        # No file of a layer is as small as that. Python ignores the signal that goes with it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    ends["limited"] = _fit(folder / "limited", MESHES["layer_zero1"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ends["left"] = str(sorted(path.name for path in (folder / "limited").iterdir() if "step" in path.name))
    dist.barrier()
    ends["unlimited"] = _fit(folder / "limited", MESHES["layer_zero1"])
    (folder / f"ends_{os.environ['RANK']}.json").write_text(json.dumps(ends))
    return {}


@pytest.fixture(scope="module")
def two_ranks(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks trained."""
    root = tmp_path_factory.mktemp("two_ranks")
    run_ranks(all_cases, 2, root=str(root))
    return root


def _ends(root: Path, case: str) -> list[str]:
    return [json.loads((root / f"ends_{rank}.json").read_text())[case] for rank in range(2)]


@pytest.mark.parametrize("name", MESHES)
def test_all_ranks_stop_after_the_step_in_which_one_is_asked_to(name: str, two_ranks: Path) -> None:
    assert _ends(two_ranks, f"stopped {name}") == ["step_00000004"] * 2


@pytest.mark.parametrize("name", MESHES)
def test_job_that_was_stopped_ends_with_the_same_bits(name: str, two_ranks: Path) -> None:
    assert _ends(two_ranks, f"resumed {name}") == ["step_00000006"] * 2
    same_bits(_last(two_ranks / "whole" / name), _last(two_ranks / "stopped" / name))


@pytest.mark.parametrize("name", MESHES)
def test_ten_bad_steps_end_the_job_on_all_ranks_under_every_zero_stage(name: str, two_ranks: Path) -> None:
    first, second = _ends(two_ranks, f"hopeless {name}")
    assert first == second
    assert first.startswith(f"{NonFiniteError.__name__}: ") and "10 steps in a row, up to step 10" in first


def test_layer_that_one_rank_cannot_write_ends_the_job_on_all_and_keeps_the_last_checkpoint(two_ranks: Path) -> None:
    first, second = _ends(two_ranks, "limited")
    assert first == second
    assert re.match(r"CheckpointError: .*\.step_00000006\.tmp/\w+\.safetensors: cannot be written \(.*File too", first)
    assert "; step_00000003 is kept" in first and "\n" not in first
    assert _ends(two_ranks, "left")[0] == "['step_00000003']"
    assert _ends(two_ranks, "unlimited") == ["step_00000006"] * 2
    same_bits(_last(two_ranks / "whole" / "layer_zero1"), _last(two_ranks / "limited"))


@pytest.fixture
def alone() -> Iterator[Mesh]:
    """A world of one process."""
    with joined_job():
        yield Mesh.create(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder, libc = tmp_path / "disk", ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=2m"):
        pytest.skip(f"cannot mount a small disk ({os.strerror(ctypes.get_errno())})")
    yield folder
    # Detached: a test that failed may have files open.
    assert libc.umount2(bytes(folder), 2) == 0


def _fill(folder: Path, leave_bytes: int) -> Path:
    """A file that takes all space but so many bytes."""
    path, pages = folder / "filler", os.statvfs(folder).f_bavail - leave_bytes // 4096
    path.write_bytes(bytes(pages * 4096))
    return path


@pytest.mark.parametrize(
    ("leave_bytes", "message"),
    [
        (0, r"disk/out: reports cannot be written \(No space left on device\)"),
        # Room for the reports and half of a checkpoint's fifty kilobytes.
        (32_768, r"\.step_00000006\.tmp/.*cannot be written \(.*No space left on device.*; step_00000003 is kept"),
    ],
)
def test_full_disk_ends_the_job_in_one_line_and_keeps_the_last_checkpoint(
    leave_bytes: int, message: str, small_disk: Path, alone: Mesh, tmp_path: Path
) -> None:
    output = small_disk / "out"
    with pytest.raises(CLTError, match="truncated"):
        toy_trainer(toy_config(output), alone, broken_step=4).fit()
    filler = _fill(small_disk, leave_bytes)
    with pytest.raises(CheckpointError, match=message) as error:
        toy_trainer(toy_config(output), alone).fit()
    assert "\n" not in str(error.value)
    assert _last(output).name == "step_00000003"
    assert [path.name for path in output.iterdir() if "step" in path.name] == ["step_00000003"]
    filler.unlink()
    same_bits(toy_trainer(toy_config(tmp_path / "whole"), alone).fit(), toy_trainer(toy_config(output), alone).fit())


def test_sigterm_writes_a_checkpoint_and_the_job_resumes_from_it(job: Path, tmp_path: Path) -> None:
    # Never at its end, and no checkpoint is due before.
    endless = ["steps=10000000", "checkpoint_every=10000000"]
    reports, size, steps = tmp_path / "out" / "metrics.jsonl", 0, [0]
    for _ in range(2):
        process = start([SCRIPT, job, *endless])
        wait_for(reports, process, size)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
        folder, size = _last(tmp_path / "out"), reports.stat().st_size
        assert stdout == f"{folder}\n"
        assert "SIGTERM: stopping after this step" in stderr
        assert (f"resuming: step={steps[-1]}/" in stderr) == (steps[-1] > 0)
        steps.append(int(folder.name.removeprefix("step_")))
    assert 0 < steps[1] < steps[2]


def test_ctrl_c_on_torchrun_is_one_request(job: Path, tmp_path: Path) -> None:
    # The terminal sends the signal to all processes, and torchrun passes it on once more.
    process = start([*TORCHRUN, SCRIPT, job, "steps=10000000", "checkpoint_every=10000000"], new_session=True)
    wait_for(tmp_path / "out" / "metrics.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=240)[1]
    assert "SIGINT: stopping" in stderr and "again:" not in stderr, stderr
    assert _last(tmp_path / "out")


def test_second_signal_ends_a_process_that_hangs_in_a_library() -> None:
    code = (
        "from datetime import timedelta; from torch.distributed import HashStore; import clt.distributed.job_control\n"
        "with clt.distributed.job_control.stop_on_signals():\n"
        "    print('ready', flush=True); HashStore().wait(['never'], timedelta(seconds=100))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(ONE_REQUEST_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT
    assert stderr.splitlines() == [
        "SIGTERM: stopping after this step with a checkpoint; press Ctrl-C again after 3 s to exit immediately "
        "without a checkpoint",
        "SIGINT again: exiting without a checkpoint",
    ]


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals() as control:
        assert not control.stop_requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert control.stop_requested
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_are_left_alone_outside_of_the_main_thread() -> None:
    found = []

    def elsewhere() -> None:
        with stop_on_signals() as control:
            found.append((signal.getsignal(signal.SIGTERM), control.stop_requested))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), False)]


def _beat(**fields: Any) -> Heartbeat:
    return Heartbeat(
        **{"process": "process 7 on node", "beat": 5, "progress": 9, "place": "clt.training.deepspeed_engine line 3"}
        | fields
    )


def test_silent_and_ended_ranks_are_named() -> None:
    ages = {0: 0.0, 1: 5.0}
    assert find_lost({0: _beat(), 1: _beat()}, ages, 6.0) == ""
    assert find_lost({0: _beat(), 1: _beat()}, ages, 4.0).startswith("rank 1 (process 7 on node) was lost")
    assert "rank 0 (process 7 on node) ended: StoreError: x" in find_lost({0: _beat(end="StoreError: x")}, ages, 4.0)


@pytest.mark.parametrize(
    ("beats", "names"),
    [
        # It has not read the batch that the others have.
        (
            [_beat(waiting=True), _beat(progress=8), _beat(waiting=True)],
            "rank 1 (process 7 on node, at clt.training.deepspeed_engine",
        ),
        # All have, and the others wait for its codes.
        ([_beat(waiting=True), _beat(waiting=True), _beat()], "rank 2 ("),
        (
            [_beat(waiting=True), _beat(), _beat()],
            "rank 1 (process 7 on node, at clt.training.deepspeed_engine line 3), rank 2 (",
        ),
        ([_beat(waiting=True)], "rank 1, 2 of 3 did not join"),
    ],
)
def test_rank_that_the_others_wait_for_is_named(beats: list[Heartbeat], names: str) -> None:
    line = find_behind(dict(enumerate(beats)), 3, 30.0)
    assert line.startswith(names) and "within 30 s" in line


def test_ranks_agree_on_a_token_in_a_store_that_an_earlier_start_has_used() -> None:
    store, tokens = dist.HashStore(), []
    for world in (2, 3, 3):
        found: dict[int, str] = {}

        def join(rank: int, world: int = world, found: dict[int, str] = found) -> None:
            # The first comes late: the others read the reply to an earlier start.
            time.sleep(0 if rank else 0.1)
            found[rank] = agree_on_token(store, rank, world, 30.0)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == world and len(set(found.values())) == 1
        tokens.append(found[0])
    assert len(set(tokens)) == 3
    with pytest.raises(dist.DistStoreError, match="rank 1, 2 of 3 did not join"):
        agree_on_token(store, 0, 3, 0.1)


def _error_lines(ranks: Ranks, seen: int) -> list[str]:
    """Errors in the log of the ranks after so many bytes."""
    return errors(ranks.log.read_text()[seen:])


@pytest.mark.parametrize(
    ("how", "victim"),
    [
        (signal.SIGKILL, 1),
        (signal.SIGSTOP, 0),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
    ],
)
def test_lost_rank_is_named_by_the_live_one(how: int, victim: int, ranks: Ranks, tmp_path: Path) -> None:
    seen, mesh = len(ranks.log.read_text()), {"layer": 2, "timeout_seconds": 10}
    processes, scratch = ranks.start(tmp_path / "out", mesh, 2, {rank: {"steps": 100_000} for rank in range(2)})
    assert ranks.trains(scratch, victim, processes[victim])
    os.kill(processes[victim], how)
    ends = dict([ranks.wait()])
    if how == signal.SIGSTOP:
        os.kill(processes[victim], signal.SIGCONT)
    ends |= dict([ranks.wait()])
    lost = "rank 0, or the launcher with the job's store" if victim == 0 else f"rank 1 (process {processes[1]} on "
    line = _error_lines(ranks, seen)[0]
    assert line.startswith((f"error: {lost}", f"error: rank {victim} (process {processes[victim]} on ")), line
    assert re.search(r"did not answer within [\d.]+ s; see its log", line)
    assert ends[processes[1 - victim]] == EXIT_LOST_RANK
    assert ends[processes[victim]] == (-signal.SIGKILL if how == signal.SIGKILL else EXIT_LOST_RANK)


def test_rank_that_hangs_is_named_by_all(ranks: Ranks, tmp_path: Path) -> None:
    seen, mesh = len(ranks.log.read_text()), {"layer": 1, "timeout_seconds": 10}
    processes, _ = ranks.start(tmp_path / "out", mesh, 2, {1: {"hanging_step": 3}})
    assert dict(ranks.wait() for _ in processes) == dict.fromkeys(processes, EXIT_LOST_RANK)
    lines = _error_lines(ranks, seen)
    assert len(lines) == 2 and lines[0] == lines[1]
    assert re.match(
        rf"error: rank 1 \(process {processes[1]} on \S+, at clt.training.trainer line \d+\) did not answer "
        r"within 10 s;",
        lines[0],
    )
    assert _last(tmp_path / "out").name == "step_00000002"


def test_defect_of_one_rank_keeps_its_traceback_and_ends_the_others_with_its_name(ranks: Ranks, tmp_path: Path) -> None:
    seen, mesh = len(ranks.log.read_text()), {"layer": 2, "timeout_seconds": 100}
    processes, _ = ranks.start(tmp_path / "out", mesh, 2, {1: {"defect_step": 3}})
    ends = dict(ranks.wait() for _ in processes)
    assert ends == {processes[0]: EXIT_LOST_RANK, processes[1]: 1}
    log = ranks.log.read_text()[seen:]
    assert len(re.findall(r"^ZeroDivisionError: a defect$", log, re.MULTILINE)) == 1
    assert re.search(
        rf"^error: rank 1 \(process {processes[1]} on \S+\) ended: ZeroDivisionError: a defect; see", log, re.MULTILINE
    )


def test_rank_that_never_comes_ends_the_others(ranks: Ranks, tmp_path: Path) -> None:
    seen, mesh = len(ranks.log.read_text()), {"layer": 1, "timeout_seconds": 3}
    ranks.start(tmp_path / "out", mesh, 2, {1: None})
    assert ranks.wait()[1] == EXIT_LOST_RANK
    (line,) = _error_lines(ranks, seen)
    assert line.startswith("error: rank 0: rendezvous at 127.0.0.1:") and "see the log of the missing rank" in line


def test_ten_bad_steps_end_two_ranks_with_exit_code_2_and_one_line(job: Path) -> None:
    # Weights of 1e38 make every loss infinite.
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    rate = "optimizer.learning_rate=1e38"
    ranks = [start([SCRIPT, job, rate], RANK=rank, LOCAL_RANK=rank, **world) for rank in ("0", "1")]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    (line,) = errors(outputs[0][1])
    assert "not finite in 10 steps in a row" in line
    assert errors(outputs[1][1]) == []


def test_torchrun_restarts_a_job_whose_rank_was_killed(job: Path, tmp_path: Path) -> None:
    process = start([*TORCHRUN, "--max-restarts=1", SCRIPT, job, "mesh.layer=2"])
    wait_for(tmp_path / "out" / "step_00000010", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert re.search(r"resuming: step=\d+/60", stderr), stderr
    # The rank that was left said which one it missed.
    assert re.search(rf"error: rank \d \(process {children[1]} on \S+\) was lost", stderr), stderr
    folder = _last(tmp_path / "out")
    assert folder.name == "step_00000060"
    assert stdout == f"{folder}\n"
