"""Learning curves over the number of training rows, and the points where those of two strategies cross."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.differences import LEVEL, measure, without_rows
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.statistics.contrast import Arm
from gpt2_pl.experiments.statistics.crossing import cross
from gpt2_pl.experiments.tables import Table, heading
from gpt2_pl.experiments.units import Unit

CROSSING_CAPTION = (
    "Numbers of {unit} at which the {metric} of two strategies is equal, interpolated in the logarithm of the number, "
    "with 95 % confidence sets over new seeds and new texts: the numbers at which the difference is not shown to be "
    "above or below 0. An open end lies outside of the numbers that were tried. The pairs are not corrected for their "
    "number."
)
_MAX_STRATEGIES = 8  # whose pairs are all compared; of more, only those with the baseline


@dataclass(frozen=True)
class Curve:
    """Groups of one strategy with different numbers of training rows.

    Args:
        strategy: name of the strategy.
        groups: the groups by number of rows (or of shots), in ascending order.
    """

    strategy: str
    groups: dict[int, RunGroup]


@dataclass(frozen=True)
class Crossing:
    """Point where two learning curves cross, or that they do not.

    Args:
        strategies: names of both strategies.
        point: number of rows at which their scores are equal; None if one is better at every number that was tried.
        low: lower limit of the point; None if the set is open below, or without a point.
        high: upper limit of the point; None if the set is open above, or without a point.
        better: the strategy that is better below the point, and the one above it; the same without a point.
        uncertain: numbers of rows that were tried at which no difference is shown.
    """

    strategies: tuple[str, str]
    point: float | None
    low: float | None
    high: float | None
    better: tuple[str, str]
    uncertain: tuple[int, ...]

    def sentence(self, unit: str) -> str:
        """Return the result in words.

        Args:
            unit: what is counted, such as ``shots``.
        """
        if self.point is not None:
            return f"{self.better[0]} is better below, {self.better[1]} above {self.point:,.3g} {unit}."
        doubt = f"; not shown at {', '.join(f'{n:,}' for n in self.uncertain)}" if self.uncertain else ""
        return f"{self.better[0]} is better on average at every number of {unit}{doubt}."


def size_unit(comparison: Comparison) -> str:
    """Return what the sizes of :func:`curves` count: ``shots``, or ``training rows``."""
    known = [group for group in comparison.groups if group.training_rows is not None]
    return "shots" if known and all(group.shots is not None for group in known) else "training rows"


def curves(comparison: Comparison, references: bool = False) -> list[Curve]:
    """Return the learning curve of every strategy with at least two numbers of training rows.

    Of several groups of a strategy with one number of rows, such as those of two learning rates, none is on a curve.

    Args:
        comparison: the comparison.
        references: return the curves of reference baselines instead.
    """
    by_strategy: dict[str, dict[int, list[RunGroup]]] = {}
    uses_shots = size_unit(comparison) == "shots"
    for group in comparison.references if references else comparison.groups:
        size = group.shots if uses_shots else group.training_rows
        if size is not None and group.usable(comparison.primary_metric):
            by_strategy.setdefault(group.strategy, {}).setdefault(size, []).append(group)
    found = []
    for strategy, sizes in by_strategy.items():
        single = {size: groups[0] for size, groups in sorted(sizes.items()) if len(groups) == 1}
        if len(single) > 1:
            found.append(Curve(strategy, single))
    return found


def crossings(comparison: Comparison) -> list[Crossing]:
    """Return the crossing points of the learning curves of every pair of strategies, in the primary metric."""
    if not comparison.has_sizes:
        return []
    name = comparison.primary_metric
    found = curves(comparison)
    pairs = list(itertools.combinations(found, 2))
    if len(found) > _MAX_STRATEGIES:
        pairs = [
            (one, other) for one, other in pairs if comparison.groups[0].strategy in (one.strategy, other.strategy)
        ]
    return [crossing for one, other in pairs for crossing in _cross(one, other, name, comparison.unit(name))]


def _cross(one: Curve, other: Curve, name: str, unit: Unit) -> list[Crossing]:
    """Return the crossing points of two curves; none if they have fewer than two numbers of rows in common."""
    strategies = (one.strategy, other.strategy)
    sizes = [size for size in one.groups if size in other.groups]
    if len(sizes) < 2:
        return []
    arms = _arms([curve.groups[size] for curve in (one, other) for size in sizes], name, unit)
    found = cross(sizes, arms[: len(sizes)], arms[len(sizes) :], LEVEL)
    uncertain = tuple(size for size, is_shown in zip(sizes, found.is_shown, strict=True) if not is_shown)
    crossed = [
        Crossing(
            strategies, p.size, p.low, p.high, strategies if p.first_is_better_below else strategies[::-1], uncertain
        )
        for p in found.points
    ]
    best = strategies[0] if found.estimates.sum() >= 0 else strategies[1]
    return crossed or [Crossing(strategies, None, None, None, (best, best), uncertain)]


def _arms(groups: list[RunGroup], name: str, unit: Unit) -> list[Arm]:
    """Return the arms of groups, with contributions of rows if all groups have those of the same rows."""
    measured = [measure(group.usable(name), name, unit) for group in groups]
    digests = {one.digest for one in measured}
    if len(digests) == 1 and None not in digests:
        return [one.arm for one in measured]
    return [without_rows(group.usable_values(name), unit).arm for group in groups]


def crossing_caption(comparison: Comparison) -> str:
    """Return the caption of :func:`crossing_table`."""
    return CROSSING_CAPTION.format(unit=size_unit(comparison), metric=heading(comparison.primary_metric))


def crossing_table(comparison: Comparison) -> Table:
    """Return the headings and the cells of the table of crossing points."""
    unit, cells = size_unit(comparison), []
    for found in crossings(comparison):
        low, high = (("" if end is None else f"{end:,.3g}") for end in (found.low, found.high))
        point = "" if found.point is None else f"{found.point:,.3g}"
        limits = "" if found.point is None else f"{low or 'open'} to {high or 'open'}"
        cells.append([" and ".join(found.strategies), point, limits, found.sentence(unit)])
    return ["strategies", f"crossing ({unit})", "95 %", "in words"], cells
