"""Whether one result is better than another, or only luckier."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Difference(NamedTuple):
    """A difference of two means over the same rows, its interval, and how likely so large a one is by chance."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    a: NDArray[Any], b: NDArray[Any], n_resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """The difference mean(b) - mean(a) over rows drawn again with replacement (Efron & Tibshirani 1993, chapter 13).

    Rows are what is drawn: the interval says how sure the difference of these very models is over other texts, not how
    it would vary over seeds.

    Args:
        a: (N,) outcomes of the rows, such as whether each was right, or the mean of that over seeds.
        b: (N,) outcomes of the same rows.
        n_resamples: how often the rows are drawn.
        confidence: of the percentile interval.
        seed: of the draws.

    Returns:
        The difference, the interval, and the two-sided p of no difference.

    Raises:
        ValueError: outcomes of different or no rows.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(
            f"the outcomes are of {a.shape} and {b.shape} rows; they must be of the same rows, one or more"
        )
    # Rows with equal differences are interchangeable: how many of each are drawn is multinomial.
    values, counts = np.unique(b - a, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(a), counts / len(a), size=n_resamples)
    means = draws @ values / len(a)
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    p = min(1.0, 2 * min(np.mean(means <= 0), np.mean(means >= 0)))
    return Difference(float((b - a).mean()), float(low), float(high), float(p))
