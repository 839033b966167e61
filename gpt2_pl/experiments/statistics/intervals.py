"""Confidence intervals of single scores: proportions, means over few texts, failure rates, standard deviations.

References:
    Wilson (1927), Probable inference, the law of succession, and statistical inference. Clopper and Pearson (1934), The
    use of confidence or fiducial limits. Hesterberg (2015), What teachers should know about the bootstrap.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from gpt2_pl.experiments.statistics.contrast import Floats

MIN_TEXTS = 6
"""With fewer texts a score is printed without an interval."""
_SKEWED = 1.0  # sample skewness above which a level has a bootstrap-t interval
_NUM_RESAMPLES = 1999


def wilson_interval(num_hits: int, num_texts: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a proportion, such as the accuracy of one run."""
    interval = stats.binomtest(num_hits, num_texts).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def exact_interval(num_hits: int, num_trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval (Clopper-Pearson) of a rate, such as that of failed runs."""
    interval = stats.binomtest(num_hits, num_trials).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def max_rate_unseen(num_trials: int, level: float = 0.95) -> float:
    """Return the highest rate of an event that is compatible with not seeing it in a number of trials."""
    return 1.0 - (1.0 - level) ** (1.0 / num_trials)


def std_interval(std: float, num_seeds: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the standard deviation over seeds of normal scores."""
    df, tail = num_seeds - 1, (1.0 - level) / 2
    low, high = stats.chi2.ppf([1.0 - tail, tail], df)
    return std * math.sqrt(df / low), std * math.sqrt(df / high)


def mean_interval(values: Floats, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Return the interval of a mean over texts for one run.

    The values 0 and 1 have Wilson's interval. Strongly skewed values have a bootstrap-t interval. All others have
    Student's t interval.

    Args:
        values: (N,) value of each text, or its contribution to a score.
        level: confidence level, in (0, 1).
        seed: seed of the resamples.

    Returns:
        The limits; None with fewer than :data:`MIN_TEXTS` texts or without spread.
    """
    N = len(values)
    if N < MIN_TEXTS:
        return None
    if np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(int(values.sum()), N, level)
    std = float(values.std(ddof=1))
    if std == 0.0:
        return None
    if abs(stats.skew(values, bias=False)) > _SKEWED and len(np.unique(values)) >= 5:
        interval = bootstrap_t_interval(values, level, seed)
        if interval is not None:
            return interval
    half = float(stats.t.ppf(0.5 + level / 2, N - 1)) * std / math.sqrt(N)
    return float(values.mean()) - half, float(values.mean()) + half


def bootstrap_t_interval(values: Floats, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Return the bootstrap-t interval of a mean; None if over 1 % of the resamples have no spread."""
    N, tail = len(values), (1.0 - level) / 2
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(N)
    resamples = values[np.random.default_rng(seed).integers(0, N, (_NUM_RESAMPLES, N))]
    errors = resamples.std(1, ddof=1) / math.sqrt(N)
    spread = errors > 0
    if spread.mean() < 0.99:
        return None
    t = (resamples.mean(1)[spread] - mean) / errors[spread]
    low, high = np.quantile(t, [tail, 1.0 - tail])
    return mean - float(high) * error, mean - float(low) * error


def dominant_text(values: Floats) -> int | None:
    """Return the index of a text that has more than half of the sum of squared deviations, or None."""
    squares = np.square(values - values.mean())
    index = int(squares.argmax())
    return index if squares[index] > squares.sum() / 2 else None
