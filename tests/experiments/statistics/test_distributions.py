"""Distribution functions and intervals of proportions against scipy.stats."""

import numpy as np
import pytest
from scipy import stats

from gpt2_pl.experiments.statistics import distributions, intervals


def test_distribution_functions_equal_scipy_stats():
    for df in (1.0, 2.37, 40.5, 1e6):
        for p in (1e-6, 0.025, 0.5, 0.999):
            assert distributions.t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df))
            assert distributions.chi2_quantile(p, df) == pytest.approx(stats.chi2.ppf(p, df))
        for t in (-30.0, -1.0, 0.0, 2.5):
            assert distributions.t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df))
            assert distributions.t_cdf(-t, df) == pytest.approx(stats.t.sf(t, df))
    z = np.linspace(-8, 8, 9)
    assert distributions.normal_cdf(z) == pytest.approx(stats.norm.cdf(z))
    assert distributions.normal_quantile(0.975) == pytest.approx(stats.norm.ppf(0.975))
    k = np.arange(12)
    assert distributions.binomial_cdf(k, 12, 0.3) == pytest.approx(stats.binom.cdf(k, 12, 0.3))


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (1, 3), (10, 12), (700, 1101)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_intervals_of_proportions_equal_scipy_stats(hits, n, level):
    for function, method in ((intervals.wilson_interval, "wilson"), (intervals.exact_interval, "exact")):
        expected = stats.binomtest(hits, n).proportion_ci(level, method)
        assert function(hits, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_skewness_equals_scipy_stats():
    values = np.random.default_rng(0).exponential(size=20)
    assert intervals._skewness(values) == pytest.approx(stats.skew(values, bias=False))
