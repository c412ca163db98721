"""Wilson's interval against values computed by hand and against its defining equation."""

import math
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.attribution.features.confidence import wilson_interval

Z95 = NormalDist().inv_cdf(0.975)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_contains_the_rate_and_stays_within_zero_and_one(counts):
    successes, trials = counts
    interval = wilson_interval(successes, trials)
    assert interval.rate == successes / trials
    assert 0 <= interval.low <= interval.rate <= interval.high <= 1


@given(st.integers(2, 5000).flatmap(lambda n: st.tuples(st.integers(1, n - 1), st.just(n))))
def test_wilson_interval_ends_solve_the_score_equation(counts):
    successes, trials = counts
    interval = wilson_interval(successes, trials)
    for end in (interval.low, interval.high):
        score = (interval.rate - end) ** 2
        # 1e-9 relative: both sides are a few float64 operations.
        assert math.isclose(score, Z95**2 * end * (1 - end) / trials, rel_tol=1e-9, abs_tol=1e-15)


@given(st.integers(0, 200), st.integers(0, 200))
def test_wilson_interval_is_symmetric_in_success_and_failure(successes, failures):
    one, other = wilson_interval(successes, successes + failures), wilson_interval(failures, successes + failures)
    assert math.isclose(one.low, 1 - other.high, abs_tol=1e-12)
    assert math.isclose(one.high, 1 - other.low, abs_tol=1e-12)


def test_wilson_interval_gives_known_values():
    # p = 1/2, n = 4: centre 1/2, half width z sqrt(1 + z^2 / 4) / (4 + z^2).
    half = Z95 * math.sqrt(1 + Z95**2 / 4) / (4 + Z95**2)
    interval = wilson_interval(2, 4)
    assert interval.low == pytest.approx(0.5 - half, abs=1e-12)
    assert interval.high == pytest.approx(0.5 + half, abs=1e-12)
    # 0 of 10: [0, z^2 / (n + z^2)], the entry 0.2775 of the published tables.
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(0, 10).high == pytest.approx(0.27753, abs=5e-6)
    assert wilson_interval(10, 10).high == 1.0
    # 81 of 263, a textbook example: 0.2553 to 0.3662.
    assert wilson_interval(81, 263).low == pytest.approx(0.2553, abs=5e-5)
    assert wilson_interval(81, 263).high == pytest.approx(0.3662, abs=5e-5)


def test_wilson_interval_without_trials_is_zero_to_one():
    interval = wilson_interval(0, 0)
    assert math.isnan(interval.rate)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_wilson_interval_widens_with_confidence():
    assert wilson_interval(30, 100, confidence=0.99).low < wilson_interval(30, 100).low


@pytest.mark.parametrize("counts", [(-1, 10), (11, 10), (1, 0)])
def test_wilson_interval_refuses_impossible_counts(counts):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(*counts)


def test_wilson_interval_refuses_impossible_confidence():
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=1.0)
