"""The bytes that a training run reports as sent are those of the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clt.distributed.mesh import Mesh
from clt.planning.counts import StepTraffic, traffic
from clt.planning.job import NUMERICS, Job, MeshShape
from clt.training.metrics import read_metrics

from .toy_job import BATCH_TOKENS, architecture, toy_config, toy_trainer

AXES = ("model", "data", "world")
#: Dead features from the third of six steps on, so that the last report is of two steps with all that can travel.
AUXK = {"dead_after_tokens": 128, "token_fraction": 0.25}
#: data, layer, column, ZeRO.
TWO_RANKS = [(1, 2, 1, 0), (1, 1, 2, 0), (2, 1, 1, 0), (2, 1, 1, 1), (2, 1, 1, 2)]
FOUR_RANKS = [(1, 4, 1, 0), (1, 2, 2, 0), (2, 2, 1, 0), (4, 1, 1, 0), (2, 1, 2, 2)]
Shape = tuple[int, int, int, int]


def _settings(layer: int, column: int, zero: int, with_auxk: bool) -> dict[str, Any]:
    auxk = AUXK if with_auxk else {"coefficient": 0}
    # ZeRO-2 reduces after every micro-batch, the others once a step.
    data = {"batch_tokens": BATCH_TOKENS, "micro_batches": 2 if zero else 1}
    return {"mesh": {"layer": layer, "column": column, "zero_stage": zero}, "auxk": auxk, "data": data}


def runs(outputs: str, shapes: list[Shape]) -> dict[str, Tensor]:
    """Bytes that the first rank reports per step on every mesh, with and without AuxK."""
    results = {}
    for _, layer, column, zero in shapes:
        mesh = Mesh.create(layer, column)
        for with_auxk in (True, False):
            key = f"{layer}x{column}/{zero}/{with_auxk}"
            output = Path(outputs) / key
            config = toy_config(output, **_settings(layer, column, zero, with_auxk))
            toy_trainer(config, mesh).fit()
            report = read_metrics(output / "metrics.jsonl")[-1]
            results[key] = torch.tensor([report.get(f"bytes_per_step/{axis}", 0.0) for axis in AXES])
    return results


def _planned(shape: Shape, with_auxk: bool) -> StepTraffic:
    data, layer, column, zero = shape
    config = toy_config(Path(), **_settings(layer, column, zero, with_auxk))
    mesh = MeshShape(data=data, layer=layer, column=column, zero=zero)  # type: ignore[arg-type]
    return traffic(Job(config=config, architecture=architecture(config), mesh=mesh, numerics=NUMERICS["float32"]))


def _assert_all_as_planned(found: dict[str, Tensor], shapes: list[Shape]) -> None:
    for shape in shapes:
        _, layer, column, zero = shape
        for with_auxk in (True, False):
            planned = _planned(shape, with_auxk)
            model, data, world = found[f"{layer}x{column}/{zero}/{with_auxk}"].tolist()
            assert model == planned.model_axis, shape
            assert data + world == planned.data_axis + planned.bookkeeping, shape
            assert (planned.auxk > 0) == (with_auxk and layer * column > 1)


def test_two_ranks_send_the_bytes_of_the_plan(
    run_ranks: Callable[..., list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    ranks = run_ranks(runs, 2, outputs=str(tmp_path), shapes=TWO_RANKS)
    _assert_all_as_planned(ranks[0], TWO_RANKS)


def test_one_rank_sends_nothing(run_ranks: Callable[..., list[dict[str, Tensor]]], tmp_path: Path) -> None:
    (found,) = run_ranks(runs, 1, outputs=str(tmp_path), shapes=[(1, 1, 1, 0)])
    assert all(not sent.any() for sent in found.values()) and len(found) == 2


@pytest.mark.slow
def test_four_ranks_send_the_bytes_of_the_plan(
    run_ranks: Callable[..., list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    ranks = run_ranks(runs, 4, outputs=str(tmp_path), shapes=FOUR_RANKS)
    _assert_all_as_planned(ranks[0], FOUR_RANKS)
