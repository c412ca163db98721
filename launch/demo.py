"""Demo on the toy model: capture, train, evaluate, attribute, check the graph and steer.

    python launch/demo.py [CONFIG] [key=value ...]

Every stage is the one users run: the same stores, `torchrun` with DeepSpeed, safetensors, TensorBoard. The results are
a page with a graph and `summary.json` with the measures of its faithfulness (docs/demo.md). The same job as `clt demo`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, field
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import DirectoryPath, Field
from pydantic.dataclasses import dataclass

from clt.attribution.features.steering import SteeringReport, SteeringSettings, steer
from clt.attribution.run import AttributeConfig, EvaluateConfig, EvaluationReport, Explanation, evaluate, explain
from clt.capture.models.adapter import ModelAdapter
from clt.capture.planning import CaptureConfig
from clt.capture.run import capture_store
from clt.capture.sources.examples import SourceSettings, ToySource, open_source
from clt.config import STRICT, config_to_yaml
from clt.errors import CLTError
from clt.launch.script import JobCommand, run_job
from clt.training.settings import AuxKSettings, DataSettings, OptimizerSettings, TrainConfig
from clt.transcoder.architecture import TranscoderSettings
from clt.transcoder.model import CrossLayerTranscoder

log = logging.getLogger(__name__)

#: Seeds of the drawn boards: training, held-out evaluation and prompts use different images.
TRAIN_SEED, HELDOUT_SEED, PROMPT_SEED = 1, 2, 3


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DemoTraining:
    """The training stage."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    clt: TranscoderSettings
    """The transcoder."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Adam and schedules."""
    auxk: AuxKSettings = AuxKSettings()
    """Auxiliary loss for dead features."""
    data: DataSettings = DataSettings()
    """Batching and shuffling."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DemoConfig:
    """Sizes of the demo."""

    model: DirectoryPath
    """Folder of the toy model."""
    output: Path = Path("runs/demo")
    """Folder of all output."""
    train_prompts: int = Field(gt=0)
    """Prompts captured for training."""
    heldout_prompts: int = Field(gt=0)
    """Prompts captured for the held-out evaluation."""
    agreement_prompts: int = Field(gt=0)
    """Prompts on which the replacement model is compared with the model."""
    training: DemoTraining
    """The training stage."""
    steering: SteeringSettings = SteeringSettings()
    """The steering experiment."""
    processes: int = Field(default=2, gt=0)
    """Processes that torchrun starts."""
    seed: int = 0
    """Seed of the weights, the read order and the choice of checked edges."""


@plain_dataclass(kw_only=True)
class _Stages:
    """Wall time of the stages done so far."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        log.info("stage=%s", name)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)
        log.info("stage=%s seconds=%.1f", name, self.seconds[name])


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs all stages; those that are complete in `config.output` are not run again.

    Args:
        config: sizes.

    Returns:
        The summary, also in `summary.json` of the output folder; docs/demo.md explains its keys.

    Raises:
        CLTError: a stage failed; the message is the stage's.
    """
    # The toy's tensors are small: a second thread mostly waits, on a busy machine many times longer.
    torch.set_num_threads(1)
    stages, out = _Stages(), config.output
    with stages.time("capture"):
        _capture(config, config.train_prompts, TRAIN_SEED, out / "store")
        _capture(config, config.heldout_prompts, HELDOUT_SEED, out / "heldout")
    with stages.time("train"):
        _train(config)
    with stages.time("evaluate"):
        report = evaluate(
            EvaluateConfig(
                model=str(config.model),
                clt=str(out / "clt"),
                store=str(out / "heldout"),
                source=_boards(config.agreement_prompts, PROMPT_SEED),
                output=out / "evaluation.json",
            )
        )
    with stages.time("attribute"):
        explanation = explain(
            AttributeConfig(
                model=str(config.model),
                clt=str(out / "clt"),
                output=out / "graph",
                source=SourceSettings(toy=ToySource(n=1, seed=PROMPT_SEED, tasks=("odd",))),
                seed=config.seed,
            )
        )
    with stages.time("steer"):
        steering = _steer(config)
    summary = _summary(config, report, explanation, steering, stages.seconds)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _boards(n: int, seed: int) -> SourceSettings:
    return SourceSettings(toy=ToySource(n=n, seed=seed))


def _capture(config: DemoConfig, n: int, seed: int, output: Path) -> None:
    job = CaptureConfig(model=str(config.model), output=str(output), source=_boards(n, seed), seed=config.seed)
    capture_store(job, progress=sys.stderr.isatty())


def _train(config: DemoConfig) -> None:
    """Runs `torchrun launch/train.py` as a user would, with one thread per process."""
    job = TrainConfig(
        store=str(config.output / "store"),
        output=config.output / "clt",
        steps=config.training.steps,
        seed=config.seed,
        clt=config.training.clt,
        optimizer=config.training.optimizer,
        auxk=config.training.auxk,
        data=config.training.data,
    )
    path = config.output / "train.yaml"
    path.write_text(config_to_yaml(job), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.processes}"]
    command = [*torchrun, "-m", "clt.launch.train", str(path)]
    result = subprocess.run(command, env={"OMP_NUM_THREADS": "1"} | os.environ, stdout=sys.stderr, check=False)
    if result.returncode:
        raise CLTError(f"training failed with exit code {result.returncode}; see the error above")


def _steer(config: DemoConfig) -> SteeringReport:
    adapter = ModelAdapter.from_pretrained(str(config.model))
    transcoder = CrossLayerTranscoder.from_pretrained(config.output / "clt")
    source = open_source(_boards(2 * config.steering.num_prompts, PROMPT_SEED))
    return steer(adapter, transcoder, (source.load(i) for i in range(len(source.texts))), config.steering)


def _summary(
    config: DemoConfig,
    report: EvaluationReport,
    explanation: Explanation,
    steering: SteeringReport,
    seconds: dict[str, float],
) -> dict[str, Any]:
    store, agreement, edges = report.store, report.agreement, explanation.edges
    assert edges is not None
    return {
        "fvu": store.mean_fvu,
        "l0": store.mean_l0,
        "dead_fraction": store.mean_dead_fraction,
        "top1_agreement": agreement.top1_agreement,
        "kl": agreement.kl,
        "fvu_logits": agreement.fvu_logits,
        "text_top1_agreement": agreement.text_top1_agreement,
        "text_kl": agreement.text_kl,
        "replacement_score": explanation.scores.replacement,
        "completeness_score": explanation.scores.completeness,
        "edge_max_rel_error": edges.max_rel_error,
        "edges": {item.kind.name.lower(): asdict(item) for item in edges.by_kind},
        "steering": asdict(steering),
        "seconds": seconds | {"total": round(sum(seconds.values()), 2)},
        "layers": {"fvu": store.fvu, "l0": store.l0, "dead_fraction": store.dead_fraction},
        "heldout_tokens": store.num_tokens,
        "agreement_prompts": agreement.num_prompts,
        "page": str(explanation.page),
        "config": json.loads(json.dumps(asdict(config), default=str)),
    }


def describe(summary: dict[str, Any]) -> str:
    """The summary as a table.

    Args:
        summary: from `demo`.

    Returns:
        Lines of text.
    """
    rows = [
        ("fvu", "{:.4f}", "fraction of variance unexplained of the MLP outputs, held-out tokens, mean over layers"),
        ("l0", "{:.1f}", "active features per token and layer"),
        ("dead_fraction", "{:.3f}", "fraction of features never active on the held-out tokens"),
        ("top1_agreement", "{:.4f}", "fraction of answers unchanged when every MLP is replaced, without error terms"),
        ("kl", "{:.1e}", "KL(model || replacement model) at the answers, nats"),
        (
            "replacement_score",
            "{:.3f}",
            "influence-weighted fraction of paths that lead back to tokens and patches, not error nodes",
        ),
        (
            "completeness_score",
            "{:.3f}",
            "influence-weighted fraction of each node's input that does not come from error nodes",
        ),
        ("edge_max_rel_error", "{:.1e}", "largest relative difference between an edge and its measured intervention"),
    ]
    lines = [f"{key:20} {form.format(summary[key]):>9}   {meaning}" for key, form, meaning in rows]
    lines.append(
        "steering: share of answers that change when the top-n features are ablated [95 % CI]; control: n features"
    )
    lines.append(
        "of the same layers with similar output norm; in the model (original) or the replacement model (replaced)"
    )
    for result in summary["steering"]["results"]:
        shares = [f"{s['rate']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in (result["ablated"], result["control"])]
        name = f"  n={result['n']}, {result['mlps']}"
        lines.append(f"{name:20} {shares[0]:>18}   control {shares[1]}")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    return "\n".join([*lines, f"{'seconds':20} {seconds}", "", f"Open {summary['page']} in a browser."])


COMMAND = JobCommand(
    name="clt demo",
    summary="Captures, trains, evaluates, attributes and steers on the toy model; prints the measures.",
    settings=DemoConfig,
    run=lambda config: describe(demo(config)),
    default_config=Path(__file__).resolve().parents[1] / "configs" / "demo" / "toy.yaml",
)

main = partial(run_job, COMMAND)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
