"""Effects of the factors of a factorial design, and their interactions, with intervals.

An effect is a contrast of unweighted means of cells, with the variance of each cell's own runs; no model is fitted. It
is about new seeds and new texts, like the differences of strategies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.differences import LEVEL, measure
from gpt2_pl.experiments.statistics.contrast import Arm, Contrast, contrast
from gpt2_pl.experiments.statistics.verdicts import holm, is_assessed
from gpt2_pl.experiments.units import Unit

EFFECT_CAPTION = (
    "Effects of the factors: differences of unweighted means of all combinations, and for two factors the difference "
    "of two such differences, with 95 % intervals over new seeds and new texts. p is corrected (Holm) within the "
    "effects of one factor and within those of two."
)

Cell = tuple[str, ...]
"""Level of each factor."""


@dataclass(frozen=True)
class Effect:
    """Effect of a level of a factor, or interaction of the levels of two factors.

    A main effect is the mean over the other factors of the difference of the level to the first level. An interaction
    is the difference of two effects: that of the first factor's level with, minus without, the second factor's level.

    Args:
        factors: one factor, or two.
        levels: level of each factor.
        references: first level of each factor.
        contrast: the estimate; None if it cannot be estimated.
        reason: why not; empty if it can.
        p_adjusted: two-sided p-value with Holm's correction, in the family of main effects or of interactions.
    """

    factors: tuple[str, ...]
    levels: tuple[str, ...]
    references: tuple[str, ...]
    contrast: Contrast | None
    reason: str = ""
    p_adjusted: float = math.nan

    @property
    def name(self) -> str:
        """The effect in words, such as ``adapter: lora, not none``."""
        parts = zip(self.factors, self.levels, self.references, strict=True)
        named = [f"{factor}: {level}, not {reference}" for factor, level, reference in parts]
        return " x ".join(named)

    def interval_text(self, unit: Unit) -> str:
        """Format the interval; empty without an estimate."""
        if self.contrast is None:
            return ""
        reach = float(len(self.factors))  # an interaction is a difference of differences
        return unit.format_interval(self.contrast.interval(LEVEL), self.contrast.num_texts, reach)

    def sentence(self, unit: Unit) -> str:
        """Return the effect as a sentence with its interval."""
        if self.contrast is None or not self.contrast.has_interval:
            return f"{self.name}: cannot be estimated ({self.reason or 'no spread'})."
        amount = unit.format_difference(self.contrast.estimate, self.contrast.num_texts) + unit.word
        interval = self.interval_text(unit)
        if len(self.factors) == 1:
            return f"{self.levels[0]} instead of {self.references[0]} changes the score by {amount} ({interval})."
        one, other = self.levels
        return f"The effect of {one} differs by {amount} ({interval}) between {other} and {self.references[1]}."


def factor_effects(comparison: Comparison) -> list[Effect]:
    """Estimate the main effects and the interactions of two factors in the primary metric.

    The levels of the baseline are the first levels.

    Args:
        comparison: a comparison whose runs come from a sweep with ``factors``.

    Returns:
        The main effects, then the interactions; empty without factors. An effect that needs a missing cell, a cell of
        one seed, or a cell without the outcomes of the same rows, has no contrast.
    """
    groups = [group for group in comparison.groups if group.runs and group.runs[0].levels]
    if not groups or not comparison.groups[0].runs[0].levels:
        return []
    factors = tuple(comparison.groups[0].runs[0].levels)
    first = tuple(comparison.groups[0].runs[0].levels.values())
    name = comparison.primary_metric
    cells: dict[Cell, Arm] = {}
    digests = set()
    for group in groups:
        levels, usable = group.runs[0].levels, group.usable(name)
        if tuple(levels) == factors and usable:
            measured = measure(usable, name, comparison.unit(name))
            cells[tuple(levels.values())] = measured.arm
            digests.add(measured.digest)
    if len(digests) > 1 or None in digests:
        return []
    others = [
        [reference, *dict.fromkeys(cell[i] for cell in cells if cell[i] != reference)]
        for i, reference in enumerate(first)
    ]
    main = [_effect(cells, factors, others, {i: level}) for i in range(len(factors)) for level in others[i][1:]]
    interactions = [
        _effect(cells, factors, others, {i: one, j: other})
        for i, j in itertools.combinations(range(len(factors)), 2)
        for one in others[i][1:]
        for other in others[j][1:]
    ]
    return [*_adjusted(main), *_adjusted(interactions)]


def _effect(
    cells: Mapping[Cell, Arm], factors: tuple[str, ...], levels: list[list[str]], changed: Mapping[int, str]
) -> Effect:
    """Estimate the effect of the changed levels, averaged over the levels of the other factors.

    Args:
        cells: runs of each cell.
        factors: names of the factors.
        levels: levels of each factor, its first level first.
        changed: level of one or two factors, by index.
    """
    names, references = tuple(factors[i] for i in changed), tuple(levels[i][0] for i in changed)
    choices = [[changed[i], levels[i][0]] if i in changed else levels[i] for i in range(len(factors))]
    weights = {}
    for cell in itertools.product(*choices):
        sign = math.prod(1 if cell[i] == level else -1 for i, level in changed.items())
        weights[cell] = float(sign)
    size = len(weights) / 2 ** len(changed)
    arms = {cell: cells.get(cell) for cell in weights}
    missing = ["+".join(cell) for cell, arm in arms.items() if arm is None]
    single = ["+".join(cell) for cell, arm in arms.items() if arm is not None and len(arm.scores) < 2]
    reason = f"no run of {missing[0]}" if missing else f"one seed of {single[0]}" if single else ""
    if reason:
        return Effect(names, tuple(changed.values()), references, None, reason)
    found = contrast([cells[cell] for cell in weights], [weight / size for weight in weights.values()])
    return Effect(names, tuple(changed.values()), references, found)


def _adjusted(effects: list[Effect]) -> list[Effect]:
    """Return the effects of one family with Holm's correction."""
    p_values = [e.contrast.p_value() if e.contrast and is_assessed(e.contrast) else math.nan for e in effects]
    return [replace(effect, p_adjusted=p) for effect, p in zip(effects, holm(p_values), strict=True)]


def effect_table(comparison: Comparison, effects: list[Effect]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of the table of effects."""
    unit = comparison.unit(comparison.primary_metric)
    rows = []
    for effect in effects:
        found = effect.contrast
        if found is None or not found.has_interval:
            rows.append([effect.name, "", "", "", effect.reason or "no spread"])
            continue
        estimate = unit.format_difference(found.estimate, found.num_texts)
        interval = effect.interval_text(unit)
        p = "" if math.isnan(effect.p_adjusted) else f"{effect.p_adjusted:.3g}"
        rows.append([effect.name, estimate, interval, p, effect.sentence(unit)])
    return ["effect", "estimate", "95 %", "p (Holm)", "in words"], rows
