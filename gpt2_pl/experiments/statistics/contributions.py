r"""Contributions of single texts to a score, by deletion (the jackknife's pseudo-values).

The contribution of text i to a score :math:`\theta` is :math:`\psi_i = N\theta - (N - 1)\theta_{(-i)}`, where
:math:`\theta_{(-i)}` is the score without text i. For a mean it is the value of the text itself. Contributions make any
score a mean over texts for the purpose of estimating its variance.

Reference:
    Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 11.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.experiments.statistics.contrast import Floats

Score = Callable[[Floats], Floats]
"""Function of sums over texts (..., F) that returns scores (...)."""

_MAX_COUNTS = 2**22  # confusion counts, or ranks, that are scored at once
_TINY = 1e-20  # of a product of variances relative to the largest number; below it, one of them counts as 0

MAX_GROUPS = 200
"""Number of groups of a delete-a-group jackknife."""


def from_sums(features: Floats, score: Score) -> tuple[float, Floats]:
    """Return a score of sums over texts and the contribution of each text.

    Args:
        features: (N, F) what each text adds to the sums.
        score: maps sums (..., F) to scores (...).

    Returns:
        The score of all texts, and the contributions (N,).
    """
    total, N = features.sum(0), len(features)
    theta = float(score(total))
    without = score(total - features) if N > 1 else np.array([theta])
    return theta, N * theta - (N - 1) * without


def from_distinct(counts: Floats) -> tuple[float, Floats]:
    """Return distinct-n of all texts and the contribution of each text.

    Without a text, the n-grams that no other text has are missing from the distinct ones.

    Args:
        counts: (N, 3) counts of :func:`~gpt2_pl.text.metrics.distinct_counts`.

    Returns:
        The score of all texts, and the contributions (N,).
    """
    (total, kinds, _), N = counts.sum(0), len(counts)
    theta = float(kinds / max(total, 1))
    without = (kinds - counts[:, 2]) / np.maximum(total - counts[:, 0], 1) if N > 1 else np.array([theta])
    return theta, N * theta - (N - 1) * without


def from_confusion(
    labels: NDArray[np.integer], predictions: NDArray[np.integer], num_classes: int, score: Score
) -> tuple[float, Floats]:
    """Return a score of the confusion matrix and the contribution of each text.

    The score without a text depends only on the text's label and prediction, so at most K x K scores are computed.

    Args:
        labels: (N,) true classes.
        predictions: (N,) predicted classes.
        num_classes: number of classes K; fixed for the whole file.
        score: maps counts (..., K * K), label-major, to scores (...).

    Returns:
        The score of all texts, and the contributions (N,).
    """
    N, cells = len(labels), labels * num_classes + predictions
    counts = np.bincount(cells, minlength=num_classes**2).astype(float)
    theta = float(score(counts))
    present = np.flatnonzero(counts)
    without = np.full(num_classes**2, theta)
    step = max(1, _MAX_COUNTS // num_classes**2)
    for start in range(0, len(present) if N > 1 else 0, step):
        removed = present[start : start + step]
        fewer = np.tile(counts, (len(removed), 1))
        fewer[np.arange(len(removed)), removed] -= 1.0
        without[removed] = score(fewer)
    return theta, N * theta - (N - 1) * without[cells]


def pearson(labels: Floats, predictions: Floats) -> tuple[float, Floats]:
    """Return Pearson's correlation and the contribution of each text.

    A correlation with numbers that are all equal counts as 0.

    Args:
        labels: (N,) true numbers.
        predictions: (N,) predicted numbers.

    Returns:
        The correlation of all texts, and the contributions (N,).
    """
    x, y = labels - labels.mean(), predictions - predictions.mean()  # for precision
    x, y = x / max(np.abs(x).max(), _TINY), y / max(np.abs(y).max(), _TINY)
    features = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    return from_sums(features, _correlation)


def _correlation(sums: Floats) -> Floats:
    """Return correlations (...) from sums (..., 6) of 1, x, y, x², x y and y²."""
    n, x, y, xx, xy, yy = np.moveaxis(sums, -1, 0)
    variances = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    is_constant = variances <= _TINY * n**4
    found: Floats = np.where(is_constant, 0.0, (n * xy - x * y) / np.sqrt(np.where(is_constant, 1.0, variances)))
    return found


def spearman(labels: Floats, predictions: Floats) -> tuple[float, Floats]:
    """Return Spearman's rank correlation and the contribution of each text; equal numbers share their mean rank.

    The deletion of a text lowers the rank of every larger number by 1, and that of every equal number by 1/2.

    Args:
        labels: (N,) true numbers.
        predictions: (N,) predicted numbers.

    Returns:
        The correlation of all texts, and the contributions (N,).
    """
    from scipy.stats import rankdata

    N, columns = len(labels), (labels, predictions)
    x, y = (rankdata(column) for column in columns)
    theta, without = pearson(x, y)[0], np.empty(N)
    if N == 1:
        return theta, np.array([theta])
    step = max(1, _MAX_COUNTS // N)
    for start in range(0, N, step):
        removed = slice(start, start + step)
        rest = np.arange(N)[removed, None] != np.arange(N)  # (removed texts, N)
        fewer = [
            np.where(rest, rank - (np.sign(rank - rank[removed, None]) + 1) / 2 - N / 2, 0.0) / N for rank in (x, y)
        ]
        a, b = fewer
        sums = [rest, a, b, a * a, a * b, b * b]
        without[removed] = _correlation(np.stack([one.sum(1) for one in sums], axis=-1))
    return theta, N * theta - (N - 1) * without


def class_f1(counts: Floats) -> Floats:
    """Return the F1 of each class (..., K) from confusion counts (..., K * K); 0 for a class without rows."""
    K = round(counts.shape[-1] ** 0.5)
    matrix = counts.reshape(*counts.shape[:-1], K, K)
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    f1: Floats = 2 * hits / np.maximum(matrix.sum(-1) + matrix.sum(-2), 1)
    return f1


def macro_f1(counts: Floats) -> Floats:
    """Return macro F1 (...), the mean over all K classes, of confusion counts (..., K * K)."""
    scores: Floats = class_f1(counts).mean(-1)
    return scores


def accuracy(counts: Floats) -> Floats:
    """Return accuracy (...) of confusion counts (..., K * K)."""
    K = round(counts.shape[-1] ** 0.5)
    hits = np.trace(counts.reshape(*counts.shape[:-1], K, K), axis1=-2, axis2=-1)
    shares: Floats = hits / counts.sum(-1)
    return shares


def from_groups(num_texts: int, score: Callable[[NDArray[np.intp]], float], seed: int = 0) -> tuple[float, Floats]:
    """Return an expensive score and the contributions of at most :data:`MAX_GROUPS` random groups of texts.

    The number of groups takes the place of the number of texts in all later formulas.

    Args:
        num_texts: number of texts N.
        score: maps indices of texts to the score of those texts.
        seed: seed of the assignment to groups; use the same for all compared runs.

    Returns:
        The score of all texts, and the contributions (G,), with G the smaller of N and :data:`MAX_GROUPS`.
    """
    groups = np.array_split(np.random.default_rng(seed).permutation(num_texts), min(num_texts, MAX_GROUPS))
    return from_clusters(groups, score)


def from_clusters(clusters: list[NDArray[np.intp]], score: Callable[[NDArray[np.intp]], float]) -> tuple[float, Floats]:
    """Return a score and the contributions of clusters of texts that belong together, such as stanzas of a poem.

    Args:
        clusters: indices of the texts of each of C clusters.
        score: maps indices of texts to the score of those texts.

    Returns:
        The score of all texts, and the contributions (C,).
    """
    everything, C = np.sort(np.concatenate(clusters)), len(clusters)
    theta = float(score(everything))
    without = (
        np.array([score(np.setdiff1d(everything, cluster)) for cluster in clusters]) if C > 1 else np.array([theta])
    )
    return theta, C * theta - (C - 1) * without
