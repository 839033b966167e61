"""Statistical inference for score differences: paired bootstrap over rows and variance over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Score = Callable[[NDArray[Any]], NDArray[Any]]  # sums over rows (..., F) -> scores (...)


class EffectEstimate(NamedTuple):
    """Difference of two scores on the same rows, its confidence interval and its two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    groups: Sequence[Sequence[NDArray[Any]]], score: Score, n_resamples: int = 5_000, seed: int = 0
) -> NDArray[Any]:
    """Return the scores of groups of models on bootstrap samples of the rows, which are the same for all models.

    Reference: Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapter 13.

    Args:
        groups: for each of G groups, one array (N, F) per model with the contribution of each row to the sums from
            which scores are computed. All arrays are of the same rows.
        score: maps sums over rows (..., F) to scores (..., S).
        n_resamples: number of bootstrap samples R.
        seed: seed of the samples.

    Returns:
        Mean score of each group over its models (R, G, S).

    Raises:
        ValueError: the arrays have different numbers of rows, or none.
    """
    models = [np.asarray(model, float) for group in groups for model in group]
    N = len(models[0])
    if not N or any(len(model) != N for model in models):
        raise ValueError(
            f"all models must have the same number of rows, at least 1, got {sorted({len(m) for m in models})}"
        )
    features = np.concatenate(models, axis=1)  # (N, models x F)
    generator = np.random.default_rng(seed)
    step = max(1, min(n_resamples, 4_000_000 // N))
    scores = []
    for start in range(0, n_resamples, step):
        n = min(step, n_resamples - start)
        indices = generator.integers(0, N, (n, N)) + N * np.arange(n)[:, None]
        counts = np.bincount(indices.ravel(), minlength=n * N).reshape(n, N)  # occurrences of each row in each sample
        scores.append(score((counts @ features).reshape(n, len(models), -1)))
    model_scores = np.concatenate(scores)  # (R, models, S)
    ends = np.cumsum([len(group) for group in groups])
    group_slices = [slice(end - len(group), end) for group, end in zip(groups, ends, strict=True)]
    return np.stack([model_scores[:, models_of_group].mean(1) for models_of_group in group_slices], 1)


def seed_noise(groups: Sequence[NDArray[Any]], n_draws: int, seed: int = 0) -> NDArray[Any] | None:
    """Draw deviations of a score's mean over seeds from its expectation, with Student's t distribution.

    The variance over seeds is pooled over groups, as in an analysis of variance, because it cannot be estimated well
    from the few seeds of one group. Added to bootstrap samples over rows, the deviations give an interval over texts
    and seeds.

    Args:
        groups: scores (n, S) of the n seeds of each group.
        n_draws: number of draws R.
        seed: seed of the draws.

    Returns:
        Deviations (R, S) for one seed; None if no group has two seeds. For the mean of n seeds, divide them by the
        square root of n. For the difference of the means of n and m seeds, multiply them by sqrt(1/n + 1/m).
    """
    freedom = sum(len(scores) - 1 for scores in groups)
    if freedom == 0:
        return None
    squares = sum(((scores - scores.mean(0)) ** 2).sum(0) for scores in groups)
    return np.sqrt(squares / freedom) * np.random.default_rng(seed).standard_t(freedom, (n_draws, 1))


def percentile_interval(mean: float, draws: NDArray[Any], confidence: float = 0.95) -> EffectEstimate:
    """Return a difference with the percentile interval and the two-sided p-value of its draws (R,).

    Args:
        mean: the difference.
        draws: bootstrap samples of the difference.
        confidence: level of the interval, in (0, 1).
    """
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    p = min(1.0, 2 * min(float(np.mean(draws <= 0)), float(np.mean(draws >= 0))))
    return EffectEstimate(float(mean), float(low), float(high), float(p))


def loss_scores(sums: NDArray[Any]) -> NDArray[Any]:
    """Compute loss per token and perplexity (..., 2) from sums of losses and of numbers of tokens (..., 2)."""
    loss = sums[..., 0] / sums[..., 1]
    return np.stack([loss, np.exp(loss)], -1)


def confusion_scores(sums: NDArray[Any]) -> NDArray[Any]:
    """Compute accuracy, macro F1 and F1 of class 1 (..., 3) from confusion counts.

    As in torchmetrics, macro F1 is the mean over classes that occur as a label or a prediction.

    Args:
        sums: (..., K * K), counts of each label (major axis) and prediction (minor axis).
    """
    K = round(sums.shape[-1] ** 0.5)
    counts = sums.reshape(*sums.shape[:-1], K, K)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)  # (..., K)
    labels_plus_predictions = counts.sum(-1) + counts.sum(-2)
    f1 = 2 * hits / np.maximum(labels_plus_predictions, 1)
    seen = labels_plus_predictions > 0
    return np.stack([hits.sum(-1) / counts.sum((-2, -1)), f1.sum(-1) / seen.sum(-1), f1[..., 1]], -1)
