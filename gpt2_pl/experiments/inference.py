"""Whether one result is better than another, or only luckier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Score = Callable[[NDArray[Any]], NDArray[Any]]  # sums over rows (..., F) -> scores (...)


class EffectEstimate(NamedTuple):
    """A difference of two scores of the same rows, its interval, and how likely so large a one is by chance."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    groups: Sequence[Sequence[NDArray[Any]]], score: Score, n_resamples: int = 5_000, seed: int = 0
) -> NDArray[Any]:
    """Scores of groups of models over rows drawn again with replacement, the same draws for all: a paired bootstrap
    (Efron & Tibshirani 1993, chapter 13).

    Args:
        groups: of every group one array (N, F) for each of its models: what every row adds to the sums that scores are
            made of. All are of the same rows.
        score: from sums over rows (..., F) to scores (..., S).
        n_resamples: how often the rows are drawn, R.
        seed: of the draws.

    Returns:
        Each group's mean over its models (R, G, S).

    Raises:
        ValueError: arrays of different or no rows.
    """
    models = [np.asarray(model, float) for group in groups for model in group]
    N = len(models[0])
    if not N or any(len(model) != N for model in models):
        raise ValueError(
            f"the models are of {sorted({len(m) for m in models})} rows; they must be of the same, one or more"
        )
    features = np.concatenate(models, axis=1)  # (N, models x F)
    generator = np.random.default_rng(seed)
    step = max(1, min(n_resamples, 4_000_000 // N))
    scores = []
    for start in range(0, n_resamples, step):
        n = min(step, n_resamples - start)
        drawn = generator.integers(0, N, (n, N)) + N * np.arange(n)[:, None]
        times = np.bincount(drawn.ravel(), minlength=n * N).reshape(n, N)  # how often each row was drawn
        scores.append(score((times @ features).reshape(n, len(models), -1)))
    of_models = np.concatenate(scores)  # (R, models, S)
    ends = np.cumsum([len(group) for group in groups])
    return np.stack([of_models[:, end - len(group) : end].mean(1) for group, end in zip(groups, ends, strict=True)], 1)


def seed_noise(groups: Sequence[NDArray[Any]], n_draws: int, seed: int = 0) -> NDArray[Any] | None:
    """How far the mean of a few seeds may lie from that of all seeds, by Student's t.

    The spread over seeds is pooled over groups, as in an analysis of variance: three seeds alone hardly say how large
    it is. Added to the draws of a bootstrap over rows it makes an interval over texts and seeds.

    Args:
        groups: the scores (n, S) of each group's n seeds.
        n_draws: R.
        seed: of the draws.

    Returns:
        (R, S) for the mean of one seed: divide by the root of how many there are; of a difference of two groups'
        means, multiply by the root of 1/n + 1/m. None where no group has two seeds.
    """
    freedom = sum(len(scores) - 1 for scores in groups)
    if freedom == 0:
        return None
    squares = sum(((scores - scores.mean(0)) ** 2).sum(0) for scores in groups)
    return np.sqrt(squares / freedom) * np.random.default_rng(seed).standard_t(freedom, (n_draws, 1))


def percentile_interval(mean: float, draws: NDArray[Any], confidence: float = 0.95) -> EffectEstimate:
    """A difference with the percentile interval and the two-sided p of its draws (R,)."""
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    p = min(1.0, 2 * min(float(np.mean(draws <= 0)), float(np.mean(draws >= 0))))
    return EffectEstimate(float(mean), float(low), float(high), float(p))


def loss_scores(sums: NDArray[Any]) -> NDArray[Any]:
    """Loss per token and perplexity (..., 2), from losses and numbers of tokens (..., 2)."""
    loss = sums[..., 0] / sums[..., 1]
    return np.stack([loss, np.exp(loss)], -1)


def confusion_scores(sums: NDArray[Any]) -> NDArray[Any]:
    """Accuracy, macro F1 and the F1 of class 1 (..., 3), from confusion counts (..., K * K): by label, then prediction.

    A class that is neither said nor true does not count in macro F1, as in torchmetrics.
    """
    K = round(sums.shape[-1] ** 0.5)
    counts = sums.reshape(*sums.shape[:-1], K, K)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)  # (..., K)
    said_or_true = counts.sum(-1) + counts.sum(-2)
    f1 = 2 * hits / np.maximum(said_or_true, 1)
    seen = said_or_true > 0
    return np.stack([hits.sum(-1) / counts.sum((-2, -1)), f1.sum(-1) / seen.sum(-1), f1[..., 1]], -1)
