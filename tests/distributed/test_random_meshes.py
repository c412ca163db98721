"""Sharded equals unsharded for random configs, on every shape of mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clt.training.deepspeed_engine import joined_job
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import target_layers

from .sharded_steps import assert_equal_unsharded, assert_same_features, run_cases, tree_of

#: Divides by four data ranks, and their parts by every-fourth of AuxK.
TOKENS = 32
#: layer x column of the meshes of each world; the rest is the data axis.
MESHES = {2: [[1, 1], [2, 1], [1, 2]], 4: [[1, 1], [2, 1], [1, 2], [4, 1], [2, 2], [1, 4]]}

#: Forms of decoders (`clt.transcoder.decoding`).
VARIANTS: list[dict[str, Any]] = [{}, {"tied_decoders": "target"}, {"tied_decoders": "source"}, {"independent": "sum"}]

Ranks = list[dict[str, Tensor]]


@st.composite
def architectures(draw: st.DrawFn) -> CLTConfig:
    """Small configs with enough targets for four layer ranks and a width that four column ranks split."""
    offset = draw(st.sampled_from([0, 1]))
    n_features = draw(st.integers(8, 40))
    variant = draw(st.sampled_from(VARIANTS))
    config = CLTConfig(
        n_layers=draw(st.integers(4 + offset, 7)),
        d_model=4 * draw(st.integers(1, 5)),
        n_features=n_features,
        k=draw(st.integers(1, min(6, n_features - 1))),
        n_targets=draw(st.none() | st.integers(1, 7)),
        first_offset=offset,
        skip=draw(st.booleans()) and "independent" not in variant,
        **variant,
    )
    assert len(target_layers(config)) >= 4
    return config


def some_cases(configs: dict[str, Any], meshes: list[list[int]], long: list[str]) -> dict[str, Tensor]:
    """One step of every config, fifty of some."""
    few = {name: configs[name] for name in long}
    return run_cases(configs, meshes, ["one_step"], TOKENS) | run_cases(few, meshes, ["fifty_steps"], TOKENS)


def _check(configs: list[CLTConfig], world: int, run_ranks: Callable[..., Ranks]) -> None:
    trees = {f"config{number}": tree_of(config) for number, config in enumerate(configs)}
    arguments: dict[str, Any] = {"configs": trees, "long": ["config0"]}
    with joined_job():
        unsharded = some_cases(meshes=[[1, 1]], **arguments)
    ranks = run_ranks(some_cases, world, meshes=MESHES[world], **arguments)
    for layer, column in MESHES[world]:
        for name, config in zip(trees, configs, strict=True):
            margins = [v for k, v in unsharded.items() if k.startswith(f"1x1/one_step/{name}/margin")]
            # A call between two features that is too close may fall either way, and moves gradients if it does.
            clear = all(bool((margin >= 1e-5).all()) for margin in margins)
            mesh = f"{layer}x{column}"
            assert_same_features(config, name, mesh, ranks, unsharded)
            assert_equal_unsharded(config, name, mesh, ranks, unsharded, exact_sets=clear)


def _examples(configs: int, examples: int) -> Callable[..., Any]:
    """Many configs in each example, as processes cost more than steps; no shrinking for the same reason."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors]
        limits = settings(
            max_examples=examples, phases=[Phase.generate], deadline=None, derandomize=True, suppress_health_check=quiet
        )
        drawn: Callable[..., None] = given(st.lists(architectures(), min_size=configs, max_size=configs))(test)
        return limits(drawn)

    return decorate


@_examples(configs=5, examples=1)
def test_random_config_on_two_ranks_equals_unsharded(run_ranks: Callable[..., Ranks], configs: list[CLTConfig]) -> None:
    _check(configs, 2, run_ranks)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_form_of_decoders_on_many_ranks_equals_unsharded(run_ranks: Callable[..., Ranks], world: int) -> None:
    shape: dict[str, Any] = {"n_layers": 5, "d_model": 8, "n_features": 20, "k": 3, "n_targets": 4}
    # Five sources on two ranks, or on four, of which columns leave some without any; fifty steps of the first.
    alone = {"independent": "mean", "source": 1}
    variants = [*sorted(VARIANTS[1:], key=lambda variant: "source" not in variant.values()), alone]
    _check([CLTConfig(**shape, **variant) for variant in variants], world, run_ranks)


@pytest.mark.slow
@_examples(configs=8, examples=5)
def test_many_random_configs_on_two_ranks_equal_unsharded(
    run_ranks: Callable[..., Ranks], configs: list[CLTConfig]
) -> None:
    _check(configs, 2, run_ranks)


@pytest.mark.slow
@_examples(configs=4, examples=3)
def test_random_config_on_four_ranks_equals_unsharded(
    run_ranks: Callable[..., Ranks], configs: list[CLTConfig]
) -> None:
    _check(configs, 4, run_ranks)
