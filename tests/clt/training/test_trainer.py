"""Training in one process: it learns, reports, skips bad steps, and resumes to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clt.checkpoint.weights import read_tensors
from clt.distributed.mesh import Mesh
from clt.errors import ConfigError, NonFiniteError, StoreError
from clt.training.deepspeed_engine import deepspeed_config, joined_job
from clt.training.metrics import read_metrics
from clt.training.settings import OptimizerSettings

from ...distributed.toy_job import toy_config, toy_trainer


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A world of one process."""
    with joined_job():
        yield Mesh.create(1)


def _fit(world: Mesh, output: Path, batches: dict[str, Any] | None = None, **job: Any) -> Path:
    return toy_trainer(toy_config(output, **job), world, **(batches or {})).fit()


def _same_bits(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.glob("*.safetensors"))
    assert names == sorted(path.name for path in right.glob("*.safetensors"))
    for name in names:
        expected, found = read_tensors(left / name), read_tensors(right / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def test_training_learns_and_reports_every_scalar(mesh: Mesh, tmp_path: Path) -> None:
    folder = _fit(mesh, tmp_path, steps=40, log_every=10, checkpoint_every=40)
    assert folder == tmp_path / "step_00000040"
    reports = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in reports] == [10, 20, 30, 40]
    assert [r["tokens"] for r in reports] == [640, 1280, 1920, 2560]
    last = reports[-1]
    assert last["fvu/mean"] < reports[0]["fvu/mean"] / 1.5
    assert last["l0/mean"] == 4.0
    assert last["k"] == 4
    for name in (
        "loss",
        "auxk",
        "revival",
        "learning_rate",
        "gradient_norm",
        "tokens_per_second",
        "dead_fraction/mean",
    ):
        assert name in last
    layers = [f"{name}/layer_{layer:02d}" for name in ("fvu", "l0", "dead_fraction") for layer in range(4)]
    assert all(name in last for name in layers)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    # The loss is the mean of the targets' FVU plus the weighted terms of dead features, at the default weights.
    dead_terms = last["auxk"] / 32 + 1e-3 * last["revival"]
    assert last["loss"] == pytest.approx(last["fvu/mean"] + dead_terms, rel=1e-5)


def test_penalty_is_reported_before_its_weight(mesh: Mesh, tmp_path: Path) -> None:
    sparsity = {"kind": "relu", "penalty": 0.01, "penalty_warmup_steps": 4}
    transcoder = {"n_features": 64, "k": 4, "sparsity": sparsity}
    _fit(mesh, tmp_path, log_every=1, clt=transcoder, auxk={"coefficient": 0})
    reports = read_metrics(tmp_path / "metrics.jsonl")
    for step, report in enumerate(reports):
        weight = 0.01 * min(1, step / 4)
        assert report["penalty"] > 0
        assert report["loss"] == pytest.approx(report["fvu/mean"] + weight * report["penalty"], rel=1e-5)


def test_auxiliary_loss_starts_when_a_feature_can_be_dead(mesh: Mesh, tmp_path: Path) -> None:
    _fit(mesh, tmp_path, log_every=1, auxk={"dead_after_tokens": 128, "token_fraction": 0.5})
    reports = read_metrics(tmp_path / "metrics.jsonl")
    # 64 tokens a step: silent for 128 tokens at the third step at the earliest.
    assert [r["auxk"] > 0 for r in reports[:3]] == [False, False, True]
    assert reports[0]["dead_fraction/mean"] == 0


def test_k_is_annealed(mesh: Mesh, tmp_path: Path) -> None:
    optimizer = {"learning_rate": 0.01, "k_start": 8, "k_anneal_steps": 4}
    _fit(mesh, tmp_path, log_every=1, optimizer=optimizer)
    reports = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["k"] for r in reports] == [8, 7, 6, 5, 4, 4]
    assert [r["l0/mean"] for r in reports] == [8, 7, 6, 5, 4, 4]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_resumed_job_ends_with_the_same_bits(stage: int, mesh: Mesh, tmp_path: Path) -> None:
    job: dict[str, Any] = {"mesh": {"zero_stage": stage}, "clt": {"n_features": 64, "k": 4, "skip": True}}
    whole = _fit(mesh, tmp_path / "whole", **job)
    with pytest.raises(StoreError, match="truncated"):
        _fit(mesh, tmp_path / "resumed", {"broken_step": 5}, **job)
    assert (tmp_path / "resumed" / "latest").read_text() == "step_00000003\n"
    _same_bits(whole, _fit(mesh, tmp_path / "resumed", **job))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_biases_of_encoders_have_a_rate_of_their_own(stage: int, mesh: Mesh, tmp_path: Path) -> None:
    layers = []
    for rate in (1.0, 3.0):
        optimizer = {"learning_rate": 0.01, "gradient_clip": 0.0, "warmup_steps": 0, "bias_rate": rate}
        job: dict[str, Any] = {"steps": 2, "checkpoint_every": 2, "optimizer": optimizer}
        folder = _fit(mesh, tmp_path / str(rate), mesh={"zero_stage": stage}, **job)
        layers.append(read_tensors(folder / "layer_01.safetensors"))
    one, three = layers
    assert one["b_enc"].any()
    # Decoders start at zero, so encoders move in the second step first: by the rate, for any gradient.
    torch.testing.assert_close(three["b_enc"], 3 * one["b_enc"])
    assert all(torch.equal(one[key], three[key]) for key in one if key != "b_enc")


def test_zero_stages_agree_bit_for_bit_without_clipping(mesh: Mesh, tmp_path: Path) -> None:
    optimizer = {"learning_rate": 0.01, "gradient_clip": 0.0, "bias_rate": 2.0}
    folders = [
        _fit(mesh, tmp_path / str(stage), mesh={"zero_stage": stage}, optimizer=optimizer) for stage in (0, 1, 2)
    ]
    _same_bits(folders[0], folders[1])
    _same_bits(folders[0], folders[2])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_step_that_is_not_finite_leaves_weights_and_moments_alone(stage: int, mesh: Mesh, tmp_path: Path) -> None:
    job: dict[str, Any] = {"mesh": {"zero_stage": stage}, "checkpoint_every": 1, "keep_checkpoints": 6}
    last = _fit(mesh, tmp_path, {"nan_steps": (3,)}, **job)
    _same_bits(tmp_path / "step_00000003", tmp_path / "step_00000004")
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] == 1
    for tensor in read_tensors(last / "layer_03.safetensors").values():
        assert tensor.isfinite().all()
    before, after = (read_tensors(tmp_path / f"step_0000000{s}" / "layer_03.safetensors") for s in (4, 5))
    assert not torch.equal(before["W_dec"], after["W_dec"]), "the step after it is taken"


def test_bad_steps_are_counted_across_a_resume(mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"10 steps in a row, up to step 13.*learning_rate"):
        _fit(mesh, tmp_path, {"nan_steps": tuple(range(3, 40))}, steps=40)
    with pytest.raises(NonFiniteError, match="up to step 13"):
        _fit(mesh, tmp_path, {"nan_steps": tuple(range(3, 40))}, steps=40)


def test_finished_job_is_left_alone(mesh: Mesh, tmp_path: Path) -> None:
    folder = _fit(mesh, tmp_path)
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert _fit(mesh, tmp_path) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"auxk": {"k": 65}}, r"auxk\.k=65 exceeds clt\.n_features=64"),
        ({"optimizer": {"k_start": 65}}, r"optimizer\.k_start=65 exceeds"),
    ],
)
def test_settings_that_do_not_fit_are_config_errors(
    job: dict[str, Any], message: str, mesh: Mesh, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        _fit(mesh, tmp_path, **job)
    assert not list(tmp_path.iterdir())


def test_gradient_clipping_is_always_passed_to_deepspeed() -> None:
    settings = OptimizerSettings(gradient_clip=0.0)
    assert deepspeed_config(10, settings, 1)["gradient_clipping"] == 0.0
