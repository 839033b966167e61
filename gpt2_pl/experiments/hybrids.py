"""Interactions of combined strategies: whether the parts of a hybrid add up.

A hybrid is a strategy that combines others, such as ``lora+llrd``. With the baseline and its two parts, it is a
factorial design of two factors: strategies that were tuned by themselves take the place of cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.differences import LEVEL, measure
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.statistics.contrast import Contrast, contrast, difference
from gpt2_pl.experiments.statistics.verdicts import holm, is_assessed
from gpt2_pl.experiments.tables import p_text
from gpt2_pl.experiments.units import Unit

HYBRID_CAPTION = (
    "Interactions of combined strategies in {metric}: the change by the first part beside the second, minus its change "
    "of {baseline} alone{ratio}. Each has its 95 % interval over new seeds and new "
    "texts; seeds are not paired. p is two-sided, then corrected for {count} interaction{plural} (Holm)."
)
_Parts = tuple[RunGroup, RunGroup, RunGroup]
_MIN_SEEDS = 2


@dataclass(frozen=True)
class Interaction:
    """Interaction of the two parts of a hybrid.

    Args:
        groups: the hybrid, its first part and its second part.
        contrast: ``combined`` minus ``alone``, on the internal scale.
        alone: difference of the first part to the baseline.
        combined: difference of the hybrid to the second part.
        p_adjusted: two-sided p-value with Holm's correction for all interactions of the comparison.
    """

    groups: _Parts
    contrast: Contrast
    alone: Contrast
    combined: Contrast
    p_adjusted: float = math.nan

    def sentence(self, unit: Unit, baseline: str) -> str:
        """Return the interaction in words; it is shown if the corrected p-value is below 5 %."""
        _, first, second = (group.label for group in self.groups)
        by = "by a factor of " if unit.is_ratio else "by "
        of_second, of_baseline = (
            f"{by}{unit.format_difference(found.estimate, found.num_texts)}{unit.word}"
            for found in (self.combined, self.alone)
        )
        word = "better" if self.contrast.estimate > 0 else "worse"
        result = f"{word} than their sum" if self.p_adjusted < 1 - LEVEL else "no interaction shown"
        return f"{first} changes {second} {of_second} and {baseline} {of_baseline}: {result}."


def interactions(comparison: Comparison) -> list[Interaction]:
    """Estimate the interactions of all hybrids in the primary metric.

    Args:
        comparison: a comparison of strategies.

    Returns:
        One for every hybrid and every way to split it in two strategies that were run as well, with outcomes of the
        same rows and two seeds or more each; empty for sweeps over settings or numbers of rows.
    """
    if not comparison.groups:
        return []
    name, found = comparison.primary_metric, []
    baseline = comparison.groups[0]
    for groups in _hybrids(comparison):
        measured = [measure(group.usable(name), name, comparison.unit(name)) for group in (*groups, baseline)]
        digests = {one.digest for one in measured}
        if len(digests) > 1 or None in digests:
            continue
        both, first, second, base = (one.arm for one in measured)
        total = contrast([both, second, first, base], [1.0, -1.0, -1.0, 1.0])
        if total.has_interval:
            found.append(Interaction(groups, total, difference(first, base), difference(both, second)))
    p_values = [one.contrast.p_value() if is_assessed(one.contrast) else math.nan for one in found]
    return [replace(one, p_adjusted=p) for one, p in zip(found, holm(p_values), strict=True)]


def _hybrids(comparison: Comparison) -> Iterator[_Parts]:
    """Yield every hybrid with two strategies that it combines."""
    by_parts: dict[frozenset[str], list[RunGroup]] = {}
    for group in comparison.groups[1:]:
        by_parts.setdefault(frozenset(group.strategy.split("+")), []).append(group)
    name = comparison.primary_metric
    unique = {
        parts: groups[0]
        for parts, groups in by_parts.items()
        if len(groups) == 1 and len(groups[0].usable(name)) >= _MIN_SEEDS
    }
    if len(comparison.groups[0].usable(name)) < _MIN_SEEDS:
        return
    for parts, group in unique.items():
        ordered = list(dict.fromkeys(group.strategy.split("+")))
        for size in range(1, len(ordered) // 2 + 1):
            for chosen in itertools.combinations(ordered, size):
                rest = parts - set(chosen)
                is_repeated = 2 * size == len(ordered) and ordered[0] not in chosen
                if not is_repeated and frozenset(chosen) in unique and rest in unique:
                    yield group, unique[frozenset(chosen)], unique[rest]


def hybrid_caption(comparison: Comparison) -> str:
    """Return the caption of :func:`hybrid_table`."""
    count, metric = len(interactions(comparison)), comparison.primary_metric.partition("/")[2].replace("_", " ")
    ratio = ", as ratios: below 1 is better" if comparison.unit(comparison.primary_metric).is_ratio else ""
    plural, baseline = "s" * (count != 1), comparison.groups[0].label
    return HYBRID_CAPTION.format(metric=metric, baseline=baseline, ratio=ratio, count=count, plural=plural)


def hybrid_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of the table of interactions."""
    unit, baseline, rows = comparison.unit(comparison.primary_metric), comparison.groups[0].label, []
    for one in interactions(comparison):
        hybrid, first, second = (group.label for group in one.groups)
        estimate = unit.format_difference(one.contrast.estimate, one.contrast.num_texts)
        interval = unit.format_interval(one.contrast.interval(LEVEL), one.contrast.num_texts, reach=2.0)
        sentence = one.sentence(unit, baseline)
        rows.append([hybrid, f"{first} and {second}", estimate, interval, p_text(one.p_adjusted), sentence])
    return ["hybrid", "parts", "interaction", "95 %", "p (Holm)", "in words"], rows
