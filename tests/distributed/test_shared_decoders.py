"""Decoders that belong to sources: what arrives on every rank, and the bytes that the plan promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from clt.config import config_to_tree, parse_config
from clt.distributed.mesh import Mesh
from clt.distributed.shared_decoders import shared_decoders
from clt.planning.counts import traffic
from clt.planning.job import NUMERICS, Job, MeshShape
from clt.training.settings import TrainConfig
from clt.transcoder.architecture import CLTConfig, TranscoderSettings

from .sharded_steps import batch_of, make_objective

#: Four sources, so that every rank owns as many; the farther ones have fewer targets.
SETTINGS = {f.name for f in fields(TranscoderSettings)}
CONFIG = CLTConfig(n_layers=4, d_model=8, n_features=12, k=2, tied_decoders="source", n_targets=3)
MESHES = [[2, 1], [1, 2]]
TOKENS = 8


def received(layer_size: int, column_size: int) -> dict[str, Tensor]:
    """Decoders and scales of every own target, the owner's parameters, and bytes moved by a step beyond its codes."""
    mesh = Mesh.create(layer_size, column_size)
    objective, _ = make_objective(CONFIG, mesh, torch.float32)
    transcoder = objective.transcoder
    kinds: tuple[Any, ...] = ("all_gather", "reduce_scatter")
    with torch.no_grad():
        shared = shared_decoders(transcoder, mesh)
    assert shared is not None
    results = {"forward": torch.tensor(mesh.traffic.sent("model", "all_gather"))}
    for target in transcoder.share.targets:
        W_SFD, scale_SF = shared.into(target)
        results |= {f"W.{target}": W_SFD.clone(), f"scale.{target}": scale_SF}
    for source in transcoder.share.sources:
        results |= {
            f"own_W.{source}": transcoder.W_shared[str(source)],
            f"own_scale.{source}": transcoder.target_scale[str(source)],
        }
    loss, _ = objective(*batch_of(CONFIG, transcoder.share, mesh, 0, TOKENS), CONFIG.k, None)
    loss.backward()
    results["sent"] = torch.tensor(sum(mesh.traffic.sent("model", kind) for kind in kinds))
    return {key: value.detach() for key, value in results.items()}


@pytest.mark.parametrize(("layer", "column"), MESHES)
def test_every_rank_receives_its_columns_of_all_decoders(
    layer: int, column: int, run_ranks: Callable[..., list[dict[str, Tensor]]]
) -> None:
    ranks = run_ranks(received, 2, layer_size=layer, column_size=column)
    owned = {key: value for rank in ranks for key, value in rank.items() if key.startswith("own_")}
    assert len(owned) == 2 * CONFIG.n_layers
    seen = 0
    for number, rank in enumerate(ranks):
        width = CONFIG.d_model // column
        own = slice(number * width, (number + 1) * width) if column > 1 else slice(None)
        for target in (key.removeprefix("W.") for key in rank if key.startswith("W.")):
            for row, source in enumerate(range(max(0, int(target) - 2), int(target) + 1)):
                assert torch.equal(rank[f"W.{target}"][row], owned[f"own_W.{source}"][:, own])
                assert torch.equal(rank[f"scale.{target}"][row], owned[f"own_scale.{source}"][int(target) - source])
                seen += 1
    assert seen == 9 * column

    transcoder = {key: value for key, value in config_to_tree(CONFIG).items() if key in SETTINGS}
    tree = {"store": "s", "output": "o", "steps": 1, "clt": transcoder, "data": {"batch_tokens": TOKENS}}
    train = parse_config(TrainConfig, tree | {"auxk": {"coefficient": 0}}, "job")
    mesh = MeshShape(data=1, layer=layer, column=column, zero=0)
    moved = traffic(Job(config=train, architecture=CONFIG, mesh=mesh, numerics=NUMERICS["float32"]))
    for rank in ranks:
        assert rank["forward"] == moved.shared_decoders / 2
        codes = moved.values + moved.indices + moved.code_gradients
        assert rank["sent"] - rank["forward"] == codes + moved.shared_decoders
