"""Training on the toy model with all evaluations: the numbers equal those of the checkpoint, on one rank and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from clt.attribution.evaluation.agreement import evaluate_replacement
from clt.attribution.graphs.attribute import AttributionSettings, attribute
from clt.attribution.graphs.scores import score
from clt.capture.models.adapter import ModelAdapter
from clt.capture.planning import CaptureConfig
from clt.capture.reading.loader import iterate_store
from clt.capture.reading.open_store import open_store
from clt.capture.reading.token_filter import TokenFilter
from clt.capture.run import capture_store
from clt.capture.sources.examples import SourceSettings, ToySource, open_source
from clt.checkpoint.weights import read_tensors
from clt.config import config_to_yaml, load_config
from clt.evaluation.evaluator import evaluate_store
from clt.launch.train import main, train
from clt.training.metrics import read_metrics
from clt.training.settings import TrainConfig
from clt.transcoder.model import CrossLayerTranscoder

ROOT = Path(__file__).parents[2]
TOY = ROOT / "examples" / "toy_vlm" / "checkpoints" / "base"
TOKENS = 300


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration file of four steps with all evaluations, beside its two stores."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name, n, seed in (("store", 20, 1), ("heldout", 8, 2)):
        source = SourceSettings(toy=ToySource(n=n, seed=seed))
        config = CaptureConfig(model=str(TOY), output=str(folder / name), source=source)
        (folder / f"{name}.yaml").write_text(config_to_yaml(config))
        capture_store(config)
    tree = {
        "store": str(folder / "store"),
        "output": str(folder / "out"),
        "steps": 4,
        "clt": {"n_features": 64, "k": 4},
        "optimizer": {"learning_rate": 0.01},
        "data": {"batch_tokens": 128, "window_tokens": 1024},
        "evaluation": {
            "every": 3,
            "store": str(folder / "heldout"),
            "tokens": TOKENS,
            "batch_tokens": 64,
            "replacement": {
                "capture": str(folder / "heldout.yaml"),
                "prompts": 5,
                "batch_size": 2,
                "layer_ranges": 2,
                "graphs": 1,
                "graph_features": 10,
            },
        },
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def trained(job: Path) -> Path:
    """Output of the job on one process."""
    return train(load_config(TrainConfig, job), progress_bar=False)


def _last_reports(output: Path) -> dict[str, float]:
    reports = [report for report in read_metrics(output / "metrics.jsonl") if "heldout/tokens" in report]
    assert [report["step"] for report in reports] == [3, 4]
    return reports[-1]


def _check_against_checkpoint(found: dict[str, float], checkpoint: Path, job: Path, toy_adapter: ModelAdapter) -> None:
    transcoder = CrossLayerTranscoder.from_pretrained(checkpoint)
    sites = [[f"lm.{layer}.{site}" for layer in range(transcoder.config.n_layers)] for site in ("resid_mid", "mlp_out")]
    store = open_store(str(job.parent / "heldout"))
    batches = iterate_store(store, *sites, 64, TokenFilter(drop_bos=True), max_tokens=TOKENS)
    held_out = evaluate_store(transcoder, batches).evaluation().scalars
    assert held_out["heldout/tokens"] == TOKENS and held_out["heldout/image/tokens"] > 100
    examples = [open_source(SourceSettings(toy=ToySource(n=8, seed=2))).load(index) for index in range(5)]
    inputs = [toy_adapter.prepare(e.prompt, e.images, e.answer) for e in examples]
    agreement = evaluate_replacement(toy_adapter, transcoder, inputs, batch_size=2)
    question = toy_adapter.prepare(examples[0].prompt, examples[0].images)
    scores = score(attribute(toy_adapter, transcoder, question, AttributionSettings(max_feature_nodes=10)))
    expected = dict(held_out) | {
        "replacement/prompts": 5,
        "replacement/top1_agreement": agreement.top1_agreement,
        "replacement/kl": agreement.kl,
        "replacement/ce_gap": agreement.ce_gap,
        "replacement/text_kl": agreement.text_kl,
        "replacement/completeness_score": scores.completeness,
        "replacement/replacement_score": scores.replacement,
    }
    for tag, value in expected.items():
        # The same tokens in the same batches; only the order of float64 sums differs.
        assert found[tag] == pytest.approx(value, rel=1e-5), tag
    parts = ("only_layers_00_01", "only_layers_02_03", "only_text", "only_image")
    assert all(found[f"replacement/{part}/kl"] >= 0 for part in parts)


def test_one_process_reports_the_measures_of_its_checkpoint(
    trained: Path, job: Path, toy_adapter: ModelAdapter
) -> None:
    _check_against_checkpoint(_last_reports(trained.parent), trained, job, toy_adapter)


def test_two_layer_ranks_report_the_measures_of_their_checkpoint(
    job: Path, tmp_path: Path, toy_adapter: ModelAdapter
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [str(ROOT / "launch" / "train.py"), str(job), "mesh.layer=2", f"output={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    _check_against_checkpoint(_last_reports(tmp_path), tmp_path / "step_00000004", job, toy_adapter)


def test_training_without_evaluation_ends_with_the_same_bits(trained: Path, job: Path, tmp_path: Path) -> None:
    plain = train(replace(load_config(TrainConfig, job), output=tmp_path, evaluation=None), progress_bar=False)
    for path in sorted(plain.glob("*.safetensors")):
        expected, found = read_tensors(path), read_tensors(trained / path.name)
        assert all(torch.equal(expected[key], found[key]) for key in expected), path.name
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_evaluation_may_change_when_a_job_is_resumed(trained: Path, job: Path) -> None:
    assert train(replace(load_config(TrainConfig, job), evaluation=None), progress_bar=False) == trained


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation.store={folder}/store"], ["evaluation.store", "is the store that the job trains on"]),
        (["evaluation.store={folder}/nowhere"], ["nowhere"]),
        (["evaluation.replacement.model={folder}/store"], ["/store"]),
        (["evaluation.replacement.capture={folder}/none.yaml"], ["none.yaml: no such"]),
        (["evaluation.replacement.capture={folder}/unanswered.yaml"], ["example 1 has no answer"]),
        (["evaluation.store=null", "evaluation.replacement=null"], ["give store or replacement"]),
        (["data.modalities=[image]", "evaluation.tokens=0"], ["evaluation.tokens"]),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_training(
    overrides: list[str], words: list[str], job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job.parent
    (folder / "prompts.jsonl").write_text('{"prompt": "which?"}\n')
    source = {"jsonl": {"file": str(folder / "prompts.jsonl")}}
    (folder / "unanswered.yaml").write_text(
        yaml.safe_dump({"model": str(TOY), "output": str(tmp_path / "x"), "source": source})
    )
    output = tmp_path / "out"
    arguments = [override.replace("{folder}", str(folder)) for override in overrides]
    assert main([str(job), f"output={output}", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
    assert not output.exists()
