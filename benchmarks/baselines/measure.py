"""Training loop and held-out measures shared by all algorithms of `clt bench baselines`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.baselines.data import WINDOW_STEPS, BaselineData, RawBatch


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Output of a transcoder for B tokens.

    Attributes:
        y_LBD: reconstructed MLP outputs in the units of the model.
        active_LBF: bool, features that are not zero.
    """

    y_LBD: Tensor
    active_LBF: Tensor


Predict = Callable[[Tensor], Prediction]


class Learner(Protocol):
    """A transcoder in training."""

    def step(self, batch: RawBatch) -> None:
        """One step of the optimizer."""

    def predict(self, x_LBD: Tensor) -> Prediction:
        """Output for raw encoder inputs of all layers."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Hyperparameters tuned per algorithm.

    Attributes:
        learning_rate: peak.
        dead_penalty: weight of the loss for dead features, where the algorithm has one.
        bias_rate: learning rate of the encoder biases as a multiple of the others', where the algorithm has one.
    """

    learning_rate: float
    dead_penalty: float = 0.0
    bias_rate: float = 1.0

    def __str__(self) -> str:
        extra = f", penalty {self.dead_penalty:g}" if self.dead_penalty else ""
        biases = f", biases x{self.bias_rate:g}" if self.bias_rate != 1 else ""
        return f"lr {self.learning_rate:.3g}{biases}{extra}"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained transcoder.

    Attributes:
        predict: its function.
        tokens_per_s: of every window of steps except the first.
    """

    predict: Predict
    tokens_per_s: tuple[float, ...]


#: Trains with a seed and a setting.
Train = Callable[[BaselineData, int, Setting], Trained]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Measures on held-out tokens.

    Attributes:
        fvu: squared error over squared deviation from the mean, summed over channels, by layer, in the model's units.
        l0: active features per token, by layer.
        dead_fraction: share of features never active, by layer.
    """

    fvu: tuple[float, ...]
    l0: tuple[float, ...]
    dead_fraction: tuple[float, ...]

    @property
    def mean_fvu(self) -> float:
        """Mean over layers."""
        return statistics.fmean(self.fvu)

    @property
    def total_l0(self) -> float:
        """Sum over layers."""
        return sum(self.l0)

    @property
    def mean_dead(self) -> float:
        """Mean over layers."""
        return statistics.fmean(self.dead_fraction)


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """Result of one training run.

    Attributes:
        seed: of weights and batches.
        heldout: measures of the final weights.
        tokens_per_s: of every window of steps except the first.
    """

    seed: int
    heldout: HeldOut
    tokens_per_s: tuple[float, ...]


@torch.no_grad()
def measure(predict: Predict, batches: Sequence[RawBatch]) -> HeldOut:
    """Held-out measures, from float64 sums.

    Args:
        predict: a trained transcoder.
        batches: at least one.
    """
    tokens = sum(batch.y_LBD.shape[1] for batch in batches)
    mean_LD = sum((batch.y_LBD.double().sum(dim=1) for batch in batches), torch.zeros(())) / tokens
    error_L = deviation_L = active_L = torch.zeros(())
    fired_LF = torch.zeros((), dtype=torch.bool)
    for batch in batches:
        found, y_LBD = predict(batch.x_LBD), batch.y_LBD.double()
        error_L = error_L + (found.y_LBD.double() - y_LBD).square().sum(dim=(1, 2))
        deviation_L = deviation_L + (y_LBD - mean_LD[:, None]).square().sum(dim=(1, 2))
        active_L = active_L + found.active_LBF.sum(dim=(1, 2)).double()
        fired_LF = fired_LF | found.active_LBF.any(dim=1)
    return HeldOut(
        fvu=tuple((error_L / deviation_L).tolist()),
        l0=tuple((active_L / tokens).tolist()),
        dead_fraction=tuple((~fired_LF).double().mean(dim=1).tolist()),
    )


def learn(learner: Learner, batches: Iterable[RawBatch]) -> Trained:
    """Trains on all batches.

    Args:
        learner: with its initial weights.
        batches: one per step.
    """
    speeds = []
    tokens, started = 0, time.perf_counter()
    for number, batch in enumerate(batches, start=1):
        learner.step(batch)
        tokens += batch.x_LBD.shape[1]
        if number % WINDOW_STEPS == 0:
            now = time.perf_counter()
            speeds.append(tokens / (now - started))
            tokens, started = 0, now
    if not speeds:
        speeds.append(tokens / (time.perf_counter() - started))
    return Trained(predict=learner.predict, tokens_per_s=without_first(speeds))


def without_first(speeds: Sequence[float]) -> tuple[float, ...]:
    """All speeds except the first, unless it is the only one."""
    return tuple(speeds[1:] or speeds)
