"""The optimizer inside the backward pass: equal to Adam where it should be, on any mesh, resumed to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clt.checkpoint.columns import own_columns
from clt.checkpoint.weights import layer_tensors, read_tensors
from clt.distributed.mesh import Mesh, deal_layers
from clt.errors import ConfigError, StoreError
from clt.training.checkpoints import latest_folder
from clt.training.deepspeed_engine import joined_job
from clt.training.engine import StepInputs
from clt.training.metrics import read_metrics
from clt.training.row_adam_engine import RowEngine
from clt.training.settings import OptimizerSettings
from clt.transcoder.architecture import CLTConfig, SparsitySettings

from .sharded_steps import batch_of, make_objective
from .toy_job import toy_config, toy_trainer

TOKENS, STEPS, RATE, BIAS_RATE = 32, 20, 1e-2, 3.0
CONFIGS: dict[str, dict[str, Any]] = {
    "topk": {"skip": True},
    "late": {"first_offset": 1, "n_targets": 2},
    "norm": {"sparsity": {"decoder_norm": True}},
    "joint": {"sparsity": {"kind": "joint_topk"}},
    "batch": {"sparsity": {"kind": "batch_topk"}},
}
MESHES = {"layer": (2, 1), "column": (1, 2)}
#: Types of weights and moments, and Adam's first decay rate.
NUMERICS = {
    "float32": ("float32", "float32", 0.9),
    "bfloat16": ("bfloat16", "bfloat16", 0.0),
    "int8": ("bfloat16", "int8", 0.9),
}


def _config(name: str) -> CLTConfig:
    tree = dict(CONFIGS[name])
    sparsity = SparsitySettings(**tree.pop("sparsity", {}))
    return CLTConfig(n_layers=4, d_model=8, n_features=24, k=3, sparsity=sparsity, **tree)


def _settings(**changed: Any) -> OptimizerSettings:
    return OptimizerSettings(**({"kind": "row_adam", "gradient_clip": 0, "betas": (0.0, 0.999)} | changed))


def _inputs(config: CLTConfig, share: Any, mesh: Mesh, step: int, dead_LF: Tensor) -> StepInputs:
    x, y = (part.double() for part in batch_of(config, share, mesh, step, TOKENS))
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(step), dtype=torch.float64) / TOKENS
    # Dead features come and go, and so do weights.
    return StepInputs(x, y, config.k, dead_LF if step % 3 else None, 0.0, weights if step % 2 else None)


def row_steps(name: str, mesh: Mesh) -> dict[str, Tensor]:
    """Loss and weights after some float64 steps of the row engine."""
    config = _config(name)
    objective, dead_LF = make_objective(config, mesh, torch.float64)
    engine = RowEngine(objective, mesh, _settings(bias_rate=BIAS_RATE), seed=0)
    share = objective.transcoder.share
    for step in range(STEPS):
        check, seen = engine.train_step([_inputs(config, share, mesh, step, dead_LF)], RATE, False)
        assert check.finite and seen.error_M.shape == (len(share.targets),)
    return _weights(objective) | {"loss": torch.tensor(check.loss, dtype=torch.float64)}


def _weights(objective: Any) -> dict[str, Tensor]:
    transcoder = objective.transcoder
    layers = sorted({*transcoder.share.sources, *transcoder.share.targets})
    return {
        f"{layer}.{key}": p.detach().clone() for layer in layers for key, p in layer_tensors(transcoder, layer).items()
    }


def adam_steps(name: str, mesh: Mesh) -> dict[str, Tensor]:
    """The same of autograd and PyTorch's Adam."""
    config = _config(name)
    objective, dead_LF = make_objective(config, mesh, torch.float64)
    # beta2 rounded to float32; the row engine's numbers are float64 of the same.
    biases = [*objective.transcoder.b_enc.values()]
    others = [parameter for name, parameter in objective.named_parameters() if ".b_enc." not in name]
    groups = [{"params": biases, "lr": BIAS_RATE * RATE}, {"params": others}]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=RATE, betas=(0.0, 0.999), eps=1e-8)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, _ = objective(*_inputs(config, objective.transcoder.share, mesh, step, dead_LF))
        loss.backward()
        optimizer.step()
    return _weights(objective) | {"loss": loss.detach()}


def all_cases(root: str) -> dict[str, Tensor]:
    """Work of two ranks: steps on both meshes, and jobs that end early and resume."""
    results = {}
    for mesh_name, sizes in MESHES.items():
        mesh = Mesh.create(*sizes)
        for name in CONFIGS:
            results |= {f"{mesh_name}/{name}/{key}": value for key, value in row_steps(name, mesh).items()}
        for numerics in NUMERICS:
            where = dict(zip(("layer", "column"), sizes, strict=True))
            _train(Path(root) / mesh_name / numerics, mesh, numerics, where)
    return results


def _train(folder: Path, mesh: Mesh, numerics: str, sizes: dict[str, int]) -> None:
    """A job from start to end, and one that is interrupted and resumed."""
    job = _job(numerics) | {"mesh": sizes}
    toy_trainer(toy_config(folder / "whole", **job), mesh).fit()
    with pytest.raises(StoreError):
        toy_trainer(toy_config(folder / "resumed", **job), mesh, broken_step=4).fit()
    toy_trainer(toy_config(folder / "resumed", **job), mesh).fit()


def _job(numerics: str, **more: Any) -> dict[str, Any]:
    weights, moments, beta1 = NUMERICS[numerics]
    optimizer = {"learning_rate": 0.01, "warmup_steps": 2, "ema_decay": 0.9, "kind": "row_adam", "gradient_clip": 0}
    optimizer |= {"weights": weights, "moments": moments, "betas": [beta1, 0.999]}
    return {"optimizer": optimizer, "clt": {"n_features": 64, "k": 4, "skip": True}} | more


@pytest.fixture(scope="module")
def two_ranks(
    run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Tensor]]]:
    """The folder in which two ranks trained, and what each of them returned."""
    root = tmp_path_factory.mktemp("two_ranks")
    return root, run_ranks(all_cases, 2, root=str(root))


@pytest.fixture(scope="module")
def alone() -> Any:
    """A world of one process."""
    with joined_job():
        yield Mesh.create(1)


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_without_momentum_are_those_of_adam(name: str, alone: Mesh) -> None:
    found, expected = row_steps(name, alone), adam_steps(name, alone)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_take_the_steps_of_one(name: str, mesh_name: str, alone: Mesh, two_ranks: Any) -> None:
    expected, config = row_steps(name, alone), _config(name)
    seen = set()
    for rank, found in enumerate(two_ranks[1]):
        columns = deal_layers(config, *MESHES[mesh_name])[rank].columns
        for key in (k.rpartition("/")[2] for k in found if k.startswith(f"{mesh_name}/{name}/")):
            seen.add(key)
            whole = own_columns(key, expected[key], columns)
            torch.testing.assert_close(found[f"{mesh_name}/{name}/{key}"], whole, rtol=1e-9, atol=1e-10, msg=key)
    assert seen == expected.keys()


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_resumed_job_ends_with_the_same_bits(numerics: str, mesh_name: str, two_ranks: Any) -> None:
    whole, resumed = (latest_folder(two_ranks[0] / mesh_name / numerics / end) for end in ("whole", "resumed"))
    assert whole is not None and resumed is not None and whole.name == resumed.name == "step_00000006"
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert {name.partition("_")[0] for name in names if "_" in name} == {"layer", "optimizer", "average"}
    for name in names:
        expected, found = read_tensors(whole / name), read_tensors(resumed / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), f"{name} {key}"


def test_job_moves_to_another_mesh(two_ranks: Any, alone: Mesh, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    with pytest.raises(StoreError):
        toy_trainer(toy_config(folder, **_job("float32")), alone, broken_step=4).fit()
    end = toy_trainer(toy_config(folder, **_job("float32")), alone).fit()
    for mesh_name in MESHES:
        other = latest_folder(two_ranks[0] / mesh_name / "float32" / "whole")
        assert other is not None
        for layer in range(4):
            for key, value in read_tensors(end / f"layer_{layer:02d}.safetensors").items():
                found = read_tensors(other / f"layer_{layer:02d}.safetensors")[key]
                torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4, msg=f"{mesh_name} {layer} {key}")


@pytest.mark.parametrize("numerics", NUMERICS)
def test_small_numbers_train_as_well_as_float32(numerics: str, alone: Mesh, tmp_path: Path) -> None:
    losses = {}
    for name in ("float32", numerics):
        config = toy_config(tmp_path / name, **_job(name, steps=40, log_every=1, checkpoint_every=40))
        toy_trainer(config, alone).fit()
        losses[name] = [report["loss"] for report in read_metrics(tmp_path / name / "metrics.jsonl")]
    start, end = losses["float32"][0], sum(losses["float32"][-10:]) / 10
    assert end < start / 1.5
    assert sum(losses[numerics][-10:]) / 10 < 1.1 * end


def test_step_that_is_not_finite_moves_nothing(alone: Mesh, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(tmp_path / "out", **_job("float32", log_every=1)), alone, nan_steps=(2, 3))
    trainer.fit()
    reports = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [report["skipped_steps"] for report in reports] == [0, 0, 1, 2, 2, 2]
    assert all(p.isfinite().all() for p in trainer.transcoder.parameters())


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"data": {"batch_tokens": 64, "micro_batches": 2}}, r"data\.micro_batches=2 is not supported with optimizer"),
        ({"mesh": {"zero_stage": 1}}, r"mesh\.zero_stage=1 is not supported with optimizer\.kind=row_adam"),
        (
            {"clt": {"n_features": 64, "k": 4, "tied_decoders": "source"}},
            r"clt\.tied_decoders=source is not supported with optimizer\.kind=row_adam",
        ),
        (
            {"clt": {"n_features": 64, "k": 4, "independent": "sum"}},
            r"clt\.independent=sum is not supported with optimizer\.kind=row_adam",
        ),
        (
            {"clt": {"n_features": 64, "k": 4, "sparsity": {"kind": "relu"}}},
            r"clt\.sparsity\.kind=relu is not supported",
        ),
    ],
)
def test_unsupported_settings_are_errors_that_name_the_key(
    job: dict[str, Any], message: str, alone: Mesh, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_trainer(toy_config(tmp_path, **(_job("float32") | job)), alone)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"kind": "row_adam"}, r"optimizer.*gradient_clip=1 is not supported with kind=row_adam"),
        ({"moments": "int8"}, r"optimizer.*moments=int8 needs kind=row_adam"),
        ({"weights": "bfloat16"}, r"optimizer.*weights=bfloat16 is not supported with kind=adam"),
    ],
)
def test_incompatible_settings_are_an_error(optimizer: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_config(tmp_path, optimizer=optimizer)
