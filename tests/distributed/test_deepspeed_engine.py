"""Training under DeepSpeed on two gloo ranks: the same curves on every mesh, bitwise resume, agreement on failures.

One pair of processes runs all cases, one after another; each test looks at one claim.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clt.checkpoint.weights import read_tensors
from clt.distributed.mesh import Mesh
from clt.errors import CheckpointError, CLTError, NonFiniteError, StoreError
from clt.training.checkpoints import latest_folder
from clt.training.deepspeed_engine import joined_job
from clt.training.metrics import read_metrics
from clt.transcoder.model import CrossLayerTranscoder

from .toy_job import toy_config, toy_trainer

#: Meshes of two processes, by name.
MESHES = {
    "data_zero0": {"layer": 1, "zero_stage": 0},
    "data_zero1": {"layer": 1, "zero_stage": 1},
    "data_zero2": {"layer": 1, "zero_stage": 2},
    "layer_zero1": {"layer": 2, "zero_stage": 1},
    "column_zero1": {"column": 2, "zero_stage": 1},
}
#: From which mesh to which a job moves.
MOVES = [("data_zero2", "layer_zero1"), ("layer_zero1", "column_zero1"), ("column_zero1", "data_zero1")]
#: Settings of its training; columns split a skip connection too.
SKIP = {"log_every": 1, "clt": {"n_features": 64, "k": 4, "skip": True}}
#: Other forms of decoders, and how they move.
FORMS = {
    "tied_target": ("data_zero2", "layer_zero1", {"tied_decoders": "target", "skip": True}),
    "tied_source": ("layer_zero1", "column_zero1", {"tied_decoders": "source"}),
    "independent": ("column_zero1", "layer_zero1", {"independent": "mean"}),
}
#: Meshes whose loss curves are compared.
CURVES = ("data_zero1", "layer_zero1", "column_zero1")
#: A gradient norm that the first step exceeds.
CLIP = 0.02


def _fit(output: Path, mesh: dict[str, int], job: dict[str, Any] | None = None, **batches: Any) -> str:
    """Trains; returns the error's class and message, or nothing."""
    config = toy_config(output, mesh=mesh, **(job or {}))
    try:
        toy_trainer(config, Mesh.create(config.mesh.layer, config.mesh.column), **batches).fit()
    except CLTError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _form(form: dict[str, Any]) -> dict[str, Any]:
    return {"log_every": 1, "clt": {"n_features": 64, "k": 4, **form}}


def all_cases(root: str) -> dict[str, Tensor]:
    """Every training of this file that needs two ranks; the tests read the folders under root."""
    folder, errors = Path(root), {}
    for name, mesh in MESHES.items():
        _fit(folder / "whole" / name, mesh)
        errors[f"interrupted {name}"] = _fit(folder / "resumed" / name, mesh, broken_step=4)
        errors[f"resumed {name}"] = _fit(folder / "resumed" / name, mesh)
        clipped = {"steps": 1, "optimizer": {"learning_rate": 0.01, "gradient_clip": CLIP}}
        _fit(folder / "clipped" / name, mesh, clipped)
        errors[f"nan {name}"] = _fit(folder / "nan" / name, mesh, nan_steps=(2,))
    for name in CURVES:
        _fit(folder / "curve" / name, MESHES[name], {"steps": 50, "log_every": 1, "checkpoint_every": 50})
    errors["hopeless"] = _fit(folder / "hopeless", MESHES["data_zero1"], {"steps": 20}, nan_steps=tuple(range(20)))

    for old, new in MOVES:
        moved = folder / "moved" / f"{old} {new}"
        _fit(moved, MESHES[old], SKIP, broken_step=4)
        errors[moved.name] = _fit(moved, MESHES[new], SKIP)
    for name, (old, new, form) in FORMS.items():
        _fit(folder / "moved" / name, MESHES[old], _form(form), broken_step=4)
        errors[name] = _fit(folder / "moved" / name, MESHES[new], _form(form))
    damaged = folder / "damaged"
    _fit(damaged, MESHES["layer_zero1"], broken_step=4)
    if os.environ["RANK"] == "0":
        _flip_last_byte(damaged / "step_00000003" / "layer_03.safetensors")
    torch.distributed.barrier()
    errors["damaged"] = _fit(damaged, MESHES["layer_zero1"])
    (folder / f"errors_{os.environ['RANK']}.json").write_text(json.dumps(errors))
    return {}


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_ranks(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks trained."""
    root = tmp_path_factory.mktemp("two_ranks")
    run_ranks(all_cases, 2, root=str(root))
    return root


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one process trained the same jobs."""
    root = tmp_path_factory.mktemp("one_rank")
    with joined_job():
        _fit(root / "whole", {"layer": 1})
        _fit(root / "nan", {"layer": 1}, nan_steps=(2,))
        _fit(root / "curve", {"layer": 1}, {"steps": 50, "log_every": 1, "checkpoint_every": 50})
        _fit(root / "logged", {"layer": 1}, SKIP)
        for name, (_, _, form) in FORMS.items():
            _fit(root / name, {"layer": 1}, _form(form))
    return root


def _state(output: Path) -> dict[str, Tensor]:
    """Weights, moments and counters of the newest checkpoint."""
    folder = latest_folder(output)
    assert folder is not None, output
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {f"{path.stem}.{key}": value for key, value in read_tensors(path).items()}
    return tensors


def _errors(root: Path, case: str) -> list[str]:
    return [json.loads((root / f"errors_{rank}.json").read_text())[case] for rank in range(2)]


def _same_bits(left: Path, right: Path) -> None:
    expected, found = _state(left), _state(right)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


@pytest.mark.parametrize("name", CURVES)
def test_loss_curve_of_two_ranks_equals_one_rank(name: str, two_ranks: Path, one_rank: Path) -> None:
    expected = read_metrics(one_rank / "curve" / "metrics.jsonl")
    found = read_metrics(two_ranks / "curve" / name / "metrics.jsonl")
    assert len(found) == len(expected) == 50
    assert expected[-1]["loss"] < expected[0]["loss"] / 2
    for one, two in zip(expected, found, strict=True):
        # Float32 sums in another order; Adam turns a tiny gradient's sign into a full step.
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-2)
    for key in ("fvu/layer_03", "l0/mean", "tokens", "k", "learning_rate"):
        assert found[-1][key] == pytest.approx(expected[-1][key], rel=1e-3)


@pytest.mark.parametrize("name", MESHES)
def test_gradient_norm_is_global_under_every_zero_stage(name: str, two_ranks: Path, one_rank: Path) -> None:
    expected = read_metrics(one_rank / "whole" / "metrics.jsonl")[0]
    found = read_metrics(two_ranks / "whole" / name / "metrics.jsonl")[0]
    assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("name", MESHES)
def test_gradients_are_clipped_by_their_global_norm(name: str, two_ranks: Path) -> None:
    norm = read_metrics(two_ranks / "clipped" / name / "metrics.jsonl")[0]["gradient_norm"]
    assert norm > 2 * CLIP
    first_moments = [v for key, v in _state(two_ranks / "clipped" / name).items() if "exp_avg." in key]
    # After one step the first moment is a tenth of the clipped gradient.
    total = torch.stack([moment.square().sum() for moment in first_moments]).sum().sqrt()
    assert total.item() == pytest.approx(CLIP / 10, rel=1e-4)


@pytest.mark.parametrize("name", MESHES)
def test_job_resumed_on_the_same_mesh_ends_with_the_same_bits(name: str, two_ranks: Path) -> None:
    assert _errors(two_ranks, f"resumed {name}") == ["", ""]
    _same_bits(two_ranks / "whole" / name, two_ranks / "resumed" / name)


@pytest.mark.parametrize("name", MESHES)
def test_step_that_is_not_finite_on_one_rank_is_skipped_by_all(name: str, two_ranks: Path, one_rank: Path) -> None:
    assert _errors(two_ranks, f"nan {name}") == ["", ""]
    report = read_metrics(two_ranks / "nan" / name / "metrics.jsonl")[-1]
    assert report["skipped_steps"] == 1
    expected, found = _state(one_rank / "nan"), _state(two_ranks / "nan" / name)
    for key, value in expected.items():
        # As in the loss curve: five Adam steps, sums in another order.
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


def test_ten_bad_steps_in_a_row_end_the_job_on_all_ranks(two_ranks: Path) -> None:
    first, second = _errors(two_ranks, "hopeless")
    assert first == second
    assert first.startswith(f"{NonFiniteError.__name__}: ") and "10 steps in a row, up to step 10" in first


@pytest.mark.parametrize("name", MESHES)
def test_batch_that_one_rank_cannot_read_ends_the_job_on_all_ranks(name: str, two_ranks: Path) -> None:
    message = f"{StoreError.__name__}: units/0003: file is truncated; capture it again"
    assert _errors(two_ranks, f"interrupted {name}") == [message, message]


def test_damaged_layer_of_one_rank_is_an_error_on_all_ranks(two_ranks: Path) -> None:
    first, second = _errors(two_ranks, "damaged")
    assert first == second
    assert first.startswith(f"{CheckpointError.__name__}: ") and "step_00000003/layer_03.safetensors" in first


@pytest.mark.parametrize(
    ("name", "unmoved"), [*((f"{old} {new}", "logged") for old, new in MOVES), *zip(FORMS, FORMS, strict=True)]
)
def test_job_moves_to_another_mesh(name: str, unmoved: str, two_ranks: Path, one_rank: Path) -> None:
    assert _errors(two_ranks, name) == ["", ""]
    expected = read_metrics(one_rank / unmoved / "metrics.jsonl")
    found = read_metrics(two_ranks / "moved" / name / "metrics.jsonl")
    assert [report["step"] for report in found] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-4)


@pytest.mark.parametrize("name", ["layer_zero1", "column_zero1"])
def test_checkpoint_of_two_ranks_is_a_whole_transcoder(name: str, two_ranks: Path, one_rank: Path) -> None:
    folder = latest_folder(two_ranks / "whole" / name)
    expected_folder = latest_folder(one_rank / "whole")
    assert folder is not None and expected_folder is not None
    x = torch.randn(4, 8, 16)
    found = CrossLayerTranscoder.from_pretrained(folder)(x)
    torch.testing.assert_close(found, CrossLayerTranscoder.from_pretrained(expected_folder)(x), rtol=1e-3, atol=1e-3)
