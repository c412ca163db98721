"""Metrics of training: averages over the steps since the last report, for TensorBoard and `metrics.jsonl`.

`fvu` of a target is its squared error over the store's variance, averaged over the tokens of the window with the
weights of `data.token_weights`: the loss itself, unlike the unweighted held-out measure of `clt.evaluation.evaluator`.
`l0` counts active features per token and source layer. `dead_fraction` is the share of features that have not fired in
the last `auxk.dead_after_tokens` tokens. The only module that imports tensorboard.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.checkpoint.training_output import METRICS_FILE, read_metrics
from clt.distributed.mesh import Mesh
from clt.evaluation.evaluator import Evaluation
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare, source_layers, target_layers

TENSORBOARD_FOLDER = "tensorboard"
#: Prefix of the TensorBoard tags of training, beside `heldout/` and `replacement/` of evaluations.
TRAIN_TAG = "train"
#: Name of the bytes that the reporting rank sends, one tag for each axis of the mesh on which it sends any.
BYTES_PER_STEP = "bytes_per_step"


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Metrics of one step for this rank's layers and tokens; detached.

    Attributes:
        error_M: [M_own] squared error per target over the store's variance.
        auxk: scalar, this rank's share of the auxiliary error before its coefficient.
        revival: scalar, this rank's share of the revival term before its weight.
        penalty: scalar, this rank's share of the sparsity penalty before its weight; 0 for rules without one.
        l0_L: [L_own] active features per token of every source.
        fired_LF: [L_own,F] bool, features active in any token.
    """

    error_M: Tensor
    auxk: Tensor
    revival: Tensor
    penalty: Tensor
    l0_L: Tensor
    fired_LF: Tensor

    @classmethod
    def mean(cls, parts: Sequence[Observations]) -> Observations:
        """Metrics of a step taken in micro-batches of equally many tokens."""
        if len(parts) == 1:
            return parts[0]
        means = {
            name: torch.stack([getattr(part, name) for part in parts]).mean(dim=0)
            for name in ("error_M", "auxk", "revival", "penalty", "l0_L")
        }
        return cls(**means, fired_LF=torch.stack([part.fired_LF for part in parts]).any(dim=0))


@dataclass(frozen=True, kw_only=True)
class WindowAverages:
    """Averages over the steps taken since the last report; without steps, all but the dead fraction are NaN.

    Attributes:
        loss: mean over targets of fvu, plus the weighted terms of dead features and of the penalty.
        auxk: auxiliary error before its coefficient.
        revival: revival term before its weight.
        penalty: sparsity penalty before its weight.
        fvu: by target layer.
        l0: by source layer.
        dead_fraction: by source layer, at the end of the window.
        tokens_per_second: over all ranks, skipped steps included.
        bytes_per_step: sent by this rank per step, by axis of the mesh, skipped steps included.
    """

    loss: float
    auxk: float
    revival: float
    penalty: float
    fvu: Mapping[int, float]
    l0: Mapping[int, float]
    dead_fraction: Mapping[int, float]
    tokens_per_second: float
    bytes_per_step: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingMetrics:
    """One report.

    Attributes:
        step: steps done.
        tokens: tokens seen.
        averages: over the window that ends here.
        learning_rate: of the last step.
        k: of the last step.
        gradient_norm: of the last step, before clipping; infinite when it was skipped.
        skipped_steps: steps not taken so far, because loss or gradients were not finite.
    """

    step: int
    tokens: int
    averages: WindowAverages
    learning_rate: float
    k: int
    gradient_norm: float
    skipped_steps: int

    def scalars(self) -> dict[str, float]:
        """Every finite number by name: its key in `metrics.jsonl`, and its TensorBoard tag after `train/`."""
        seen = self.averages
        tags: dict[str, float] = {
            "tokens": self.tokens,
            "loss": seen.loss,
            "auxk": seen.auxk,
            "revival": seen.revival,
            "penalty": seen.penalty,
            "learning_rate": self.learning_rate,
            "k": self.k,
            "gradient_norm": self.gradient_norm,
            "tokens_per_second": seen.tokens_per_second,
            "skipped_steps": self.skipped_steps,
        }
        for name, layers in (("fvu", seen.fvu), ("l0", seen.l0), ("dead_fraction", seen.dead_fraction)):
            tags[f"{name}/mean"] = sum(layers.values()) / len(layers)
            tags |= {f"{name}/layer_{layer:02d}": value for layer, value in layers.items()}
        tags |= {f"{BYTES_PER_STEP}/{axis}": value for axis, value in seen.bytes_per_step.items()}
        return {tag: value for tag, value in tags.items() if math.isfinite(value)}


class MetricsWindow:
    """Sums over the steps since the last report, on the device, without a host sync.

    Args:
        config: architecture.
        share: layers of this rank.
        device: device of the observations.
    """

    def __init__(self, config: CLTConfig, share: LayerShare, device: torch.device) -> None:
        self._all_targets, self._all_sources = target_layers(config), source_layers(config)
        self._targets, self._sources = list(share.targets), list(share.sources)
        self._sums = torch.zeros(6, config.n_layers, dtype=torch.float64, device=device)
        self._traffic: list[Counter[str]] = []
        self._loss, self._steps, self._tokens, self._start = 0.0, 0, 0, time.perf_counter()

    def add(self, seen: Observations, loss: float) -> None:
        """Counts a step that was taken; `loss` is that of all ranks."""
        self._sums[0, self._targets] += seen.error_M
        self._sums[1, self._sources] += seen.l0_L
        self._sums[2, 0] += seen.auxk
        self._sums[3, 0] += seen.revival
        self._sums[4, 0] += seen.penalty
        self._loss += loss
        self._steps += 1

    def leave_out(self, seconds: float) -> None:
        """Leaves out time without training from `tokens_per_second`."""
        self._start += seconds

    def add_tokens(self, tokens: int) -> None:
        """Counts the tokens of a step, taken or not."""
        self._tokens += tokens

    def add_traffic(self, sent: Counter[str]) -> None:
        """Counts what this rank sent in a step, taken or not, by axis."""
        self._traffic.append(sent)

    def close(self, dead_L: Tensor, mesh: Mesh) -> WindowAverages:
        """Averages over the window and all ranks, which must all call it; starts a new window.

        Args:
            dead_L: [L_own] share of dead features of every source of this rank.
            mesh: the processes.
        """
        means = self._sums / max(1, self._steps)
        means[5, self._sources] = dead_L.to(means)
        fvu, l0, auxk, revival, penalty, dead = mesh.all_reduce(means / mesh.data_size, "world").tolist()
        unknown = 0.0 if self._steps else math.nan
        averages = WindowAverages(
            loss=self._loss / max(1, self._steps) + unknown,
            auxk=auxk[0] + unknown,
            revival=revival[0] + unknown,
            penalty=penalty[0] + unknown,
            fvu={layer: fvu[layer] + unknown for layer in self._all_targets},
            l0={layer: l0[layer] + unknown for layer in self._all_sources},
            dead_fraction={layer: dead[layer] for layer in self._all_sources},
            tokens_per_second=self._tokens / (time.perf_counter() - self._start),
            bytes_per_step={axis: total / len(self._traffic) for axis, total in sum(self._traffic, Counter()).items()},
        )
        self._sums.zero_()
        self._traffic = []
        self._loss, self._steps, self._tokens, self._start = 0.0, 0, 0, time.perf_counter()
        return averages


class MetricsWriter:
    """Writes reports of the job's first rank to a folder.

    Args:
        folder: the job's output; reports that a killed run left of steps after `resume_step` are removed.
        resume_step: steps done when writing starts.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        _cut(path, resume_step)
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=resume_step + 1)

    def write(self, metrics: TrainingMetrics) -> None:
        """Appends one report."""
        scalars = metrics.scalars()
        self._lines.write(json.dumps({"step": metrics.step, **scalars}) + "\n")
        self._lines.flush()
        for tag, value in scalars.items():
            self._board.add_scalar(f"{TRAIN_TAG}/{tag}", value, metrics.step)

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Appends the results of an evaluation as a separate report.

        Args:
            step: steps done.
            evaluation: scalars that are not finite are left out; histograms become lists in the report, and histograms
                and one heat map on TensorBoard.
        """
        # Importing matplotlib takes most of a second, and a job without evaluation needs none.
        from clt.evaluation.density_plot import density_figure, pixels

        scalars = {tag: value for tag, value in evaluation.scalars.items() if math.isfinite(value)}
        line: dict[str, Any] = {"step": step, **scalars}
        for tag, value in scalars.items():
            self._board.add_scalar(tag, value, step)
        for tag, histograms in evaluation.histograms.items():
            line[f"{tag}/edges"] = histograms.edges
            for layer, counts in histograms.counts.items():
                line[f"{tag}/layer_{layer:02d}"] = counts
                self._add_histogram(f"{tag}/layer_{layer:02d}", histograms.edges, counts, step)
            figure = density_figure(histograms, f"{tag}, step {step:,}")
            self._board.add_image(f"{tag}/all_layers", pixels(figure), step, dataformats="HWC")
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        self._board.flush()

    def _add_histogram(self, tag: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
        if not any(counts):
            return
        centres = [(low + high) / 2 for low, high in pairwise(edges)]
        self._board.add_histogram_raw(
            tag,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * centre for count, centre in zip(counts, centres, strict=True)),
            sum_squares=sum(count * centre**2 for count, centre in zip(counts, centres, strict=True)),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def close(self) -> None:
        """Flushes and closes both files."""
        self._lines.close()
        self._board.close()


def _cut(path: Path, step: int) -> None:
    """Removes reports of later steps, and an incomplete one."""
    if not path.exists():
        return
    kept = [report for report in read_metrics(path) if report["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(report) + "\n" for report in kept), encoding="utf-8")
    os.replace(temporary, path)
