"""`launch/train.py` as users start it, on a real store: plain, under torchrun, killed, and with bad input."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml

from clt.checkpoint.manifest import latest_folder, verify_folder
from clt.config import parse_config
from clt.launch.train import main, train
from clt.training.metrics import read_metrics
from clt.training.settings import TrainConfig
from clt.transcoder.model import CrossLayerTranscoder

from ..launched import ROOT, SCRIPT, TORCHRUN, errors, free_port, same_bits, start, wait_for


def test_job_killed_at_any_moment_ends_with_the_same_bits(job: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start([SCRIPT, job])
    wait_for(output / "step_00000010", process)
    # Some steps, or a part of the next checkpoint, later: wherever it hits, the outcome is the same.
    time.sleep(random.Random(11).uniform(0, 0.2))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    process = start([SCRIPT, job])
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout == f"{output / 'step_00000060'}\n"
    resumed = re.search(r"resuming: step=(\d+)/60", stderr)
    assert resumed and int(resumed[1]) >= 5, stderr

    folder = latest_folder(output)
    assert folder is not None
    verify_folder(folder)
    tree = yaml.safe_load(job.read_text()) | {"output": str(tmp_path / "whole")}
    same_bits(train(parse_config(TrainConfig, tree, "job")), folder)
    assert [report["step"] for report in read_metrics(output / "metrics.jsonl")] == [10, 20, 30, 40, 50, 60]
    assert not list(output.glob(".*"))


@pytest.mark.slow
def test_two_data_ranks_killed_together_end_with_the_same_bits(job: Path, tmp_path: Path) -> None:
    process = start([*TORCHRUN, SCRIPT, job], new_session=True)
    wait_for(tmp_path / "out" / "step_00000010", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for overrides in ([], [f"output={tmp_path / 'whole'}"]):
        process = start([*TORCHRUN, SCRIPT, job, *overrides])
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0, stderr
    resumed, whole = latest_folder(tmp_path / "out"), latest_folder(tmp_path / "whole")
    assert resumed is not None and whole is not None
    same_bits(whole, resumed)


@pytest.mark.parametrize("mesh", ["mesh.layer=2", pytest.param("mesh.column=2", marks=pytest.mark.slow)])
def test_torchrun_trains_the_same_as_one_process(mesh: str, job: Path, tmp_path: Path) -> None:
    process = start([*TORCHRUN, SCRIPT, job, mesh, f"output={tmp_path / 'two'}"])
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
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [start([SCRIPT, job, "mesh.layer=5"], RANK=rank, LOCAL_RANK=rank, **world) for rank in ("0", "1")]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert errors(outputs[0][1]) == ["error: mesh.layer=5 does not divide the 2 processes; change mesh.layer or "
                                      "--nproc_per_node"]  # fmt: skip
    assert errors(outputs[1][1]) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["store=nowhere"], "nowhere"),
        (
            ["optimiser.learning_rate=1"],
            "unknown key 'optimiser.learning_rate'; did you mean 'optimizer.learning_rate'?",
        ),
        (["clt.k=65"], "k=65 exceeds n_features=64"),
        (["data.batch_tokens=5000"], "5000"),
        (["clt.read_site=resid_post"], "resid_post"),
        (["data.token_weights.image=0"], "data.token_weights: the tokens that pass the filter (image) have weight 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    overrides: list[str], message: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(job), *overrides]) == 2
    (line,) = errors(capsys.readouterr().err)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_one_source_layer_trains_alone_with_a_warning(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(job), "clt.independent=mean", "clt.source=2", "steps=5"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert (
        len(warnings) == 1
        and "clt.independent=mean" in warnings[0]
        and "remove clt.independent to train sources jointly" in warnings[0]
    )
    transcoder = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    assert transcoder.config.source == 2 and transcoder.share.sources == (2,) and transcoder.share.targets == (2, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_kernels_that_cannot_run_here_are_refused_by_name(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([str(job), "kernels=triton"]) == 2
    (line,) = errors(capsys.readouterr().err)
    assert "kernels=triton" in line and "no CUDA device" in line


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda path: path.name)
def test_dry_run_prints_the_resolved_job(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "steps=3", "--dry-run"]) == 0
    tree: Mapping[str, object] = yaml.safe_load(capsys.readouterr().out)
    assert tree["steps"] == 3
    assert parse_config(TrainConfig, tree, "dry run").steps == 3
