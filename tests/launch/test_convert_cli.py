"""`clt convert`: from folder to folder, with tokens of a store, and one-line errors for invalid input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from clt.convert.circuit_tracer import load_circuit_tracer
from clt.convert.vlm_clt_training import load_vlm_clt_training
from clt.launch.commands.main import app
from clt.transcoder.architecture import CLTConfig, SparsitySettings
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

from ..capture.stores import make_store

LENGTHS = (20, 30, 10)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def refused(result: Result, *parts: str) -> None:
    """One line on standard error that names the parts, exit code 2."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


def save(folder: Path, d_model: int = 4, **changes: object) -> CrossLayerTranscoder:
    config = CLTConfig(n_layers=2, d_model=d_model, n_features=6, k=2, **changes)  # type: ignore[arg-type]
    transcoder = CrossLayerTranscoder(config, Scaling.identity(2, d_model)).requires_grad_(False)
    for parameter in transcoder.parameters():
        parameter.normal_()
    transcoder.save_pretrained(folder)
    return transcoder


def test_topk_becomes_thresholds_on_the_tokens_of_a_store(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS)
    save(tmp_path / "clt")
    words: list[str | Path] = [tmp_path / "clt", tmp_path / "out", "--to", "circuit_tracer"]
    refused(run(*words), "sparsity.kind=topk", "--calibrate")
    assert not (tmp_path / "out").exists()
    result = run(*words, "--calibrate", tmp_path / "store", "--tokens", "40")
    assert result.exit_code == 0 and result.stdout.strip() == str(tmp_path / "out"), result.output
    loaded = load_circuit_tracer(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["after"]["num_tokens"] == 40 and report["after"]["l0"] == report["before"]["l0"]
    x = torch.stack([store.read_unit(0, [f"lm.{layer}.resid_mid"])[0] for layer in range(2)]).float()
    assert loaded.config.sparsity.kind == "jumprelu" and bool(loaded(x).isfinite().all())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clt", "out", "store"]


def test_files_of_vlm_clt_training_are_written_and_read_back(tmp_path: Path) -> None:
    make_store(tmp_path / "store", LENGTHS)
    transcoder = save(tmp_path / "clt", first_offset=1, layer_norm=True)
    words: list[str | Path] = [tmp_path / "clt", tmp_path / "out", "--to", "vlm_clt_training"]
    refused(run(*words), "--calibrate")
    assert run(*words, "--calibrate", tmp_path / "store").exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "transcoder_L0.pt",
        "mapping_L0.pt",
        "metrics_L0.json",
    }
    result = run(
        tmp_path / "out", tmp_path / "back", "--from", "kokosdev", "--combine", "mean", "--read-site", "resid_mid"
    )
    assert result.exit_code == 0, result.output
    back, x = CrossLayerTranscoder.from_pretrained(tmp_path / "back"), torch.randn(2, 5, 4)
    torch.testing.assert_close(back(x), transcoder(x))
    assert (back.config.independent, back.config.read_site, back.config.k) == ("mean", "resid_mid", 2)
    torch.testing.assert_close(load_vlm_clt_training(tmp_path / "out")(x), transcoder(x))


@pytest.mark.parametrize("target", ["native", "sparsify"])
def test_topk_is_written_unchanged(target: str, tmp_path: Path) -> None:
    transcoder, x = save(tmp_path / "clt"), torch.randn(2, 5, 4)
    assert run(tmp_path / "clt", tmp_path / "out", "--to", target).exit_code == 0
    assert run(tmp_path / "out", tmp_path / "back", "--from", target).exit_code == 0
    torch.testing.assert_close(CrossLayerTranscoder.from_pretrained(tmp_path / "back")(x), transcoder(x))


def test_user_errors_are_one_line(tmp_path: Path) -> None:
    make_store(tmp_path / "store", LENGTHS)
    save(tmp_path / "clt")
    out = tmp_path / "out"
    refused(run(tmp_path / "nowhere", out), "nowhere")
    refused(run(tmp_path / "clt", out, "--k", "3"), "k=3", "native")
    refused(run(tmp_path / "clt", out, "--to", "sparsify", "--calibrate", tmp_path / "store"), "--calibrate")
    refused(run(tmp_path / "clt", tmp_path / "clt"), "exists already")
    save(tmp_path / "wide", d_model=5)
    refused(run(tmp_path / "wide", out, "--calibrate", tmp_path / "store"), "width 4", "width 5")
    save(tmp_path / "jump", sparsity=SparsitySettings(kind="jumprelu"))
    refused(run(tmp_path / "jump", out, "--calibrate", tmp_path / "store"), "threshold per feature already")
    assert run(tmp_path / "clt", out, "--to", "other").exit_code == 2
    assert not out.exists() and not list(tmp_path.glob(".*"))
