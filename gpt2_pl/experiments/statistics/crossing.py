"""Points where the learning curves of two arms cross, with confidence sets.

Between two sizes of the training set, the score of an arm is interpolated linearly in the logarithm of the size. The
difference of two arms is then a contrast of at most four arms at every size. The confidence set of a crossing point
holds the sizes at which the interval of this contrast includes 0.

Reference:
    Fieller (1954), Some problems in interval estimation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.experiments.statistics.contrast import Arm, Contrast, Floats, contrast

_STEPS = 40  # of the size between two neighbouring sizes


class Point(NamedTuple):
    """Crossing point.

    Args:
        size: the size at which both arms have the same score.
        low: lower limit of the confidence set; None if it is open at the smallest size.
        high: upper limit of the confidence set; None if it is open at the largest size.
        first_is_better_below: whether the first arm is better below the point, and the second above it.
    """

    size: float
    low: float | None
    high: float | None
    first_is_better_below: bool


class Curves(NamedTuple):
    """Comparison of two learning curves.

    Args:
        points: the crossing points in ascending order.
        estimates: difference of the arms at every size, first minus second.
        is_shown: whether the interval of the difference excludes 0, at every size.
    """

    points: list[Point]
    estimates: Floats
    is_shown: list[bool]


def cross(sizes: Sequence[int], first: Sequence[Arm], second: Sequence[Arm], level: float = 0.95) -> Curves:
    """Find the points where two learning curves cross.

    Args:
        sizes: at least two sizes of the training set, in ascending order.
        first: the first arm with every size.
        second: the second arm with every size.
        level: confidence level.
    """
    x = np.log(sizes)
    parts = [np.linspace(low, high, _STEPS, endpoint=False) for low, high in pairwise(x)]
    positions = np.concatenate([*parts, x[-1:]])
    limits = np.array([_difference(x, first, second, position).interval(level) for position in positions])
    is_shown = (limits[:, 0] > 0) | (limits[:, 1] < 0)  # an undefined interval shows nothing
    estimates = np.array([a.scores.mean() - b.scores.mean() for a, b in zip(first, second, strict=True)])
    points = []
    for i in np.flatnonzero(np.sign(estimates[:-1]) * np.sign(estimates[1:]) < 0):
        fraction = estimates[i] / (estimates[i] - estimates[i + 1])
        position = float(x[i] + (x[i + 1] - x[i]) * fraction)
        low, high = _set_around(positions, is_shown, position)
        points.append(Point(math.exp(position), low, high, bool(estimates[i] > 0)))
    return Curves(points, estimates, is_shown[::_STEPS].tolist())


def _difference(x: Floats, first: Sequence[Arm], second: Sequence[Arm], position: float) -> Contrast:
    """Return the difference of two interpolated arms, first minus second, at a position of the logarithmic axis."""
    i = min(int(np.searchsorted(x, position, side="right")) - 1, len(x) - 2)
    t = (position - x[i]) / (x[i + 1] - x[i])
    weighted = [(first[i], 1 - t), (second[i], t - 1), (first[i + 1], t), (second[i + 1], -t)]
    used = [(arm, weight) for arm, weight in weighted if weight]
    return contrast([arm for arm, _ in used], [weight for _, weight in used])


def _set_around(positions: Floats, is_shown: NDArray[np.bool_], position: float) -> tuple[float | None, float | None]:
    """Return the limits of the confidence set that contains a position; None for an open end."""
    i = int(np.searchsorted(positions, position))
    below = next((float(positions[j]) for j in range(i - 1, -1, -1) if is_shown[j]), None)
    above = next((float(positions[j]) for j in range(i, len(positions)) if is_shown[j]), None)
    return (None if below is None else math.exp(below)), (None if above is None else math.exp(above))
