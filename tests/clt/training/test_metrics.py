"""Reports of training: the numbers, the files, and files of a killed run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clt.distributed.mesh import Mesh
from clt.errors import CheckpointError
from clt.training.deepspeed_engine import joined_job
from clt.training.metrics import (
    MetricsWindow,
    MetricsWriter,
    Observations,
    TrainingMetrics,
    WindowAverages,
    read_metrics,
)
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare

CONFIG = CLTConfig(n_features=8, k=2, n_layers=3, d_model=4, first_offset=1)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A world of one process."""
    with joined_job():
        yield Mesh.create(1)


def _observations(errors: list[float], l0: list[float]) -> Observations:
    return Observations(
        error_M=torch.tensor(errors),
        auxk=torch.tensor(sum(errors) / 10),
        revival=torch.tensor(-sum(errors)),
        penalty=torch.tensor(3 * sum(errors)),
        l0_L=torch.tensor(l0),
        fired_LF=torch.zeros(2, 8, dtype=torch.bool),
    )


def _report(step: int, loss: float = 0.5) -> TrainingMetrics:
    averages = WindowAverages(
        loss=loss, auxk=0.0, revival=0.0, penalty=0.0,
        fvu={1: 0.25, 2: 0.75}, l0={0: 2.0, 1: 1.0}, dead_fraction={0: 0.5, 1: 0.0},
        tokens_per_second=10.0, bytes_per_step={"model": 7.0},
    )  # fmt: skip
    return TrainingMetrics(
        step=step, tokens=8 * step, averages=averages, learning_rate=1e-3, k=2, gradient_norm=1.0, skipped_steps=0
    )


def test_window_averages_over_its_steps(mesh: Mesh) -> None:
    window = MetricsWindow(CONFIG, LayerShare.everything(CONFIG), torch.device("cpu"))
    window.add(_observations([0.2, 0.4], [2.0, 1.0]), loss=0.3)
    window.add(_observations([0.4, 0.8], [2.0, 2.0]), loss=0.6)
    window.add_tokens(16)
    window.add_traffic(Counter(model=10))
    window.add_traffic(Counter(model=20, data=8))
    averages = window.close(torch.tensor([0.5, 0.25]), mesh)
    assert averages.loss == pytest.approx(0.45)
    assert averages.auxk == pytest.approx((0.06 + 0.12) / 2)
    assert averages.revival == pytest.approx(-(0.6 + 1.2) / 2)
    assert averages.penalty == pytest.approx(3 * (0.6 + 1.2) / 2)
    assert averages.fvu == {1: pytest.approx(0.3), 2: pytest.approx(0.6)}
    assert averages.l0 == {0: 2.0, 1: 1.5}
    assert averages.dead_fraction == {0: 0.5, 1: 0.25}
    assert averages.tokens_per_second > 0
    assert averages.bytes_per_step == {"model": 15, "data": 4}


def test_window_resets_and_is_empty_without_steps(mesh: Mesh) -> None:
    window = MetricsWindow(CONFIG, LayerShare.everything(CONFIG), torch.device("cpu"))
    window.add(_observations([0.2, 0.4], [2.0, 1.0]), loss=0.3)
    window.close(torch.zeros(2), mesh)
    averages = window.close(torch.zeros(2), mesh)
    assert math.isnan(averages.loss) and math.isnan(averages.fvu[1])
    assert averages.dead_fraction == {0: 0.0, 1: 0.0} and averages.bytes_per_step == {}


def test_scalars_have_means_and_layers_and_no_nan() -> None:
    scalars = _report(1, loss=math.nan).scalars()
    assert scalars["fvu/mean"] == 0.5
    assert scalars["fvu/layer_02"] == 0.75
    assert scalars["dead_fraction/layer_00"] == 0.5
    assert scalars["bytes_per_step/model"] == 7
    assert "loss" not in scalars


def test_tensorboard_and_json_lines_say_the_same(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(_report(2))
    writer.write(_report(4, loss=0.25))
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    reports = read_metrics(tmp_path / "metrics.jsonl")
    keys = sorted(reports[0].keys() - {"step"})
    assert sorted(board.Tags()["scalars"]) == [f"train/{key}" for key in keys] and "loss" in keys
    for key in keys:
        assert [(event.step, pytest.approx(event.value)) for event in board.Scalars(f"train/{key}")] == [
            (report["step"], report[key]) for report in reports
        ]


def test_reports_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0)
    for step in (2, 4, 6):
        writer.write(_report(step))
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    writer = MetricsWriter(tmp_path, resume_step=4)
    writer.write(_report(6))
    writer.close()
    assert [report["step"] for report in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 6]


def test_line_that_is_no_report_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\nnonsense\n" + json.dumps({"step": 2}) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is not a report"):
        MetricsWriter(tmp_path, resume_step=2)
