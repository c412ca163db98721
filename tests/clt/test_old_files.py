"""Files written before the modules moved into sub-packages (tests/fixtures/before_the_move) still open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clt.attribution.graphs.graph import Graph
from clt.capture.reading.open_store import open_store
from clt.distributed.mesh import Mesh
from clt.training.deepspeed_engine import joined_job
from clt.transcoder.model import CrossLayerTranscoder

from ..distributed.toy_job import toy_config, toy_trainer

FOLDER = Path(__file__).parents[1] / "fixtures" / "before_the_move"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
SITES = ("lm.0.resid_mid", "lm.1.resid_mid", "lm.0.mlp_out", "lm.1.mlp_out")


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with joined_job():
        yield Mesh.create(1)


def _sums(folder: Path, averaged: bool) -> dict[str, float]:
    transcoder = CrossLayerTranscoder.from_pretrained(folder, averaged=averaged)
    return {name: float(weight.double().abs().sum()) for name, weight in transcoder.named_parameters()}


@pytest.mark.parametrize("lazy", [False, True])
def test_transcoder_opens(lazy: bool) -> None:
    transcoder = CrossLayerTranscoder.from_pretrained(FOLDER / "transcoder", lazy=lazy)
    x_LBD = torch.sin(torch.arange(3 * 5 * 8)).reshape(3, 5, 8)
    assert transcoder(x_LBD).sum(dim=(1, 2)).tolist() == pytest.approx(EXPECTED["transcoder"], rel=1e-4)


def test_training_resumes(mesh: Mesh, tmp_path: Path) -> None:
    output = tmp_path / "training"
    shutil.copytree(FOLDER / "training", output)
    assert CrossLayerTranscoder.from_pretrained(output).provenance.training.steps == 3
    changes = {
        "clt": {"n_features": 16, "k": 2},
        "steps": 4,
        "checkpoint_every": 3,
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "ema_decay": 0.5},
    }
    assert toy_trainer(toy_config(output, **changes), mesh).fit() == output / "step_00000004"
    assert _sums(output, averaged=False) == pytest.approx(EXPECTED["trained"], rel=1e-4)
    assert _sums(output, averaged=True) == pytest.approx(EXPECTED["averaged"], rel=1e-4)


def test_store_opens() -> None:
    store = open_store(FOLDER / "store")
    assert store.num_tokens == EXPECTED["store"]["tokens"]
    rows_BSD = store.read_unit(1, SITES).double()
    assert rows_BSD.sum(dim=(1, 2))[:4].tolist() == pytest.approx(EXPECTED["store"]["unit_1"], rel=1e-6)
    assert store.stats(SITES).mean.sum(dim=1).tolist() == pytest.approx(EXPECTED["store"]["mean"], rel=1e-6)


def test_graph_opens() -> None:
    graph = Graph.load(FOLDER / "graph.safetensors")
    assert float(graph.edges.double().sum()) == pytest.approx(EXPECTED["graph"]["edges"], rel=1e-6)
    assert float(graph.nodes.activation.double().sum()) == pytest.approx(EXPECTED["graph"]["activation"], rel=1e-6)
    assert [target.label for target in graph.targets] == ["red", "blue"]
