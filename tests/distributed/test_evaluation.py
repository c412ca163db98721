"""Evaluation of a sharded transcoder: the measures of the whole one on every mesh, and unchanged training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clt.checkpoint.columns import own_columns
from clt.checkpoint.gather import gather_transcoder
from clt.checkpoint.weights import layer_buffers, layer_tensors, read_tensors
from clt.distributed.mesh import Mesh, deal_layers, input_layers
from clt.errors import StoreError
from clt.evaluation.evaluator import Evaluation, StoreEvaluator, StoreReport, evaluate_store
from clt.records import ActivationBatch, TokenTable
from clt.training.deepspeed_engine import joined_job
from clt.training.metrics import read_metrics
from clt.transcoder.architecture import CLTConfig, SparsitySettings
from clt.transcoder.layers import LayerShare
from clt.transcoder.model import CrossLayerTranscoder

from .toy_job import D_MODEL, N_LAYERS, global_batch, toy_config, toy_scaling, toy_trainer

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "later_layers_only": {"first_offset": 1},
    "short_horizon_and_skip": {"n_targets": 2, "skip": True},
    "joint_topk": {"sparsity": SparsitySettings(kind="joint_topk")},
    "batch_topk": {"sparsity": SparsitySettings(kind="batch_topk")},
    "jumprelu": {"sparsity": SparsitySettings(kind="jumprelu")},
    "one_decoder_per_target": {"tied_decoders": "target", "skip": True},
    "one_decoder_per_source": {"tied_decoders": "source", "n_targets": 3},
    "mean_of_independent": {"independent": "mean"},
    "nearest_of_independent": {"independent": "nearest", "n_targets": 3},
}
MESHES = {"data": (1, 1), "layer": (2, 1), "column": (1, 2)}
TOKENS = 70


def _transcoder(name: str, share: LayerShare | None = None) -> CrossLayerTranscoder:
    """A transcoder of random weights, or a share of it."""
    config = CLTConfig(n_features=32, k=4, n_layers=N_LAYERS, d_model=D_MODEL, **ARCHITECTURES[name])
    draw = torch.Generator().manual_seed(3)
    transcoder = CrossLayerTranscoder(config, toy_scaling(), share).double().requires_grad_(False)
    for key in ("W_dec", "b_dec", "W_skip", "W_shared", "target_scale"):
        for layer in range(N_LAYERS):
            random = torch.randn(N_LAYERS, config.n_features, D_MODEL, generator=draw, dtype=torch.float64) / 8
            if str(layer) not in getattr(transcoder, key):
                continue
            own = getattr(transcoder, key)[str(layer)]
            width = config.n_features if key == "target_scale" else D_MODEL
            shape = (D_MODEL, D_MODEL) if key == "W_skip" else (*own.shape[:-1], width)
            whole = random.flatten()[: math.prod(shape)].view(shape)
            own.copy_(own_columns(key, whole, share and share.columns))
    for layer in transcoder.share.sources:
        for buffer in layer_buffers(transcoder, layer).values():
            buffer.fill_(0.3 + layer / 10)
    return transcoder


def _whole_batch() -> ActivationBatch:
    x, y = global_batch(0, TOKENS)
    zeros = torch.zeros(TOKENS)
    names = ("sample", "position", "token_id", "patch_row", "patch_col", "image")
    modality = (torch.arange(TOKENS) % 3 == 0).to(torch.uint8)
    tokens = TokenTable(**dict.fromkeys(names, zeros), modality=modality)
    return ActivationBatch(x=x.double(), y=y.double(), tokens=tokens)


def _batches(transcoder: CrossLayerTranscoder, mesh: Mesh, size: int = 16) -> Iterator[ActivationBatch]:
    """This rank's layers and tokens; the first data rank has 50 of the 70 tokens, and more batches."""
    batch, rows = _whole_batch(), [slice(0, TOKENS)]
    if mesh.data_size == 2:
        rows = [slice(0, 50), slice(50, TOKENS)]
    own = rows[mesh.data_rank]
    x_layers, y_layers = list(input_layers(transcoder.config, transcoder.share)), list(transcoder.share.targets)
    for start in range(own.start, own.stop, size):
        part = slice(start, min(own.stop, start + size))
        yield ActivationBatch(x=batch.x[x_layers, part], y=batch.y[y_layers, part], tokens=batch.tokens.select(part))


def _numbers(report: StoreReport) -> dict[str, Tensor]:
    evaluation = report.evaluation()
    numbers = {tag: torch.tensor(value, dtype=torch.float64) for tag, value in evaluation.scalars.items()}
    for tag, histograms in evaluation.histograms.items():
        for layer, counts in histograms.counts.items():
            numbers[f"{tag}/{layer}"] = torch.tensor([*counts, histograms.outside[layer]])
    return numbers


def _measured(names: list[str], meshes: list[str]) -> dict[str, Tensor]:
    """Reports and gathered transcoders; keys begin with mesh and architecture."""
    results: dict[str, Tensor] = {}
    for shape in meshes:
        mesh = Mesh.create(*MESHES[shape])
        for name in names:
            shares = deal_layers(_transcoder(name).config, mesh.layer_size, mesh.column_size)
            transcoder = _transcoder(name, shares[mesh.model_rank]).eval()

            def batches(transcoder: CrossLayerTranscoder = transcoder, mesh: Mesh = mesh) -> Iterator[ActivationBatch]:
                return _batches(transcoder, mesh)

            numbers = _numbers(StoreEvaluator(batches).report(transcoder, mesh))
            whole = gather_transcoder(transcoder, mesh)
            assert (whole is not None) == mesh.is_first
            for layer in range(N_LAYERS) if whole is not None else ():
                tensors = layer_tensors(whole, layer) | layer_buffers(whole, layer)
                numbers |= {f"gathered/{layer}/{key}": tensor.clone() for key, tensor in tensors.items()}
            results |= {f"{shape}/{name}/{key}": value for key, value in numbers.items()}
    return results


def _one_rank_cannot_read() -> str:
    mesh = Mesh.create(1, 1)

    def batches() -> Iterator[ActivationBatch]:
        if mesh.data_rank == 1:
            raise StoreError("units/0001: file is truncated; capture it again")
        yield from _batches(_transcoder("later_layers_only"), mesh)

    try:
        StoreEvaluator(batches).report(_transcoder("later_layers_only"), mesh)
    except StoreError as error:
        return str(error)
    return ""


def all_cases(root: str) -> dict[str, Tensor]:
    """Results of two ranks."""
    results = _measured([*ARCHITECTURES], [*MESHES])
    (Path(root) / f"error_{Mesh.create(1).data_rank}.txt").write_text(_one_rank_cannot_read())
    for shape, (layer, column) in MESHES.items():
        mesh = Mesh.create(layer, column)
        job = {"mesh": {"layer": layer, "column": column}, "evaluation": {"every": 2, "store": "held out"}}
        config = toy_config(Path(root) / shape, **job)
        trainer = toy_trainer(config, mesh)
        trainer._evaluators = [_store_evaluator(trainer.transcoder, mesh), _gathers]
        trainer.fit()
        toy_trainer(toy_config(Path(root) / f"{shape}_plain", mesh=job["mesh"]), mesh).fit()
    return results


def _store_evaluator(transcoder: CrossLayerTranscoder, mesh: Mesh) -> StoreEvaluator:
    def batches() -> Iterator[ActivationBatch]:
        for batch in _batches(transcoder, mesh):
            yield ActivationBatch(x=batch.x.float(), y=batch.y.float(), tokens=batch.tokens)

    return StoreEvaluator(batches)


def _gathers(transcoder: CrossLayerTranscoder, mesh: Mesh, between: Callable[[], None]) -> Evaluation:
    gather_transcoder(transcoder, mesh)
    return Evaluation(scalars={"random": float(torch.get_rng_state().double().sum())})


@pytest.fixture(scope="module")
def cases(
    run_ranks: Callable[..., list[dict[str, Tensor]]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Tensor]], Path]:
    """Results of two ranks, and the folder they wrote to."""
    root = tmp_path_factory.mktemp("evaluation")
    return run_ranks(all_cases, 2, root=str(root)), root


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_rank_measures_the_same_as_evaluate_store(name: str) -> None:
    with joined_job():
        found = _measured([name], ["data"])
    _compare(found, name, "data")


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_ranks_of_a_mesh_measure_the_same_as_evaluate_store(
    name: str, shape: str, cases: tuple[list[dict[str, Tensor]], Path]
) -> None:
    for rank in cases[0]:
        _compare(rank, name, shape)


def _compare(found: dict[str, Tensor], name: str, shape: str) -> None:
    expected = _numbers(evaluate_store(_transcoder(name).eval(), [_whole_batch()]))
    assert len(expected) > 30
    for key, value in expected.items():
        # Float64 throughout: only the order of sums differs. Counts are equal.
        torch.testing.assert_close(found[f"{shape}/{name}/{key}"], value, rtol=1e-10, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gathered_transcoder_is_the_whole_one(
    name: str, shape: str, cases: tuple[list[dict[str, Tensor]], Path]
) -> None:
    whole, first = _transcoder(name), cases[0][0]
    tensors = {
        f"{layer}/{key}": tensor
        for layer in range(N_LAYERS)
        for key, tensor in (layer_tensors(whole, layer) | layer_buffers(whole, layer)).items()
    }
    for key, tensor in tensors.items():
        assert torch.equal(first[f"{shape}/{name}/gathered/{key}"], tensor), key


def test_store_that_one_rank_cannot_read_fails_on_all(cases: tuple[list[dict[str, Tensor]], Path]) -> None:
    for rank in (0, 1):
        assert "units/0001" in (cases[1] / f"error_{rank}.txt").read_text()


@pytest.mark.parametrize("shape", MESHES)
def test_training_with_and_without_evaluation_ends_with_the_same_bits(
    shape: str, cases: tuple[list[dict[str, Tensor]], Path]
) -> None:
    watched, plain = cases[1] / shape, cases[1] / f"{shape}_plain"
    files = sorted((plain / "step_00000006").glob("*.safetensors"))
    assert len(files) == 2 * N_LAYERS + 1
    for path in files:
        expected, found = read_tensors(path), read_tensors(watched / "step_00000006" / path.name)
        assert all(torch.equal(expected[key], found[key]) for key in expected), path.name
    reports = read_metrics(watched / "metrics.jsonl")
    held_out = [report for report in reports if "heldout/fvu/mean" in report]
    assert [report["step"] for report in held_out] == [2, 4, 6]
    assert [report["step"] for report in reports if "loss" in report] == [2, 4, 6]
    assert held_out[-1]["heldout/tokens"] == TOKENS
    # Nobody draws random numbers, neither training nor evaluation.
    assert len({report["random"] for report in held_out}) == 1
    plain_reports = read_metrics(plain / "metrics.jsonl")
    assert [r["loss"] for r in reports if "loss" in r] == [r["loss"] for r in plain_reports]
