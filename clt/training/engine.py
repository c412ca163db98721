"""Interface between trainer and engines: inputs and result of a training step, and the `Engine` protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from clt.training.metrics import Observations

#: Names of Adam's moments, as torch and DeepSpeed call them.
FIRST_MOMENT, SECOND_MOMENT = "exp_avg", "exp_avg_sq"


class StepInputs(NamedTuple):
    """Arguments of `clt.training.objective.Objective` for one micro-batch."""

    x_raw: Tensor
    y_raw: Tensor
    k: int
    dead_LF: Tensor | None
    penalty_weight: float
    weights_B: Tensor | None


@dataclass(frozen=True, kw_only=True)
class StepCheck:
    """Result of a step that all ranks agree on before the optimizer steps.

    Attributes:
        finite: whether everything checked is finite on every rank.
        loss: the loss over all tokens and targets.
        gradient_norm: global norm before clipping; infinite if not finite, NaN for an engine that never has all
            gradients at once.
        stop: whether a stop was requested on any rank.
    """

    finite: bool
    loss: float
    gradient_norm: float
    stop: bool


class Engine(Protocol):
    """Forward, backward and optimizer of one rank's share of a transcoder."""

    #: Steps that Adam has taken; its bias correction depends on them.
    adam_steps: int

    def train_step(
        self, parts: Iterable[StepInputs], learning_rate: float, stop: bool
    ) -> tuple[StepCheck, Observations]:
        """One step on a batch, taken on all ranks if it is finite on all, else on none; all ranks call it together.

        Args:
            parts: the micro-batches, of equally many tokens.
            learning_rate: of this step.
            stop: whether a stop was requested on this rank.

        Returns:
            The check that all ranks agree on, and the metrics of this rank's tokens.
        """

    def weights(self, parameter: Tensor) -> Tensor:
        """A parameter in the full precision that training keeps; all ranks of the data axis call it."""

    def optimizer_state(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """Adam's state of a parameter by name, moments in float32; all ranks of the data axis call it."""

    def restore(self, parameter: Tensor, weights: Tensor, state: Mapping[str, Tensor]) -> None:
        """Sets a parameter and its state to results of `weights` and `optimizer_state`, bit for bit.

        Args:
            parameter: of this rank's share.
            weights: from `weights`.
            state: from `optimizer_state`.

        Raises:
            KeyError: the state lacks an entry.
        """
