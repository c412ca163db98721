"""`launch/train.py` as users start it, on a real store: plain, under torchrun, killed, and with bad input."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from toy_job import global_batch

from clt.capture.schema import SCHEMA_VERSION, CapturePlan, SiteGroup, StoreSpec
from clt.capture.writer import StoreWriter, UnitData
from clt.config import TrainConfig, parse_config
from clt.launch.train import main, train
from clt.manifest import latest_folder, verify_folder
from clt.metrics import read_metrics
from clt.model import CrossLayerTranscoder
from clt.records import Modality, ModelIdentity, TokenTable
from clt.weights import read_tensors

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
]
UNITS, ROWS, LAYERS, D_MODEL = 2, 2048, 4, 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 4,096 tokens of a teacher network, one token a sample."""
    folder = tmp_path_factory.mktemp("store") / "store"
    sites = tuple(f"lm.{layer}.{site}" for layer in range(LAYERS) for site in ("resid_mid", "mlp_out"))
    spec = StoreSpec(
        schema_version=SCHEMA_VERSION,
        model=ModelIdentity(
            name="teacher", revision="local", architecture="T", n_layers=LAYERS, d_model=D_MODEL, fingerprint="ab"
        ),
        model_dtype="float32",
        created_by="tests",
        groups=(SiteGroup(name="lm", sites=sites, width=D_MODEL),),
        store_dtype="bfloat16",
        compression="none",
        rows_per_unit=ROWS,
        chunk_tokens=64,
        batch_size=1,
        seed=0,
        source="teacher",
    )
    plan = CapturePlan(sample_starts=tuple(range(0, ROWS * UNITS + 1, ROWS)), unit_tokens=(ROWS,) * UNITS)
    writer = StoreWriter(folder, spec, plan)
    for unit in range(UNITS):
        x, y = global_batch(unit, tokens=ROWS)
        acts = torch.stack([x, y], dim=1).flatten(0, 1).transpose(0, 1)
        writer.commit(unit, UnitData(acts={"lm": acts}, tokens=_tokens(unit), **_samples(unit)))
    writer.finalize()
    return folder


def _samples(unit: int) -> dict[str, tuple]:
    return {"sample_ids": tuple(f"{unit}-{row}" for row in range(ROWS)), "sample_tokens": (1,) * ROWS}


def _tokens(unit: int) -> TokenTable:
    zeros = torch.zeros(ROWS, dtype=torch.int16)
    return TokenTable(
        sample=torch.arange(unit * ROWS, (unit + 1) * ROWS),
        position=torch.arange(ROWS, dtype=torch.int32),
        token_id=torch.ones(ROWS, dtype=torch.int32),
        modality=torch.full((ROWS,), Modality.IMAGE, dtype=torch.uint8),
        patch_row=zeros - 1,
        patch_col=zeros - 1,
        image=zeros - 1,
    )


@pytest.fixture
def job(store: Path, tmp_path: Path) -> Path:
    """Configuration file of a job of 60 steps that writes into the test's folder."""
    tree = {
        "store": str(store),
        "output": str(tmp_path / "out"),
        "steps": 60,
        "clt": {"n_features": 64, "k": 4},
        "optimizer": {"learning_rate": 0.01},
        "auxk": {"dead_after_tokens": 512},
        "data": {"batch_tokens": 128, "window_tokens": 1024},
        "log_every": 10,
        "checkpoint_every": 5,
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _start(arguments: Sequence[str | Path], *, new_session: bool = False, **environment: str) -> subprocess.Popen[str]:
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_session,
    )


def _same_bits(left: Path, right: Path) -> None:
    for path in sorted(left.glob("*.safetensors")):
        expected, found = read_tensors(path), read_tensors(right / path.name)
        assert all(torch.equal(expected[key], found[key]) for key in expected), path.name


def test_job_killed_at_any_moment_ends_with_the_same_bits(job: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = _start([SCRIPT, job])
    _wait_for(output / "step_00000010", process)
    # Some steps, or a part of the next checkpoint, later: wherever it hits, the outcome is the same.
    time.sleep(random.uniform(0, 0.2))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    process = _start([SCRIPT, job])
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout == f"{output / 'step_00000060'}\n"
    resumed = re.search(r"resuming .* after step (\d+) of 60", stderr)
    assert resumed and int(resumed[1]) >= 5, stderr

    folder = latest_folder(output)
    assert folder is not None
    verify_folder(folder)
    tree = yaml.safe_load(job.read_text()) | {"output": str(tmp_path / "whole")}
    _same_bits(train(parse_config(TrainConfig, tree, "job")), folder)
    assert [report["step"] for report in read_metrics(output / "metrics.jsonl")] == [10, 20, 30, 40, 50, 60]
    assert not list(output.glob(".*"))


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.002)


@pytest.mark.slow
def test_two_data_ranks_killed_together_end_with_the_same_bits(job: Path, tmp_path: Path) -> None:
    process = _start([*TORCHRUN, SCRIPT, job], new_session=True)
    _wait_for(tmp_path / "out" / "step_00000010", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for overrides in ([], [f"output={tmp_path / 'whole'}"]):
        process = _start([*TORCHRUN, SCRIPT, job, *overrides])
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0, stderr
    resumed, whole = latest_folder(tmp_path / "out"), latest_folder(tmp_path / "whole")
    assert resumed is not None and whole is not None
    _same_bits(whole, resumed)


@pytest.mark.parametrize("mesh", ["mesh.layer=2", pytest.param("mesh.column=2", marks=pytest.mark.slow)])
def test_torchrun_trains_what_one_process_trains(mesh: str, job: Path, tmp_path: Path) -> None:
    process = _start([*TORCHRUN, SCRIPT, job, mesh, f"output={tmp_path / 'two'}"])
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout == f"{tmp_path / 'two' / 'step_00000060'}\n"
    assert "Traceback" not in stderr

    assert main([str(job), f"output={tmp_path / 'one'}"]) == 0
    reports = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two")]
    for key in ("loss", "fvu/layer_00", "fvu/layer_03", "l0/mean"):
        # The tolerance of loss curves under DeepSpeed on another mesh.
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-3)

    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "two" / "step_00000060")
    assert loaded.provenance.model is not None and loaded.provenance.model.name == "teacher"


def test_error_is_one_line_of_the_first_rank_and_exit_code_2(job: Path) -> None:
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    ranks = [_start([SCRIPT, job, "mesh.layer=5"], RANK=rank, LOCAL_RANK=rank, **world) for rank in ("0", "1")]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert _errors(outputs[0][1]) == ["error: mesh.layer=5 does not divide the 2 processes; change mesh.layer or "
                                      "--nproc_per_node"]  # fmt: skip
    assert _errors(outputs[1][1]) == []


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _errors(stderr: str) -> list[str]:
    assert "Traceback" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["store=nowhere"], "nowhere"),
        (["optimiser.learning_rate=1"], "unknown key 'optimiser'"),
        (["clt.k=65"], "k=65 exceeds n_features=64"),
        (["data.batch_tokens=5000"], "5000"),
        (["clt.read_site=resid_post"], "resid_post"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    overrides: list[str], message: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(job), *overrides]) == 2
    (line,) = _errors(capsys.readouterr().err)
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_kernels_that_cannot_run_here_are_refused_by_name(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([str(job), "kernels=triton"]) == 2
    (line,) = _errors(capsys.readouterr().err)
    assert "kernels=triton" in line and "no CUDA device" in line


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda path: path.name)
def test_dry_run_prints_the_resolved_job(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "steps=3", "--dry-run"]) == 0
    tree: Mapping[str, object] = yaml.safe_load(capsys.readouterr().out)
    assert tree["steps"] == 3
    assert parse_config(TrainConfig, tree, "dry run").steps == 3
