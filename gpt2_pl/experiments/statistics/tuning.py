"""Expected best of k tuning trials that were drawn independently from one search distribution.

References:
    Dodge et al. (2019), Show Your Work. Tang et al. (2020), Showing Your Work Doesn't Always Work. Lourie, Cho and He
    (2023), Show Your Work with Confidence.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from gpt2_pl.experiments.statistics.contrast import Floats
from gpt2_pl.experiments.statistics.distributions import binomial_cdf

MIN_TRIALS = 5
"""With fewer trials there are values only."""


class BestOfTrials(NamedTuple):
    """Best score of k trials.

    Args:
        expected: unbiased estimate of the expected best.
        low, high: exact limits for the median best; None where n trials give no limit, or if all scores are equal.
    """

    expected: float
    low: float | None
    high: float | None


def best_of(scores: Floats, k: int, level: float = 0.95) -> BestOfTrials:
    """Estimate the best score of k trials from n trials.

    Args:
        scores: (n,) scores, higher is better. Failed trials have the worst value of the metric.
        k: number of trials, from 1 to n.
        level: confidence level of the limits.

    Raises:
        ValueError: k is outside 1 to n.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], the number of trials, got {k}")
    ordered = np.sort(scores)
    expected = float(expected_best_weights(n, k)[k - 1 :] @ ordered[k - 1 :])  # the others have no weight
    if n < MIN_TRIALS or ordered[0] == ordered[-1]:
        return BestOfTrials(expected, None, None)
    low, high = median_ranks(n, k, level)
    return BestOfTrials(
        expected,
        None if low is None else float(ordered[low - 1]),
        None if high is None else float(ordered[high - 1]),
    )


def expected_best_weights(n: int, k: int) -> Floats:
    """Return the weights (n,) of the ordered scores in the unbiased estimate: C(i - 1, k - 1) / C(n, k)."""
    i = np.arange(k, n + 1)
    log_choose = gammaln(i) - gammaln(k) - gammaln(i - k + 1)
    total = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return np.concatenate([np.zeros(k - 1), np.exp(log_choose - total)])


def median_ranks(n: int, k: int, level: float = 0.95) -> tuple[int | None, int | None]:
    """Return the ranks, from 1, of the ordered scores that limit the median best of k trials."""
    p, tail = 0.5 ** (1.0 / k), (1.0 - level) / 2
    ranks = np.arange(1, n + 1)
    lower = ranks[binomial_cdf(ranks - 1, n, p) <= tail]
    upper = ranks[1.0 - binomial_cdf(ranks - 1, n, p) <= tail]
    return (int(lower.max()) if len(lower) else None), (int(upper.min()) if len(upper) else None)
