"""Scores of rows that chose no checkpoint: half-split crossing.

A run's best checkpoint, chosen on the rows on which it is scored, has an optimistic score. Here one half of the rows
chooses the checkpoint and the other half scores it, and the reverse, for several random splits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.experiments.statistics.contrast import Floats

NUM_SPLITS = 20
"""Number of random splits."""
MIN_ROWS = 50
"""With fewer rows nothing is chosen: the last checkpoint is scored."""
_EXPECTED_MAXIMUM_NODES = 20_001


def half_splits(digest: str, num_rows: int, clusters: Sequence[int] | None = None) -> NDArray[np.bool_]:
    """Return random splits of the rows into halves, the same for all runs on the same rows.

    Args:
        digest: digest of the rows; it is the seed.
        num_rows: number of rows N.
        clusters: cluster of each row; rows of a cluster stay together.

    Returns:
        (NUM_SPLITS, N), true for the rows of the first half.
    """
    seed = hashlib.sha256(digest.encode("utf-8", "surrogatepass")).digest()
    generator = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    members = np.arange(num_rows) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    num_clusters = int(members.max()) + 1
    halves = np.zeros((NUM_SPLITS, num_rows), bool)
    for split in halves:
        first = np.zeros(num_clusters, bool)
        first[generator.permutation(num_clusters)[: num_clusters // 2]] = True
        split[:] = first[members]
    return halves


def choose(goodness: Callable[[NDArray[np.bool_]], Floats], splits: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Choose the best checkpoint of a run on each half of each split.

    Args:
        goodness: maps a half (N,), true for its rows, to the score (E,) of each of E checkpoints on these rows, in
            order of training; higher is better, NaN is worst.
        splits: (R, N) from :func:`half_splits`.

    Returns:
        (R, 2), the earliest of the best checkpoints on the first and on the second half. With fewer than
        :data:`MIN_ROWS` rows it is the last checkpoint.
    """
    chosen = np.zeros((len(splits), 2), np.intp)
    for i, first in enumerate(splits):
        for j, half in enumerate((first, ~first)):
            scores = goodness(half)
            has_choice = splits.shape[1] >= MIN_ROWS
            chosen[i, j] = np.nan_to_num(scores, nan=-np.inf).argmax() if has_choice else len(scores) - 1
    return chosen


def cross(values: NDArray[Any], first: NDArray[np.bool_], chosen: NDArray[np.intp]) -> NDArray[Any]:
    """Return for each row its value under the checkpoint that the other half of a split has chosen.

    Args:
        values: (E, N, ...) value of each row under each checkpoint.
        first: (N,), true for the rows of the first half.
        chosen: (2,) the checkpoints that the first and the second half have chosen.

    Returns:
        (N, ...)
    """
    mask = first.reshape(-1, *[1] * (values.ndim - 2))
    return np.where(mask, values[chosen[1]], values[chosen[0]])


def expected_optimism(values: Floats) -> float:
    """Return an upper figure of the optimism of the best checkpoint, by the rule of thumb 0.7 m sqrt(q / N).

    ``q`` is the mean share of rows on which two checkpoints disagree and ``m`` is the expected maximum of as many
    standard normals as there are checkpoints.

    Args:
        values: (E, N) outcome 0 or 1 of each row under each checkpoint.
    """
    E, N = values.shape
    if E < 2:
        return 0.0
    pairs = [float(np.mean(values[i] != values[j])) for i in range(E) for j in range(i)]
    return 0.7 * expected_maximum(E) * math.sqrt(float(np.mean(pairs)) / N)


def expected_maximum(count: int) -> float:
    """Return the expected maximum of independent standard normals."""
    x = np.linspace(-8.0, 8.0, _EXPECTED_MAXIMUM_NODES)
    cdf = np.array([0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in x])
    return float(np.trapezoid((x > 0) - cdf**count, x))
