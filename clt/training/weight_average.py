"""EMA weights: an exponential moving average of the weights, often better than the weights at any one step.

mean += (1 - d) (weight - mean) after every step, with d = min(decay, t / (t + 1)) at step t: a plain mean at first, so
that the initial weights count no more than any others (Polyak and Juditsky 1992, "Acceleration of stochastic
approximation by averaging").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """EMA weights of a module, in float32 or wider.

    Args:
        module: the module; the average starts with its weights.
        decay: share of the average that a step keeps, 0 < decay < 1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._means: dict[Tensor, Tensor] = {
            parameter: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for parameter in module.parameters()
        }

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Updates the average after a step.

        Args:
            steps: optimizer steps taken, including this one.
        """
        weight = 1 - min(self._decay, steps / (steps + 1))
        for parameter, mean in self._means.items():
            mean.lerp_(parameter.to(mean.dtype), weight)

    def of(self, parameter: Tensor) -> Tensor:
        """EMA weights of a parameter of the module; to be read, or written when a job is resumed."""
        return self._means[parameter]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the module its EMA weights during the block; changes that the block makes to them are lost."""
        own = {parameter: parameter.data for parameter in self._means}
        for parameter, mean in self._means.items():
            parameter.data = mean.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in own.items():
                parameter.data = data
