"""The bootstrap: its coverage, and against rows drawn again one by one."""

import numpy as np
import pytest

from gpt2_pl.statistics import paired_bootstrap


def outcomes(generator, n):
    """Two models that are right 70 and 74 times in 100, mostly on the same rows."""
    both = generator.random(n)
    a = np.where(both < 0.6, 1.0, generator.random(n) < 0.25)
    b = np.where(both < 0.6, 1.0, generator.random(n) < 0.35)
    return a, b


def test_intervals_cover_a_known_difference():
    generator, covered, draws = np.random.default_rng(1), 0, 1000
    for i in range(draws):
        found = paired_bootstrap(*outcomes(generator, 400), n_resamples=1000, seed=i)
        covered += found.low <= 0.04 <= found.high
    assert 0.93 <= covered / draws <= 0.97


def test_p_is_rarely_small_without_a_difference():
    generator, small, draws = np.random.default_rng(2), 0, 1000
    for i in range(draws):
        a, _ = outcomes(generator, 400)
        b, _ = outcomes(generator, 400)
        small += paired_bootstrap(a, b, n_resamples=1000, seed=i).p < 0.05
    assert 0.03 <= small / draws <= 0.07


def test_drawing_differences_is_drawing_rows():
    generator = np.random.default_rng(3)
    a, b = outcomes(generator, 300)
    found = paired_bootstrap(a, b, n_resamples=20_000)
    rows = generator.integers(0, 300, (20_000, 300))
    means = (b - a)[rows].mean(1)
    assert found.mean == pytest.approx((b - a).mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.004)


def test_equal_outcomes_do_not_differ():
    a = np.array([1, 0, 1, 1])
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="same rows"):
        paired_bootstrap(a, a[:3])
    with pytest.raises(ValueError, match="same rows"):
        paired_bootstrap(a[:0], a[:0])
