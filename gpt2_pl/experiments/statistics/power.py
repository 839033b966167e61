"""Planning from pilot runs: detectable differences, chances of verdicts, numbers of seeds and texts.

Reference:
    Cohen (1988), Statistical Power Analysis for the Behavioral Sciences. Browne (1995), On the use of a pilot sample
    for sample size determination.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gpt2_pl.experiments.statistics.contrast import Contrast, Floats
from gpt2_pl.experiments.statistics.distributions import chi2_quantile, normal_cdf, normal_quantile, t_quantile

MAX_SEEDS = 1000
"""Largest number of seeds in a plan."""
_POWER, _ALPHA = 0.80, 0.05
_NODES = 4000  # of the average over the estimated standard error
# Factors by which a detectable difference exceeds the formula's because its degrees of freedom are estimated; by seeds.
_INFLATION = {2: 1.15, 3: 1.15, 4: 1.06, 5: 1.03, 6: 1.02, 7: 1.02}
_BISECTIONS = 40  # to a relative error of 1e-10


class Pilot(NamedTuple):
    """Variance components of a difference, from pilot runs.

    Args:
        seed_variances: variance of the score over seeds of each arm, without the interaction with texts, ``r``.
        interactions: seed-by-text variance per text of each arm, ``e2``.
        text_variance: variance per text of the stable difference, ``v_T``.
        num_seeds: numbers of seeds of the pilot.
    """

    seed_variances: tuple[float, ...]
    interactions: tuple[float, ...]
    text_variance: float
    num_seeds: tuple[int, ...]

    @classmethod
    def from_contrast(cls, contrast: Contrast) -> Pilot:
        """Return the components of a contrast of arms with at least two seeds each.

        Raises:
            ValueError: an arm has one seed, or the scores do not vary over seeds.
        """
        if contrast.population != "texts and seeds":
            raise ValueError(f"a plan needs at least 2 seeds and 2 texts in each arm, got {contrast.num_seeds} seeds")
        if not any(v.of_scores > 0 for v in contrast.seed_variances):
            raise ValueError("a plan needs scores that vary over seeds")
        N = contrast.num_texts
        return cls(
            tuple(max(0.0, v.of_scores - v.interaction / N) for v in contrast.seed_variances),
            tuple(v.interaction for v in contrast.seed_variances),
            N * contrast.text_variance,
            contrast.num_seeds,
        )

    def unlucky(self, confidence: float = 0.80) -> Pilot:
        """Return the components with the upper confidence bound of each standard deviation over seeds."""
        factors = [(S - 1) / chi2_quantile(1.0 - confidence, S - 1) for S in self.num_seeds]
        return self._replace(seed_variances=tuple(f * r for f, r in zip(factors, self.seed_variances, strict=True)))


def standard_error(pilot: Pilot, num_seeds: int, num_texts: int) -> tuple[float, float]:
    """Return the standard error of a difference and its degrees of freedom, for planned numbers of seeds and texts."""
    N, S = num_texts, num_seeds
    parts = [(r + e2 / N) / S for r, e2 in zip(pilot.seed_variances, pilot.interactions, strict=True)]
    text = pilot.text_variance / N
    variance = sum(parts) + text
    squares = sum(part**2 / (S - 1) for part in parts) + text**2 / (N - 1)
    return math.sqrt(variance), variance**2 / squares


def power(difference: float, error: float, df: float, alpha: float = _ALPHA) -> float:
    """Return the chance that a true difference is shown to differ from 0.

    Args:
        difference: the true difference.
        error: standard error of its estimate.
        df: degrees of freedom of the standard error.
        alpha: level of the two-sided test.
    """
    ratios = _estimated_over_true_error(df) * t_quantile(1.0 - alpha / 2, df)
    delta = difference / error
    return float(np.mean(normal_cdf(delta - ratios) + normal_cdf(-delta - ratios)))


def non_inferiority_power(margin: float, error: float, df: float, alpha: float = _ALPHA) -> float:
    """Return the chance of the verdict "not worse by the margin or more" if there is no true difference."""
    ratios = _estimated_over_true_error(df) * t_quantile(1.0 - alpha / 2, df)
    return float(np.mean(normal_cdf(margin / error - ratios)))


@lru_cache(maxsize=64)
def _estimated_over_true_error(df: float) -> Floats:
    quantiles = (np.arange(1, _NODES + 1) - 0.5) / _NODES
    ratios: Floats = np.sqrt(chi2_quantile(quantiles, df) / df)
    return ratios


def detectable_difference(pilot: Pilot, num_seeds: int, num_texts: int, chance: float = _POWER) -> float:
    """Return the smallest true difference that is shown with a given chance.

    Args:
        pilot: variance components.
        num_seeds: planned number of seeds of each arm, at least 2.
        num_texts: planned number of texts.
        chance: power, in (0, 1).
    """
    return detectable_with(*standard_error(pilot, num_seeds, num_texts), num_seeds, chance)


def detectable_with(error: float, df: float, num_seeds: int, chance: float = _POWER) -> float:
    """Return the smallest true difference that an experiment with a given standard error shows.

    Args:
        error: standard error of the difference.
        df: degrees of freedom of the standard error.
        num_seeds: number of seeds of the arm with the fewest, at least 2.
        chance: power, in (0, 1).
    """
    low, high = 0.0, 100.0 * error
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, error, df) < chance else (low, middle)
    return high * _INFLATION.get(num_seeds, 1.01)


def seeds_needed(pilot: Pilot, num_texts: int, difference: float) -> int | None:
    """Return the number of seeds of each arm that shows a difference with a chance of 80 %.

    Args:
        pilot: variance components.
        num_texts: number of texts.
        difference: the true difference; above 0.

    Returns:
        The number; None if no number of seeds suffices, because the texts limit.

    Raises:
        ValueError: the difference is not above 0.
    """
    if not difference > 0:
        raise ValueError(f"difference must be above 0, got {difference}")
    quantiles = normal_quantile(1 - _ALPHA / 2) + normal_quantile(_POWER)  # 2.80
    if quantiles * math.sqrt(pilot.text_variance / num_texts) > difference:
        return None
    low, high = 1, 2
    while detectable_difference(pilot, high, num_texts) > difference:
        low, high = high, 2 * high
        if high > MAX_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = middle >= 2 and detectable_difference(pilot, middle, num_texts) <= difference
        low, high = (low, middle) if is_enough else (middle, high)
    return high


def texts_needed(pilot: Pilot, difference: float) -> int:
    """Return about how many texts show a difference with a chance of 80 % if the number of seeds is no limit."""
    quantiles = normal_quantile(1 - _ALPHA / 2) + normal_quantile(_POWER)
    return math.ceil(quantiles**2 * pilot.text_variance / difference**2)
