"""Confidence intervals of measured shares, such as the share of answers that change under an ablation.

Wilson's score interval keeps its coverage for small n and for rates near 0 and 1, where the textbook interval
p +- z * se collapses to a point (Wilson 1927; Brown, Cai and DasGupta 2001, section 3.1.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """A share of trials with its confidence interval.

    Attributes:
        successes: trials in which the event happened.
        trials: all trials.
        rate: successes / trials; NaN without trials.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    successes: int
    trials: int
    rate: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Proportion:
    """The share of successes with Wilson's score interval.

    Args:
        successes: trials in which the event happened.
        trials: all trials; with none the rate is NaN and the interval is [0, 1].
        confidence: coverage of the two-sided interval.

    Returns:
        The share and its interval, which always contains the share and lies within [0, 1].

    Raises:
        ValueError: successes outside 0..trials, or a confidence outside (0, 1).

    Source: Wilson 1927, equation 1; Brown, Cai and DasGupta 2001, equation 4.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} must lie in 0..trials={trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    if trials == 0:
        return Proportion(successes=0, trials=0, rate=math.nan, low=0.0, high=1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    centre = (successes + z * z / 2) / (trials + z * z)
    half_width = z / (trials + z * z) * math.sqrt(trials * rate * (1 - rate) + z * z / 4)
    # At the two ends the formula gives exactly 0 and 1; rounding may miss them, or the rate, by its last digit.
    low = 0.0 if successes == 0 else min(rate, max(0.0, centre - half_width))
    high = 1.0 if successes == trials else max(rate, min(1.0, centre + half_width))
    return Proportion(successes=successes, trials=trials, rate=rate, low=low, high=high)
