"""Differences of strategies to reference baselines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.differences import LEVEL, measure
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.statistics.contrast import Arm, Contrast, difference, paired_difference

REFERENCE_CAPTION = (
    "Differences in {metric} to reference baselines, positive if better, each with its 95 % interval over new seeds "
    "and new texts; a deterministic reference has no variance over seeds. The first row is the score of the reference. "
    "Below: the interval is below 0. Not shown to be above: it includes 0."
)


@dataclass(frozen=True)
class Mark:
    """Difference of a strategy to a reference baseline in the primary metric.

    Args:
        contrast: the difference on the internal scale, positive if the strategy is better; None if the runs do not
            have outcomes of the same rows.
    """

    contrast: Contrast | None

    @property
    def word(self) -> str:
        """``above``, ``below``, ``not shown to be above``, or empty without an interval."""
        if self.contrast is None or not self.contrast.has_interval:
            return ""
        low, high = self.contrast.interval(LEVEL)
        return "below" if high < 0 else "above" if low > 0 else "not shown to be above"


def mark(comparison: Comparison, group: RunGroup, reference: RunGroup) -> Mark:
    """Compare a strategy with a reference baseline in the primary metric of the task."""
    name = comparison.primary_metric
    is_deterministic = reference.runs[0].record.get("seed") is None
    if is_deterministic:
        runs, of_reference = group.usable(name), reference.usable(name)
    else:
        runs, of_reference = comparison.pairs(group, reference, name)
    if not runs or not of_reference:
        return Mark(None)
    unit = comparison.unit(name)
    measured, other = measure(runs, name, unit), measure(of_reference, name, unit)
    if measured.digest is None or measured.digest != other.digest:
        return Mark(None)
    if is_deterministic:
        return Mark(difference(measured.arm, _repeated(other.arm)))
    compare = paired_difference if comparison.is_paired else difference
    return Mark(compare(measured.arm, other.arm))


def _repeated(arm: Arm) -> Arm:
    """Return a deterministic arm as if it had two seeds, which are equal."""
    if len(arm.scores) > 1:
        return arm
    return Arm(np.repeat(arm.scores, 2), np.repeat(arm.contributions, 2, axis=0))


def reference_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of the table of differences to reference baselines."""
    name = comparison.primary_metric
    unit = comparison.unit(name)
    means = [reference.mean(name) for reference in comparison.references]
    scores = ["" if mean is None or math.isnan(mean) else unit.format_score(mean) for mean in means]
    cells = [["(score)", *scores]]
    for group in comparison.groups:
        row = [group.label]
        for reference in comparison.references:
            found = mark(comparison, group, reference)
            if found.contrast is None or not found.contrast.has_interval:
                row.append("")
                continue
            estimate = unit.format_difference(found.contrast.estimate, found.contrast.num_texts)
            interval = unit.format_interval(found.contrast.interval(LEVEL), found.contrast.num_texts)
            row.append(f"{estimate} ({interval}) {'' if found.word == 'above' else found.word}".strip())
        cells.append(row)
    return ["strategy", *(reference.label for reference in comparison.references)], cells
