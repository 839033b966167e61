"""Intervals of single scores against published values and simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from gpt2_pl.experiments.statistics.intervals import (
    bootstrap_t_interval,
    dominant_text,
    exact_interval,
    max_rate_unseen,
    mean_interval,
    std_interval,
    wilson_interval,
)


def test_wilson_interval_of_ten_of_twelve_is_the_published_one():
    assert wilson_interval(10, 12) == pytest.approx((0.5520, 0.9530), abs=5e-5)
    n, p, z = 12, 10 / 12, stats.norm.ppf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert wilson_interval(10, 12) == pytest.approx((centre - half, centre + half))


def test_exact_interval_equals_the_beta_quantiles():
    assert exact_interval(2, 9) == pytest.approx((stats.beta.ppf(0.025, 2, 8), stats.beta.ppf(0.975, 3, 7)))


@pytest.mark.parametrize(("seeds", "rate"), [(3, 0.63), (5, 0.45), (10, 0.26), (15, 0.18)])
def test_max_rate_unseen_is_the_published_one(seeds, rate):
    assert max_rate_unseen(seeds) == pytest.approx(rate, abs=5e-3)


@pytest.mark.parametrize(
    ("seeds", "low", "high"), [(3, 0.52, 6.28), (5, 0.60, 2.87), (10, 0.69, 1.83), (15, 0.73, 1.58)]
)
def test_std_interval_has_the_published_factors(seeds, low, high):
    assert std_interval(1.0, seeds) == pytest.approx((low, high), abs=5e-3)


def test_mean_interval_chooses_by_the_values():
    generator = np.random.default_rng(0)
    normal, skewed = generator.normal(size=30), generator.lognormal(size=30)
    expected = stats.t.interval(0.95, 29, normal.mean(), stats.sem(normal))
    assert mean_interval(normal) == pytest.approx(expected)
    assert mean_interval(skewed) == bootstrap_t_interval(skewed)
    assert mean_interval(np.array([1.0] * 10 + [0.0] * 2)) == wilson_interval(10, 12)
    assert mean_interval(normal[:5]) is None
    assert mean_interval(np.full(9, 0.3)) is None


def test_bootstrap_t_interval_of_skewed_values_covers_more_than_student():
    generator, covered, student = np.random.default_rng(1), 0, 0
    for world in range(300):
        values = generator.lognormal(0, 1, 12)
        low, high = bootstrap_t_interval(values, seed=world)
        t_low, t_high = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
        truth = np.exp(0.5)
        covered, student = covered + (low <= truth <= high), student + (t_low <= truth <= t_high)
    assert 0.86 <= covered / 300 <= 0.96
    assert covered > student


def test_bootstrap_t_interval_of_two_values_is_refused():
    assert bootstrap_t_interval(np.array([0.0] * 11 + [1.0])) is None


def test_dominant_text_is_found():
    assert dominant_text(np.array([0.0, 0.1, -0.1, 5.0])) == 3
    assert dominant_text(np.array([-1.0, 1.0, -1.0, 1.0])) is None
