"""Confidence intervals of single scores: proportions, means over few texts, failure rates, standard deviations.

References:
    Wilson (1927), Probable inference, the law of succession, and statistical inference. Clopper and Pearson (1934), The
    use of confidence or fiducial limits. Hesterberg (2015), What teachers should know about the bootstrap.
"""

from __future__ import annotations

import math

import numpy as np

from gpt2_pl.experiments.statistics.contrast import Floats
from gpt2_pl.experiments.statistics.distributions import beta_quantile, chi2_quantile, normal_quantile, t_quantile

MIN_TEXTS = 6
"""With fewer texts a score is printed without an interval."""
_SKEWED = 1.0  # sample skewness above which a level has a bootstrap-t interval
_NUM_RESAMPLES = 1999


def wilson_interval(num_hits: int, num_texts: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a proportion, such as the accuracy of one run."""
    share, z = num_hits / num_texts, normal_quantile(0.5 + level / 2)
    center = (share + z**2 / (2 * num_texts)) / (1 + z**2 / num_texts)
    variance = share * (1 - share) / num_texts + z**2 / (4 * num_texts**2)
    half = z * math.sqrt(variance) / (1 + z**2 / num_texts)
    return max(0.0, center - half), min(1.0, center + half)


def exact_interval(num_hits: int, num_trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval (Clopper-Pearson) of a rate, such as that of failed runs."""
    tail, misses = (1.0 - level) / 2, num_trials - num_hits
    low = beta_quantile(tail, num_hits, misses + 1) if num_hits else 0.0
    high = beta_quantile(1.0 - tail, num_hits + 1, misses) if misses else 1.0
    return low, high


def max_rate_unseen(num_trials: int, level: float = 0.95) -> float:
    """Return the highest rate of an event that is compatible with not seeing it in a number of trials."""
    return 1.0 - float((1.0 - level) ** (1.0 / num_trials))


def std_interval(std: float, num_seeds: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the standard deviation over seeds of normal scores."""
    df, tail = num_seeds - 1, (1.0 - level) / 2
    low, high = (std * math.sqrt(df / chi2_quantile(p, df)) for p in (1.0 - tail, tail))
    return low, high


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
    if abs(_skewness(values)) > _SKEWED and len(np.unique(values)) >= 5:
        interval = bootstrap_t_interval(values, level, seed)
        if interval is not None:
            return interval
    half = t_quantile(0.5 + level / 2, N - 1) * std / math.sqrt(N)
    return float(values.mean()) - half, float(values.mean()) + half


def _skewness(values: Floats) -> float:
    """Return the sample skewness, corrected for bias; of at least three values with spread."""
    N, deviations = len(values), values - values.mean()
    moments = float(np.mean(deviations**3)), float(np.mean(deviations**2))
    return math.sqrt(N * (N - 1)) / (N - 2) * moments[0] / moments[1] / math.sqrt(moments[1])


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
