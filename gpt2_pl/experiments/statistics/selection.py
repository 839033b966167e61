"""Scores of rows that chose no checkpoint: half-split crossing.

A run's best checkpoint, chosen on the rows on which it is scored, has an optimistic score. Here one half of the rows
chooses the checkpoint and the other half scores it, and the reverse, for several random splits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.experiments.statistics.contrast import Floats

NUM_SPLITS = 20
"""Number of random splits."""
MIN_ROWS = 50
"""With fewer rows nothing is chosen: the last checkpoint is scored."""
_EXPECTED_MAXIMUM_NODES = 20_001


class CrossedScore(NamedTuple):
    """Score of a run's best checkpoint on rows that did not choose it.

    Args:
        rows: (N,) value of each row, the mean over splits.
        apparent: mean of the checkpoint that is best on all rows, on the same rows.
        chosen: (E,) how often each checkpoint was chosen.
    """

    rows: Floats
    apparent: float
    chosen: NDArray[np.int64]

    @property
    def score(self) -> float:
        """Mean over rows."""
        return float(self.rows.mean())

    @property
    def optimism(self) -> float:
        """How far the apparent score is better than the crossed score."""
        return self.apparent - self.score


def half_splits(row_ids: Sequence[str], clusters: Sequence[int] | None = None) -> NDArray[np.bool_]:
    """Return random splits of the rows into halves, the same for all runs on the same rows.

    Args:
        row_ids: identity of each row, such as its text; their digest is the seed.
        clusters: cluster of each row; rows of a cluster stay together.

    Returns:
        (NUM_SPLITS, N), true for the rows of the first half.
    """
    digest = hashlib.sha256("\0".join(row_ids).encode("utf-8", "surrogatepass")).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    members = np.arange(len(row_ids)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    num_clusters = int(members.max()) + 1
    halves = np.zeros((NUM_SPLITS, len(row_ids)), bool)
    for split in halves:
        first = np.zeros(num_clusters, bool)
        first[generator.permutation(num_clusters)[: num_clusters // 2]] = True
        split[:] = first[members]
    return halves


def cross(values: Floats, splits: NDArray[np.bool_]) -> CrossedScore:
    """Score the best checkpoint of a run by half-split crossing.

    Args:
        values: (E, N) value of each row under each of E checkpoints, in order of training; higher is better.
        splits: (R, N) from :func:`half_splits`.

    Returns:
        The crossed score. With fewer than :data:`MIN_ROWS` rows it is that of the last checkpoint.
    """
    E, N = values.shape
    if N < MIN_ROWS:
        chosen = np.zeros(E, np.int64)
        chosen[-1] = 2 * len(splits)
        return CrossedScore(values[-1].astype(float), float(values[-1].mean()), chosen)
    rows, chosen = np.zeros(N), np.zeros(E, np.int64)
    for first in splits:
        for half in (first, ~first):
            best = int(values[:, half].mean(1).argmax())  # the earliest of equal ones
            chosen[best] += 1
            rows[~half] += values[best, ~half]
    return CrossedScore(rows / len(splits), float(values.mean(1).max()), chosen)


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
