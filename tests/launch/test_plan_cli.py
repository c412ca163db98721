"""`clt plan`: its report, the sources of its numbers (store, options, runs), and one-line errors for invalid input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from clt.config import load_config
from clt.launch.commands.main import app
from clt.training.settings import TrainConfig

from ..capture.stores import make_store

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = ROOT / "configs" / "train"

#: Training configurations of real models: layers, width and parameters in their first lines, in G.
MODELS = {
    "llava_7b": (32, 4096, 14.23),
    "qwen2_vl_7b": (28, 3584, 10.45),
    "gpt2": (12, 768, 1.13),
    "llama_3_2_1b": (16, 2048, 10.20),
    "qwen3_8b_largest": (36, 4096, 94.2),
}


def clt_command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def planned(*words: str | Path) -> str:
    result = clt_command(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(
        f"store: {tmp_path / 'store'}\noutput: {tmp_path / 'out'}\nsteps: 10\nclt: {{n_features: 64, k: 4}}\n"
    )
    return path


@pytest.mark.parametrize("name", MODELS)
def test_configurations_of_real_models_fit_where_they_say(name: str, tmp_path: Path) -> None:
    layers, width, parameters = MODELS[name]
    path, report = TRAIN / f"{name}.yaml", tmp_path / "report.json"
    (command,) = re.findall(r"^#   clt plan (.*)$", path.read_text(), re.MULTILINE)
    assert command.split()[0] == str(path.relative_to(ROOT)) and f"layers={layers},width={width}" in command
    text = planned(path, *command.split()[1:], "--set", f"output={tmp_path}", "--json", report)
    tree = json.loads(report.read_text())
    assert tree["fits"] and "it fits" in text
    assert tree["parameters_total"] / 1e9 == pytest.approx(parameters, rel=5e-3)
    assert f"{parameters:.1f}" in path.read_text()
    # The mesh of the file is one of the best for so many GPUs.
    assert tree["tokens_per_second"] >= 0.95 * tree["meshes"][0]["tokens_per_second"]


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_sizes_in_comments_are_weights_and_two_moments(name: str) -> None:
    parameters, text = MODELS[name][2], (TRAIN / f"{name}.yaml").read_text()
    ((size, unit),) = re.findall(r"^checkpoint_every: .*# ([\d.]+) (GB|TB) each", text, re.MULTILINE)
    assert float(size) * (1000 if unit == "TB" else 1) == pytest.approx(parameters * 12, rel=0.03)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"qwen3_8b_largest"}))
def test_learning_rate_follows_the_rule_its_comment_names(name: str) -> None:
    config = load_config(TrainConfig, TRAIN / f"{name}.yaml")
    assert config.optimizer.learning_rate == pytest.approx(2e-4 / (config.clt.n_features / 2**14) ** 0.5, rel=0.02)


def test_plan_prints_every_part(job: Path) -> None:
    text = planned(job, "--model", "layers=4,width=32", "--gpus", "4", "mesh.layer=2", "--clt.skip", "true")
    for words in (
        "4 layers of 32; 64 features each, topk k=4, all targets from its own layer on",
        "data 2 x layer 2 x column 1 = 4 x h200, ZeRO-1",
        "skip",
        "memory of a rank",
        "it fits",
        "received by a rank in a step",
        "arithmetic of a step",
        "projected step",
        "nothing measured",
        "meshes of 4 that fit",
        "row-bf16-int8",
    ):
        assert words in text, text
    assert "measured  " not in text


def test_a_job_that_does_not_fit() -> None:
    text = planned(TRAIN / "llava_7b.yaml", "--model", "layers=32,width=4096", "mesh.layer=1")
    assert re.search(r"IT DOES NOT FIT: \d\.\d\d times the usable memory", text)
    assert "fits on no mesh of 1 h200" in text


def test_dimensions_come_from_the_store(job: Path, tmp_path: Path) -> None:
    model = make_store(tmp_path / "store", (20, 30)).model
    assert f"{model.n_layers} layers of {model.d_model};" in planned(job)


def test_measured_speed_and_traffic_stand_beside_the_plan(job: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text(
        '{"step": 10, "tokens_per_second": 1234, "bytes_per_step/model": 4000, "bytes_per_step/world": 32}\n'
    )
    text = planned(job, "--model", "layers=4,width=32", "--gpu", "cpu")
    assert re.search(r"measured +1\.23 k tokens/s, 0\.\d\d of the projection", text)
    assert re.search(r"sent by a rank +4\.032 kB per step, 0 B by the plan", text)


def test_tokens_and_numerics_are_options(job: Path, tmp_path: Path) -> None:
    options = ("--model", "width=32,layers=4", "--set", "mesh.zero_stage=0", "--json", tmp_path / "r.json")
    planned(job, *options, "--tokens", "1e6", "--numerics", "row-bf16")
    tree = json.loads((tmp_path / "r.json").read_text())
    assert tree["numerics"].startswith("row_adam, bfloat16")
    assert tree["tokens"] == 1e6 and tree["traffic"]["gradients"] == 0
    assert tree["store_bytes"] == 1e6 * 2 * 4 * 32 * 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("no activation store here", "--model layers=32,width=4096")),
        (("--model", "32,4096"), ("--model 32,4096", "layers=32,width=4096")),
        (("--model", "layers=0,width=8"), ("--model layers=0,width=8",)),
        (("--model", "layers=4,width=8", "--gpu", "abacus"), ("--gpu abacus", "h200")),
        (("--model", "layers=4,width=8", "--numerics", "int4"), ("--numerics int4", "float32")),
        (("--model", "layers=4,width=8", "--gpus", "3", "--set", "mesh.layer=2"), ("mesh.layer=2", "3 processes")),
        (("--model", "layers=4,width=8", "--set", "mesh.layer=5"), ("mesh.layer=5",)),
        (("--model", "layers=4,width=9", "--set", "mesh.column=2"), ("mesh.column=2",)),
        (("--model", "layers=4,width=8", "--gpus", "3"), ("data.batch_tokens=1024",)),
        (("--model", "layers=4,width=8", "--set", "clt.kk=1"), ("clt.kk",)),
    ],
)
def test_user_errors_are_one_line(job: Path, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    result = clt_command(job, *words)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and result.stderr.strip() == lines[0], result.stderr
    for part in parts:
        assert part in lines[0]


def test_a_job_needs_no_file() -> None:
    text = planned(
        "--model",
        "layers=4,width=32",
        "--gpus=2",
        "store=s",
        "output=o",
        "--steps",
        "3",
        "clt.n_features=64",
        "clt.k=2",
    )
    assert "4 layers of 32; 64 features each, topk k=2" in text and "= 2 x h200" in text


def test_a_streaming_job_needs_the_size_of_its_model() -> None:
    result = clt_command(TRAIN / "toy_streaming.yaml")
    assert result.exit_code == 2 and "streams" in result.stderr
    assert "4 layers of 128" in planned(TRAIN / "toy_streaming.yaml", "--model", "layers=4,width=128")
