"""Differences between arms over new seeds and new texts: crossed variance components with Welch-Satterthwaite t.

An arm is a fine-tuning strategy within one task. Its S training runs (seeds) are scored on the same N texts as the runs
of all other arms, so texts are crossed with seeds.

References:
    Satterthwaite (1946), An approximate distribution of estimates of variance components. Welch (1947), The
    generalization of Student's problem. Obuchowski and Rockette (1995) and Hillis (2007) for crossed random factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.experiments.statistics.distributions import t_cdf, t_quantile

Floats = NDArray[np.float64]

_ROUNDING = 1e-12  # relative to the largest contribution; smaller differences are those of floating-point sums


class Arm(NamedTuple):
    """Scores of an arm's runs and the contribution of each text to them.

    Args:
        scores: (S,) score of each run on all texts.
        contributions: (S, N) delete-one contributions; see :mod:`~gpt2_pl.experiments.statistics.contributions`.
    """

    scores: Floats
    contributions: Floats


class SeedVariance(NamedTuple):
    """Variance components of an arm over its seeds.

    Args:
        of_scores: variance of the scores over seeds, ``s2``; NaN for one seed.
        interaction: variance of the seed-by-text interaction per text, ``e2``; NaN for one seed or one text.
        of_mean: variance of the mean over seeds; 0 for one seed.
        df: degrees of freedom of ``of_mean``.
    """

    of_scores: float
    interaction: float
    of_mean: float
    df: float


@dataclass(frozen=True)
class Contrast:
    """Weighted sum of arm means, such as a difference, with its standard error.

    Args:
        estimate: the weighted sum of the mean scores.
        variance: its variance; 0 if the data show no spread.
        df: degrees of freedom of the variance (Satterthwaite), fractional.
        seed_variances: variance components of each arm; ``of_mean`` includes the squared weight.
        text_variance: the part of ``variance`` that is due to texts, ``B``.
        num_seeds: number of seeds of each arm.
        num_texts: number of texts.
        population: to what the interval generalizes: ``texts and seeds``; ``texts`` if an arm has one seed (these
            weights only); ``seeds`` if there are fewer than two texts.
        is_identical: all arms have the same outcome on every text, so the contrast is exactly 0.
    """

    estimate: float
    variance: float
    df: float
    seed_variances: tuple[SeedVariance, ...]
    text_variance: float
    num_seeds: tuple[int, ...]
    num_texts: int
    population: str
    is_identical: bool

    @cached_property
    def standard_error(self) -> float:
        """Square root of the variance."""
        return math.sqrt(self.variance)

    @property
    def has_interval(self) -> bool:
        """Whether the data show any spread; without it there is no interval and no p-value."""
        return self.variance > 0.0

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval of a level in (0, 1); NaN limits if there is no spread."""
        if not self.has_interval:
            return math.nan, math.nan
        half = t_quantile(0.5 + level / 2, self.df) * self.standard_error
        return self.estimate - half, self.estimate + half

    def p_above(self, value: float = 0.0) -> float:
        """Return the one-sided p-value of the hypothesis that the true contrast is at most ``value``."""
        if not self.has_interval:
            return math.nan
        return t_cdf((value - self.estimate) / self.standard_error, self.df)

    def p_below(self, value: float = 0.0) -> float:
        """Return the one-sided p-value of the hypothesis that the true contrast is at least ``value``."""
        if not self.has_interval:
            return math.nan
        return t_cdf((self.estimate - value) / self.standard_error, self.df)

    def p_value(self) -> float:
        """Return the two-sided p-value of the hypothesis that the true contrast is 0."""
        return 2 * min(self.p_above(), self.p_below()) if self.has_interval else math.nan

    @property
    def seed_share(self) -> float:
        """Share of the variance that is due to seeds, in [0, 1]; NaN without spread."""
        return 1.0 - self.text_variance / self.variance if self.has_interval else math.nan


def contrast(arms: Sequence[Arm], weights: Sequence[float]) -> Contrast:
    """Estimate a weighted sum of arm means over new seeds and new texts.

    The variance over seeds is estimated for each arm by itself (Welch). It cannot be below the variance that the
    seed-by-text interaction alone causes (the floor). The text part is the variance of the per-text contrast of the
    means over seeds, without the interaction, which the seed part contains.

    Args:
        arms: the arms; all have the same N texts.
        weights: weight of each arm; +1 and -1 for a difference.

    Returns:
        The contrast. Its population is ``texts`` if an arm has one seed, and ``seeds`` if N is 1.

    Raises:
        ValueError: no arm, arms of different numbers of texts, or a score that is not finite.
    """
    num_texts = {arm.contributions.shape[1] for arm in arms}
    if len(num_texts) != 1 or len(arms) != len(weights):
        raise ValueError(f"arms must have one number of texts and one weight each, got {sorted(num_texts)} texts")
    if not all(np.isfinite(arm.scores).all() and np.isfinite(arm.contributions).all() for arm in arms):
        raise ValueError("scores and contributions must be finite; leave out failed runs")
    (N,) = num_texts
    num_seeds = tuple(len(arm.scores) for arm in arms)
    estimate = float(sum(c * arm.scores.mean() for c, arm in zip(weights, arms, strict=True)))
    text_contrast = sum(c * arm.contributions.mean(0) for c, arm in zip(weights, arms, strict=True))
    rounding = _ROUNDING * max(float(np.abs(arm.contributions).max()) for arm in arms)
    estimate = 0.0 if abs(estimate) <= rounding else estimate
    text_contrast = np.where(np.abs(text_contrast) <= rounding, 0.0, text_contrast)
    seed_variances = tuple(_seed_variance(arm, c) for c, arm in zip(weights, arms, strict=True))
    has_text_spread = N > 1 and float(np.ptp(text_contrast)) > rounding
    text_variance = float(np.var(text_contrast, ddof=1)) / N if has_text_spread else 0.0
    if min(num_seeds) < 2:
        population, variance, df = "texts", text_variance, float(N - 1)
    else:
        population = "texts and seeds" if N > 1 else "seeds"
        if N > 1:
            floors = (
                c**2 * v.interaction / (N * S) for c, v, S in zip(weights, seed_variances, num_seeds, strict=True)
            )
            text_variance = max(0.0, text_variance - sum(floors))
        variance = sum(v.of_mean for v in seed_variances) + text_variance
        df = _satterthwaite([*((v.of_mean, v.df) for v in seed_variances), (text_variance, N - 1.0)])
    return Contrast(
        estimate=estimate,
        variance=variance,
        df=df,
        seed_variances=seed_variances,
        text_variance=text_variance,
        num_seeds=num_seeds,
        num_texts=N,
        population=population,
        is_identical=estimate == 0.0 and not np.any(text_contrast),
    )


def difference(arm: Arm, baseline: Arm) -> Contrast:
    """Estimate the difference of two arms whose seeds are independent: arm minus baseline."""
    return contrast([arm, baseline], [1.0, -1.0])


def paired_difference(arm: Arm, baseline: Arm) -> Contrast:
    """Estimate the difference of two arms whose seeds are paired by design: arm minus baseline.

    Pair seeds only if a seed fixes the same data order or initialization in both arms, and only if this is declared
    before looking. Ignoring a true pairing gives a wider interval, never a wrong one.

    Args:
        arm: scores and contributions of the matched seeds.
        baseline: the same of the baseline, in the same order of seeds.
    """
    pairs = Arm(arm.scores - baseline.scores, arm.contributions - baseline.contributions)
    return contrast([pairs], [1.0])


def _seed_variance(arm: Arm, weight: float) -> SeedVariance:
    S, N = arm.contributions.shape
    if S < 2:
        return SeedVariance(math.nan, math.nan, 0.0, math.nan)
    if (arm.scores == arm.scores[0]).all() and (arm.contributions == arm.contributions[0]).all():
        return SeedVariance(0.0, 0.0 if N > 1 else math.nan, 0.0, S - 1.0)
    of_scores = float(np.var(arm.scores, ddof=1))
    if N < 2:
        return SeedVariance(of_scores, math.nan, weight**2 * of_scores / S, S - 1.0)
    rows = arm.contributions
    residuals = rows - rows.mean(1, keepdims=True) - rows.mean(0) + rows.mean()
    interaction = float(np.square(residuals).sum()) / ((S - 1) * (N - 1))
    floor = interaction / N
    df = S - 1.0 if of_scores >= floor else (S - 1.0) * (N - 1)
    return SeedVariance(of_scores, interaction, weight**2 * max(of_scores, floor) / S, df)


def _satterthwaite(components: Sequence[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum of variances, each with its degrees of freedom; NaN if all are 0."""
    total = sum(variance for variance, _ in components)
    squares = sum(variance**2 / df for variance, df in components if variance > 0)
    return total**2 / squares if squares > 0 else math.nan
