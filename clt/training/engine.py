"""A step of training as trainer and engines see it: what goes in, what comes out, what an engine can do."""

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
    """What all ranks know of a step before the optimizer moves.

    Attributes:
        finite: what was looked at is finite on every rank.
        loss: the loss over all tokens and targets.
        gradient_norm: global norm before clipping; infinite if not finite, NaN where gradients are never there at once.
        stop: a rank has been told to stop.
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
        """One step on a batch, taken if all ranks find it finite, else by none; all ranks call it together.

        Args:
            parts: the micro-batches, of equally many tokens.
            learning_rate: of this step.
            stop: whether this rank has been told to stop.

        Returns:
            What the ranks agreed on, and what was seen on this rank's tokens.
        """

    def weights(self, parameter: Tensor) -> Tensor:
        """A parameter with all the digits that training keeps of it; all ranks of the data axis call it."""

    def optimizer_state(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """Adam's state of a parameter by name, moments in float32; all ranks of the data axis call it."""

    def restore(self, parameter: Tensor, weights: Tensor, state: Mapping[str, Tensor]) -> None:
        """Sets a parameter and its state to what `weights` and `optimizer_state` gave, bit for bit.

        Raises:
            KeyError: the state lacks an entry.
        """
