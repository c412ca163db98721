"""The mesh: sharded equals unsharded for every shape, and every layer has one owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clt.distributed.mesh import Mesh, deal_layers
from clt.errors import ConfigError
from clt.training.deepspeed_engine import joined_job
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare, source_layers, sources_of, target_layers

from .sharded_steps import assert_equal_unsharded, assert_same_features, run_cases, tree_of

ARCHITECTURES = {
    "own_layer_first": {"first_offset": 0},
    "later_layers_only": {"first_offset": 1},
    "short_horizon_and_skip": {"n_targets": 2, "skip": True},
}
TOKENS = 64

Ranks = list[dict[str, Tensor]]


def _architecture(name: str) -> CLTConfig:
    return CLTConfig(n_features=64, k=4, n_layers=4, d_model=16, **ARCHITECTURES[name])


def every_case(meshes: list[list[int]]) -> dict[str, Tensor]:
    """All architectures on meshes of this world."""
    configs: dict[str, Any] = {name: tree_of(_architecture(name)) for name in ARCHITECTURES}
    return run_cases(configs, meshes, ["one_step", "fifty_steps"], TOKENS)


@pytest.fixture(scope="module")
def unsharded() -> dict[str, Tensor]:
    """One process that owns everything."""
    with joined_job():
        return every_case([[1, 1]])


@pytest.fixture(scope="module")
def two_ranks(run_ranks: Callable[..., Ranks]) -> Ranks:
    """Results of both ranks on every mesh of two."""
    return run_ranks(every_case, 2, meshes=[[1, 1], [2, 1], [1, 2]])


@pytest.fixture(scope="module")
def four_ranks(run_ranks: Callable[..., Ranks]) -> Ranks:
    """The same on four ranks."""
    return run_ranks(every_case, 4, meshes=[[1, 1], [2, 1], [1, 2], [2, 2], [1, 4]])


@pytest.mark.parametrize("mesh", ["1x1", "2x1", "1x2"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_on_two_ranks_equals_unsharded(
    mesh: str, name: str, two_ranks: Ranks, unsharded: dict[str, Tensor]
) -> None:
    assert_equal_unsharded(_architecture(name), name, mesh, two_ranks, unsharded)
    assert_same_features(_architecture(name), name, mesh, two_ranks, unsharded)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1", "2x1", "1x2", "2x2", "1x4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_on_four_ranks_equals_unsharded(
    mesh: str, name: str, four_ranks: Ranks, unsharded: dict[str, Tensor]
) -> None:
    assert_equal_unsharded(_architecture(name), name, mesh, four_ranks, unsharded)
    assert_same_features(_architecture(name), name, mesh, four_ranks, unsharded)


@given(
    n_layers=st.integers(2, 40),
    n_ranks=st.integers(1, 16),
    columns=st.sampled_from([1, 2, 4]),
    horizon=st.integers(1, 40),
    offset=st.sampled_from([0, 1]),
)
def test_deal_layers_gives_each_layer_one_owner(
    n_layers: int, n_ranks: int, columns: int, horizon: int, offset: int
) -> None:
    config = CLTConfig(n_features=8, k=1, n_layers=n_layers, d_model=4, n_targets=horizon, first_offset=offset)
    if n_ranks > len(target_layers(config)):
        with pytest.raises(ConfigError, match=r"mesh\.layer"):
            deal_layers(config, n_ranks, columns)
        return
    shares = deal_layers(config, n_ranks, columns)
    assert len(shares) == n_ranks * columns
    assert sorted(layer for share in shares for layer in share.sources) == list(source_layers(config))
    owned = [(layer, column) for share in shares for layer in share.targets for column in share.columns or range(4)]
    assert sorted(owned) == [(layer, column) for layer in target_layers(config) for column in range(4)]
    groups = [shares[first : first + columns] for first in range(0, len(shares), columns)]
    assert all(share.targets == group[0].targets for group in groups for share in group)
    for layer in set(source_layers(config)) & set(target_layers(config)):
        with_source = [any(layer in share.sources for share in group) for group in groups]
        assert with_source == [layer in group[0].targets for group in groups], "a layer is torn apart"


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


def test_mesh_with_columns_that_the_world_does_not_fill_is_a_config_error() -> None:
    with joined_job(), pytest.raises(ConfigError, match=r"mesh\.layer=2 times mesh\.column=3 does not divide the 1 "):
        Mesh.create(2, 3)


def test_columns_that_do_not_divide_the_width_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.column=3 does not divide the model's width 16"):
        deal_layers(_architecture("own_layer_first"), 1, 3)
