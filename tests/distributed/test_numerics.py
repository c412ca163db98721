"""Variants of Adam on one rank and two: micro-batches, float32 copies of bfloat16 weights, EMA weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clt.checkpoint.weights import read_tensors
from clt.distributed.mesh import Mesh
from clt.errors import CheckpointError, ConfigError, StoreError
from clt.training.checkpoints import latest_folder
from clt.training.deepspeed_engine import joined_job
from clt.training.metrics import read_metrics
from clt.training.weight_average import WeightAverage
from clt.transcoder.model import CrossLayerTranscoder

from .toy_job import toy_config, toy_trainer

#: Meshes of two processes, by name.
MESHES = {
    "data_zero0": {"layer": 1, "zero_stage": 0},
    "data_zero1": {"layer": 1, "zero_stage": 1},
    "data_zero2": {"layer": 1, "zero_stage": 2},
    "layer": {"layer": 2},
}
MASTER = {"learning_rate": 0.01, "warmup_steps": 2, "weights": "bfloat16_master", "ema_decay": 0.9}
MICRO = {"batch_tokens": 64, "micro_batches": 2}


def _fit(folder: Path, mesh: dict[str, int], batches: dict[str, Any] | None = None, **job: Any) -> Path:
    config = toy_config(folder, **({"mesh": mesh, "log_every": 1} | job))
    return toy_trainer(config, Mesh.create(config.mesh.layer, config.mesh.column), **(batches or {})).fit()


def _resume(folder: Path, mesh: dict[str, int], **job: Any) -> None:
    _fit(folder / "whole", mesh, **job)
    with pytest.raises(StoreError):
        _fit(folder / "resumed", mesh, {"broken_step": 4}, **job)
    _fit(folder / "resumed", mesh, **job)


def all_cases(root: str) -> dict[str, torch.Tensor]:
    """Every job of this file that needs two ranks."""
    for name, mesh in MESHES.items():
        folder = Path(root) / name
        _fit(folder / "micro", mesh, data=MICRO)
        _fit(folder / "micro_nan", mesh, {"nan_steps": (2,)}, data=MICRO)
        if mesh.get("zero_stage") != 0:
            _resume(folder, mesh, optimizer=MASTER)
    return {}


@pytest.fixture(scope="module")
def two_ranks(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks trained."""
    root = tmp_path_factory.mktemp("two_ranks")
    run_ranks(all_cases, 2, root=str(root))
    return root


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which one process trained whole batches; the world stays open."""
    root = tmp_path_factory.mktemp("one_rank")
    with joined_job():
        _fit(root / "whole", {})
        _fit(root / "nan", {}, {"nan_steps": (2,)})
        yield root


def _same_curve(expected: Path, found: Path) -> None:
    for key in ("loss", "l0/mean", "fvu/layer_03", "skipped_steps"):
        curves = [[report[key] for report in read_metrics(folder / "metrics.jsonl")] for folder in (expected, found)]
        assert curves[1] == pytest.approx(curves[0], rel=1e-3), key


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_micro_batches_train_as_the_whole_batch_does(stage: int, one_rank: Path, tmp_path: Path) -> None:
    _fit(tmp_path / "out", {"zero_stage": stage}, data=MICRO)
    _same_curve(one_rank / "whole", tmp_path / "out")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bad_micro_batch_spoils_its_step_only(stage: int, one_rank: Path, tmp_path: Path) -> None:
    # The first token is in the first micro-batch; the second one is good and must leave nothing behind either.
    _fit(tmp_path / "out", {"zero_stage": stage}, {"nan_steps": (2,)}, data=MICRO)
    reports = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [report["skipped_steps"] for report in reports] == [0, 0, 1, 1, 1, 1]
    expected = [report.get("loss", -1) for report in read_metrics(one_rank / "nan" / "metrics.jsonl")]
    assert [report.get("loss", -1) for report in reports] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", MESHES)
def test_two_ranks_with_micro_batches_train_as_one_without(name: str, one_rank: Path, two_ranks: Path) -> None:
    _same_curve(one_rank / "whole", two_ranks / name / "micro")
    reports = read_metrics(two_ranks / name / "micro_nan" / "metrics.jsonl")
    assert [report["skipped_steps"] for report in reports] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("stage", [1, 2])
def test_float32_copies_keep_what_bfloat16_loses(stage: int, one_rank: Path, tmp_path: Path) -> None:
    _resume(tmp_path, {"zero_stage": stage}, optimizer=MASTER)
    losses = [
        [report["loss"] for report in read_metrics(folder / "metrics.jsonl")]
        for folder in (one_rank / "whole", tmp_path / "whole")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    folder = latest_folder(tmp_path / "whole")
    assert folder is not None
    W_dec = read_tensors(folder / "layer_00.safetensors")["W_dec"]
    assert W_dec.dtype == torch.float32 and not torch.equal(W_dec, W_dec.bfloat16().float())
    _same_bits(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("name", [name for name in MESHES if name != "data_zero0"])
def test_resumed_job_with_copies_and_a_mean_ends_with_the_same_bits(name: str, two_ranks: Path) -> None:
    _same_bits(two_ranks / name / "whole", two_ranks / name / "resumed")


def _same_bits(left: Path, right: Path) -> None:
    expected_folder, found_folder = latest_folder(left), latest_folder(right)
    assert expected_folder is not None and found_folder is not None
    names = sorted(path.name for path in expected_folder.glob("*.safetensors"))
    assert "average_03.safetensors" in names
    for name in names:
        expected, found = read_tensors(expected_folder / name), read_tensors(found_folder / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def test_mean_of_the_weights_by_hand() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    average = WeightAverage(module, decay=0.75)
    expected = 1.0
    for step, (value, decay) in enumerate([(3.0, 1 / 2), (5.0, 2 / 3), (7.0, 3 / 4), (9.0, 3 / 4)], start=1):
        module.weight.data.fill_(value)
        average.update(step)
        expected = decay * expected + (1 - decay) * value
    assert average.of(module.weight).item() == pytest.approx(expected)
    with average.in_place():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 9.0


def test_mean_is_saved_beside_the_weights(one_rank: Path, tmp_path: Path) -> None:
    optimizer = {"learning_rate": 0.01, "ema_decay": 0.999}
    folder = _fit(tmp_path / "out", {}, optimizer=optimizer, checkpoint_every=1, keep_checkpoints=10)
    steps = [CrossLayerTranscoder.from_pretrained(tmp_path / "out" / f"step_{n:08d}") for n in range(1, 7)]
    start = toy_trainer(toy_config(tmp_path / "start"), Mesh.create(1)).transcoder
    found = CrossLayerTranscoder.from_pretrained(folder, averaged=True)
    # At first the plain mean, the initial weights included.
    expected = torch.stack([transcoder.W_enc["2"].detach() for transcoder in (start, *steps)]).mean(dim=0)
    torch.testing.assert_close(found.W_enc["2"], expected)
    with pytest.raises(CheckpointError, match=r"average_00\.safetensors: no such file, .* no EMA weights; pass"):
        CrossLayerTranscoder.from_pretrained(one_rank / "whole", averaged=True)


def test_batch_that_does_not_divide_into_micro_batches_is_an_error(one_rank: Path, tmp_path: Path) -> None:
    job = {"data": {"batch_tokens": 64, "micro_batches": 3}}
    with pytest.raises(ConfigError, match=r"data\.batch_tokens=64 does not divide .* of 3 micro-batches"):
        _fit(tmp_path, {}, **job)
    with pytest.raises(ConfigError, match=r"mesh\.zero_stage=0 does not support optimizer\.weights=bfloat16_master"):
        _fit(tmp_path, {"zero_stage": 0}, optimizer=MASTER)
