"""Schedules of learning rate, k and the penalty's weight: pure functions of the step, without state to save."""

from __future__ import annotations

from clt.training.settings import OptimizerSettings
from clt.transcoder.architecture import SparsitySettings


def learning_rate(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of a step: linear warm-up, plateau, linear decay to zero.

    Args:
        step: 0 for the first step.
        total_steps: steps of the whole run.
        settings: peak, warm-up and share of the decay.

    Returns:
        The rate; positive at every step below total_steps.
    """
    warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    decay_steps = settings.decay_fraction * total_steps
    left = min(1.0, (total_steps - step) / decay_steps) if decay_steps > 0 else 1.0
    return settings.learning_rate * warm * left


def active_features(step: int, k: int, settings: OptimizerSettings) -> int:
    """K at a step: falls linearly from k_start to k over k_anneal_steps.

    Args:
        step: 0 for the first step.
        k: final number of active features.
        settings: k_start and k_anneal_steps.

    Returns:
        An integer between k and k_start.
    """
    if settings.k_start is None or step >= settings.k_anneal_steps:
        return k
    return round(settings.k_start + (k - settings.k_start) * step / settings.k_anneal_steps)


def penalty_weight(step: int, settings: SparsitySettings) -> float:
    """Weight of the sparsity penalty at a step: rises linearly from zero to its full value.

    Args:
        step: 0 for the first step.
        settings: penalty and penalty_warmup_steps.

    Returns:
        The weight.
    """
    return settings.penalty * min(1.0, step / max(1, settings.penalty_warmup_steps))
