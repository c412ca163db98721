"""The mesh and the exchange of codes: sharded equals unsharded, whatever the shape of the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toy_job import ToyBatches, toy_scaling

from clt.config import AuxKSettings, CLTConfig
from clt.engine import joined_job
from clt.errors import ConfigError
from clt.model import CrossLayerTranscoder, LayerShare, source_layers, sources_of, target_layers
from clt.objective import Objective
from clt.parallel import CodeExchange, Mesh, deal_layers, input_layers
from clt.weights import layer_tensors

ARCHITECTURES = {
    "own_layer_first": {"first_offset": 0},
    "later_layers_only": {"first_offset": 1},
    "short_horizon_and_skip": {"n_targets": 2, "skip": True},
}


def _architecture(name: str) -> CLTConfig:
    return CLTConfig(n_features=64, k=4, n_layers=4, d_model=16, **ARCHITECTURES[name])


def _job(config: CLTConfig, mesh: Mesh, dtype: torch.dtype) -> tuple[Objective, ToyBatches, Tensor]:
    """Objective with weights that depend on the layer only, its batches, and which features count as dead."""
    shares = deal_layers(config, mesh.layer_size)
    share = shares[mesh.layer_rank]
    clt = CrossLayerTranscoder(config, toy_scaling(), share).to(dtype)
    for layer in share.targets:
        draw = torch.Generator().manual_seed(layer)
        for group in (clt.W_dec, clt.W_skip):
            if str(layer) in group:
                group[str(layer)].data = torch.randn(group[str(layer)].shape, generator=draw).to(dtype) / 16
    dead_LF = torch.zeros(len(share.sources), config.n_features, dtype=torch.bool)
    dead_LF[:, ::3] = True
    objective = Objective(clt, CodeExchange(mesh, shares), AuxKSettings(coefficient=0.5, token_fraction=0.25))
    return objective, ToyBatches(config, share, mesh.data_rank, mesh.data_size), dead_LF


def _backward(objective: Objective, batch: Any, dead_LF: Tensor, mesh: Mesh, dtype: torch.dtype) -> Tensor:
    """The loss over all ranks; gradients are averaged over the data axis."""
    loss, _ = objective(batch.x.to(dtype), batch.y.to(dtype), objective.transcoder.config.k, dead_LF)
    loss.backward()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    mean = mesh.all_reduce(torch.cat([g.flatten() for g in gradients]), "data") / mesh.data_size
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return mesh.all_reduce(loss.detach().clone(), "world") / mesh.data_size


def one_step(name: str, layer_size: int) -> dict[str, Tensor]:
    """Loss, gradients and codes of a float32 step."""
    mesh = Mesh.create(layer_size)
    objective, batches, dead_LF = _job(_architecture(name), mesh, torch.float32)
    clt = objective.transcoder
    batch = next(iter(batches))
    results = {"loss": _backward(objective, batch, dead_LF, mesh, torch.float32)}
    for layer in sorted({*clt.share.sources, *clt.share.targets}):
        results |= {f"grad.{layer}.{key}": p.grad for key, p in layer_tensors(clt, layer).items()}
    rows = [input_layers(clt.config, clt.share).index(layer) for layer in clt.share.sources]
    x_LBD = clt.scaling.standardise_x(batch.x[rows], clt.share.sources)
    codes, one_more = clt.encode(x_LBD), clt.encode(x_LBD, clt.config.k + 1)
    for row, layer in enumerate(clt.share.sources):
        results[f"indices.{layer}.{mesh.data_rank}"] = codes.indices[row]
        smallest_B2 = one_more.values[row].detach().sort(dim=1).values[:, :2]
        results[f"margin.{layer}.{mesh.data_rank}"] = smallest_B2[:, 1] - smallest_B2[:, 0]
    return results


def fifty_steps(name: str, layer_size: int) -> dict[str, Tensor]:
    """Weights after 50 float64 steps of plain Adam."""
    mesh = Mesh.create(layer_size)
    objective, batches, dead_LF = _job(_architecture(name), mesh, torch.float64)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
    for _, batch in zip(range(50), batches, strict=False):
        optimizer.zero_grad()
        loss = _backward(objective, batch, dead_LF, mesh, torch.float64)
        optimizer.step()
    clt = objective.transcoder
    results = {"loss": loss}
    for layer in sorted({*clt.share.sources, *clt.share.targets}):
        results |= {f"weight.{layer}.{key}": p.detach() for key, p in layer_tensors(clt, layer).items()}
    return results


def every_case(layer_sizes: list[int], names: list[str]) -> dict[str, Tensor]:
    """Architectures on meshes of this world; keys are prefixed by layer size, case and architecture."""
    results = {}
    for layer_size in layer_sizes:
        for name in names:
            for case in (one_step, fifty_steps):
                for key, value in case(name, layer_size).items():
                    results[f"{layer_size}/{case.__name__}/{name}/{key}"] = value
    return results


@pytest.fixture(scope="module")
def unsharded() -> dict[str, Tensor]:
    """One process that owns everything; keys have no layer size."""
    with joined_job():
        return {key.partition("/")[2]: value for key, value in every_case([1], [*ARCHITECTURES]).items()}


@pytest.fixture(scope="module")
def sharded(run_ranks: Callable[..., list[dict[str, Tensor]]]) -> dict[str, list[dict[str, Tensor]]]:
    """What every rank of every mesh found, by the mesh's shape data x layer."""
    ranks = run_ranks(every_case, 2, layer_sizes=[1, 2], names=[*ARCHITECTURES])
    return {"2x1": _select(ranks, "1/"), "1x2": _select(ranks, "2/")}


@pytest.fixture(scope="module")
def sharded_both_ways(run_ranks: Callable[..., list[dict[str, Tensor]]]) -> dict[str, list[dict[str, Tensor]]]:
    """The same on four ranks."""
    return {"2x2": _select(run_ranks(every_case, 4, layer_sizes=[2], names=[*ARCHITECTURES]), "2/")}


def _select(ranks: list[dict[str, Tensor]], prefix: str) -> list[dict[str, Tensor]]:
    return [{k.removeprefix(prefix): v for k, v in rank.items() if k.startswith(prefix)} for rank in ranks]


@pytest.mark.parametrize("shape", ["2x1", "1x2"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_sharded_step_equals_unsharded(
    shape: str, name: str, sharded: dict[str, list[dict[str, Tensor]]], unsharded: dict[str, Tensor]
) -> None:
    prefix = f"one_step/{name}/"
    compared = set()
    for rank in sharded[shape]:
        for key in (k for k in rank if k.startswith(prefix) and ("grad" in k or "loss" in k)):
            expected = unsharded[key]
            # Only the order of float32 sums differs: 1e-5 of the tensor's largest entry.
            assert (rank[key] - expected).abs().max() <= 1e-5 * expected.abs().max(), key
            compared.add(key)
    assert compared == {k for k in unsharded if k.startswith(prefix) and ("grad" in k or "loss" in k)}


@pytest.mark.parametrize("shape", ["2x1", "1x2"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sharded_step_selects_the_same_features(
    shape: str, name: str, sharded: dict[str, list[dict[str, Tensor]]], unsharded: dict[str, Tensor]
) -> None:
    config = _architecture(name)
    data_size = int(shape[0])
    found = {k: v for rank in sharded[shape] for k, v in rank.items()}
    for layer in source_layers(config):
        parts = [found[f"one_step/{name}/indices.{layer}.{rank}"] for rank in range(data_size)]
        # How far the k-th activation is above the next: closer calls may fall either way.
        clear = unsharded[f"one_step/{name}/margin.{layer}.0"] >= 1e-5
        assert clear.float().mean() > 0.9
        assert torch.equal(torch.cat(parts)[clear], unsharded[f"one_step/{name}/indices.{layer}.0"][clear])


@pytest.mark.parametrize("shape", ["2x1", "1x2"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fifty_sharded_float64_steps_equal_unsharded(
    shape: str, name: str, sharded: dict[str, list[dict[str, Tensor]]], unsharded: dict[str, Tensor]
) -> None:
    prefix = f"fifty_steps/{name}/"
    for rank in sharded[shape]:
        for key in (k for k in rank if k.startswith(prefix)):
            torch.testing.assert_close(rank[key], unsharded[key], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_sharded_both_ways_equals_unsharded(
    name: str, sharded_both_ways: dict[str, list[dict[str, Tensor]]], unsharded: dict[str, Tensor]
) -> None:
    test_one_sharded_step_equals_unsharded("2x2", name, sharded_both_ways, unsharded)
    test_sharded_step_selects_the_same_features("2x2", name, sharded_both_ways, unsharded)
    test_fifty_sharded_float64_steps_equal_unsharded("2x2", name, sharded_both_ways, unsharded)


@given(
    n_layers=st.integers(2, 40), n_ranks=st.integers(1, 16), horizon=st.integers(1, 40), offset=st.sampled_from([0, 1])
)
def test_deal_layers_gives_each_layer_one_owner(n_layers: int, n_ranks: int, horizon: int, offset: int) -> None:
    config = CLTConfig(n_features=8, k=1, n_layers=n_layers, d_model=4, n_targets=horizon, first_offset=offset)
    if n_ranks > len(target_layers(config)):
        with pytest.raises(ConfigError, match=r"mesh\.layer"):
            deal_layers(config, n_ranks)
        return
    shares = deal_layers(config, n_ranks)
    assert sorted(layer for share in shares for layer in share.sources) == list(source_layers(config))
    assert sorted(layer for share in shares for layer in share.targets) == list(target_layers(config))
    assert all(share.sources and share.targets for share in shares)
    for layer in set(source_layers(config)) & set(target_layers(config)):
        assert [layer in s.sources for s in shares] == [layer in s.targets for s in shares], "a layer is torn apart"


def test_deal_layers_balances_the_decoders() -> None:
    config = CLTConfig(n_features=8, k=1, n_layers=32, d_model=4, n_targets=16)
    for n_ranks in (2, 4, 8):
        cost = [
            sum(len(sources_of(config, layer)) for layer in share.targets) for share in deal_layers(config, n_ranks)
        ]
        assert max(cost) / (sum(cost) / n_ranks) < 1.05


def test_deal_layers_gives_one_rank_everything() -> None:
    config = _architecture("later_layers_only")
    assert deal_layers(config, 1) == (LayerShare.everything(config),)


def test_mesh_that_the_world_does_not_fill_is_a_config_error() -> None:
    with joined_job(), pytest.raises(ConfigError, match=r"mesh\.layer=3 does not divide the 1 processes"):
        Mesh.create(3)
