"""A small demo through the `clt` command, from capture to checked graph, then every kind of bad input.

The demo runs once, in its own process with torchrun; the other commands work on its output.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from clt.attribution.graphs.graph import Graph
from clt.launch.commands.main import app
from clt.launch.demo import describe
from clt.training.metrics import METRICS_FILE

ROOT = Path(__file__).resolve().parent.parent.parent
TOY = ROOT / "examples" / "toy_vlm" / "checkpoints" / "base"
SMALL = [
    "train_prompts=60",
    "heldout_prompts=20",
    "agreement_prompts=20",
    "steering.num_prompts=3",
    "training.steps=6",
    "training.clt.n_features=96",
    "training.clt.k=8",
    "training.data.batch_tokens=256",
]


@pytest.fixture(scope="module")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a small demo."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "clt.launch.commands.main", "demo", "--out", str(out), *SMALL]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "Open " in result.stdout
    return out


@pytest.fixture(scope="module")
def summary(demo_output: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((demo_output / "summary.json").read_text())
    return loaded


def _command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def _refused(result: Result, *parts: str) -> None:
    """One line on standard error that names the parts, exit code 2."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def _attribute(demo_output: Path, out: Path, *overrides: str) -> Result:
    words = ["--clt", str(demo_output / "clt"), "--model", str(TOY), f"output={out}", *overrides]
    return _command("attribute", ROOT / "configs" / "attribute" / "toy.yaml", *words)


def test_summary_has_every_number_the_project_defines(summary: dict[str, Any]) -> None:
    for key in ("fvu", "l0", "dead_fraction", "top1_agreement", "kl", "replacement_score", "completeness_score"):
        assert isinstance(summary[key], float)
    assert set(summary["seconds"]) == {"capture", "train", "evaluate", "attribute", "steer", "total"}
    assert {(r["mlps"], r["n"]) for r in summary["steering"]["results"]} >= {("original", n) for n in (1, 5, 10, 20)}


def test_edges_of_an_untrained_transcoder_are_exact_too(summary: dict[str, Any]) -> None:
    # Exactness is arithmetic and does not depend on training; 1e-5 is the project's bound for float32.
    assert summary["edge_max_rel_error"] <= 1e-5
    assert set(summary["edges"]) == {"feature", "error", "text", "image", "bias"}
    assert all(kind["n_edges"] >= 40 for kind in summary["edges"].values())


def test_described_summary_names_every_headline_number(summary: dict[str, Any]) -> None:
    text = describe(summary)
    for key in ("fvu", "kl", "edge_max_rel_error", "steering", "[95 % CI]", "control", "seconds", summary["page"]):
        assert key in text


def test_demo_leaves_files_that_open(demo_output: Path) -> None:
    graph = Graph.load(demo_output / "graph" / "graph.safetensors")
    assert len(graph.nodes.ids()) == graph.edges.shape[1]
    assert (demo_output / "graph" / "index.html").stat().st_size > 10_000
    assert list((demo_output / "clt" / "tensorboard").glob("events.*"))
    assert (demo_output / "clt" / METRICS_FILE).is_file()


def test_attribute_explains_another_example_and_one_given_as_files(demo_output: Path, tmp_path: Path) -> None:
    first = _attribute(demo_output, tmp_path / "a", "index=2", "checked_edges=0")
    assert first.exit_code == 0, first.output
    from clt.capture.sources.toy import toy_examples

    example = toy_examples(1, seed=9)[0]
    example.images[0].save(tmp_path / "board.png")
    # Without a file; the prompt, with its colons and brackets, and the list of images as they are.
    job = ["--clt", demo_output / "clt", "--model", TOY, "--output", tmp_path / "b", "--checked-edges", "0"]
    given = _command("attribute", *job, f"prompt={example.prompt}", "--images", tmp_path / "board.png")
    assert given.exit_code == 0, given.output
    assert (tmp_path / "b" / "index.html").is_file()


def test_evaluate_repeats_the_demo_numbers(demo_output: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    pairs = [
        f"clt={demo_output / 'clt'}",
        f"model={TOY}",
        f"store={demo_output / 'heldout'}",
        f"output={tmp_path / 'report.json'}",
        "source.toy.n=20",
        "source.toy.seed=3",
    ]
    result = _command("evaluate", ROOT / "configs" / "evaluate" / "toy.yaml", *pairs)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["agreement"]["kl"] == pytest.approx(summary["kl"])
    assert report["store"]["fvu"] == summary["layers"]["fvu"]


@pytest.mark.parametrize("command", ["capture", "train", "evaluate", "attribute", "demo"])
def test_dry_run_prints_the_resolved_configuration_and_writes_nothing(command: str, tmp_path: Path) -> None:
    config = ROOT / "configs" / command / "toy.yaml"
    out = tmp_path / "never"
    words = [f"output={out}", "--dry-run"]
    if command != "train":
        words += [f"model={TOY}"]
    result = _command(command, config, *words)
    assert result.exit_code == 0, result.output
    assert f"output: {out}" in result.stdout and not out.exists()


def test_config_typo_is_named(tmp_path: Path) -> None:
    config = ROOT / "configs" / "train" / "toy.yaml"
    _refused(_command("train", config, "clt.n_feature=3"), "clt.n_feature'; did you mean 'clt.n_features'?")


def test_missing_store_is_named(tmp_path: Path) -> None:
    config = ROOT / "configs" / "train" / "toy.yaml"
    result = _command(
        "train", "--config", config, "--set", f"store={tmp_path / 'none'}", "--set", f"output={tmp_path}/o"
    )
    _refused(result, str(tmp_path / "none"))
    assert not (tmp_path / "o").exists()


def test_truncated_store_is_named(demo_output: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_output / "store", tmp_path / "store")
    largest = max((tmp_path / "store").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    os.truncate(largest, largest.stat().st_size // 2)
    config = ROOT / "configs" / "train" / "toy.yaml"
    result = _command(
        "train", "--config", config, "--set", f"store={tmp_path / 'store'}", "--set", f"output={tmp_path / 'o'}"
    )
    _refused(result, largest.name)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["capture", "attribute"])
def test_missing_model_is_named(command: str, demo_output: Path, tmp_path: Path) -> None:
    pairs = [f"model={tmp_path / 'no-model'}", f"output={tmp_path / 'o'}"]
    if command == "attribute":
        pairs.append(f"clt={demo_output / 'clt'}")
    _refused(_command(command, ROOT / "configs" / command / "toy.yaml", *pairs), "no-model")
    assert not (tmp_path / "o").exists()


def test_image_that_cannot_be_decoded_is_named(demo_output: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    result = _attribute(
        demo_output,
        tmp_path / "o",
        "source=null",
        "prompt=USER: <image> ASSISTANT:",
        f"images=[{tmp_path / 'broken.png'}]",
    )
    _refused(result, "broken.png")
    assert not (tmp_path / "o").exists()


def test_checkpoint_of_another_model_is_refused(demo_output: Path, tmp_path: Path) -> None:
    other = _with_weights(tmp_path / "other", lambda tensor: tensor * 1.01)
    result = _attribute(demo_output, tmp_path / "o", f"model={other}")
    _refused(result, "other", "checkpoints/base")
    assert not (tmp_path / "o").exists()


def test_nan_activation_leaves_no_committed_unit(tmp_path: Path) -> None:
    broken = _with_weights(tmp_path / "broken", lambda tensor: torch.full_like(tensor, float("nan")))
    config = ROOT / "configs" / "capture" / "toy.yaml"
    pairs = [f"model={broken}", f"output={tmp_path / 'store'}", "source.toy.n=8"]
    _refused(_command("capture", config, *pairs), "not finite", "unit 0")
    assert not list((tmp_path / "store").rglob("commits/*.json"))


def _with_weights(folder: Path, change: Any) -> Path:
    """A copy of the toy model with one matrix changed."""
    shutil.copytree(TOY, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
