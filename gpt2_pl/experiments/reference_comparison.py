"""Differences of strategies to reference baselines."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.differences import LEVEL, measure
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.statistics.contrast import Arm, Contrast, difference, paired_difference
from gpt2_pl.experiments.units import Unit

REFERENCE_CAPTION = (
    "Differences in {metric} to reference baselines, positive if better, each with its 95 % interval over new seeds "
    "and new texts; a deterministic reference has no variance over seeds. The first row is the score of the reference. "
    "Below: the interval is below 0. Not shown to be above: it includes 0."
)
TEXT_REFERENCE_CAPTION = (
    "Differences to texts that no model has generated, positive if better, each with its 95 % interval over new seeds "
    "and new texts. The first row of a score is that of the texts, of random ones the mean ± standard deviation over "
    "draws. Below: the interval is below 0. Not shown to be above: it includes 0."
)


_WORDS = ("above", "not shown to be above", "below")


@dataclass(frozen=True)
class Mark:
    """Difference of a strategy to a reference baseline in a score.

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


def mark(comparison: Comparison, group: RunGroup, reference: RunGroup, name: str | None = None) -> Mark:
    """Compare a strategy with a reference baseline in a score, by default the primary metric of the task.

    The seeds of trained references are paired if those of the strategies are; draws of random texts never are.
    """
    name = name or comparison.primary_metric
    is_deterministic = reference.runs[0].record.get("seed") is None
    is_paired = comparison.is_paired and not is_deterministic and bool(reference.usable(comparison.primary_metric))
    runs, of_reference = group.usable(name), reference.usable(name)
    if is_paired:
        runs, of_reference = comparison.pairs(group, reference, name)
    if not runs or not of_reference:
        return Mark(None)
    unit = comparison.unit(name)
    measured, other = measure(runs, name, unit), measure(of_reference, name, unit)
    if measured.digest is None or measured.digest != other.digest:
        return Mark(None)
    if is_deterministic:
        return Mark(difference(measured.arm, _repeated(other.arm)))
    compare = paired_difference if is_paired else difference
    return Mark(compare(measured.arm, other.arm))


def _repeated(arm: Arm) -> Arm:
    """Return a deterministic arm as if it had two seeds, which are equal."""
    if len(arm.scores) > 1:
        return arm
    return Arm(np.repeat(arm.scores, 2), np.repeat(arm.contributions, 2, axis=0))


def reference_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the table of differences in the primary metric to the references that have it."""
    references = [one for one in comparison.references if one.usable(comparison.primary_metric)]
    cells = _rows(comparison, comparison.primary_metric, references)
    return ["strategy", *(reference.label for reference in references)], cells


def text_reference_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the table of differences to references without the primary metric, such as a text without perplexity.

    Strategies are compared with them in all scores of the split that they have and that have a direction.
    """
    references = _text_references(comparison)
    cells = []
    for name, _ in _text_scores(comparison):
        shown = name.partition("/")[2].replace("_", " ")
        cells += [[shown, *row] for row in _rows(comparison, name, references)]
    return ["score", "strategy", *(reference.label for reference in references)], cells


def _text_references(comparison: Comparison) -> list[RunGroup]:
    """Return the references without the primary metric."""
    return [one for one in comparison.references if not one.usable(comparison.primary_metric)]


def _text_scores(comparison: Comparison) -> list[tuple[str, list[RunGroup]]]:
    """Return the scores of the compared split that texts have and that have a direction, and the texts that do."""
    found = []
    for name in comparison.scores():
        has_direction = comparison.metric(name).get("higher_is_better", True) is not None
        references = [one for one in _text_references(comparison) if one.usable(name)]
        if name.startswith(f"{comparison.split}/") and has_direction and references:
            found.append((name, references))
    return found


def placements(comparison: Comparison, group: RunGroup) -> list[str]:
    """Return for every score that references have which of them a strategy is above and below, as lines of text."""
    primary, lines = comparison.primary_metric, []
    references = [one for one in comparison.references if one.usable(primary)]
    scores = [(primary, references), *_text_scores(comparison)]
    for name, with_score in scores:
        labels: dict[str, list[str]] = defaultdict(list)
        for reference in with_score:
            labels[mark(comparison, group, reference, name).word].append(reference.label)
        found = [f"{word} {', '.join(labels[word])}" for word in _WORDS if labels[word]]
        lines += [f"{name.partition('/')[2].replace('_', ' ')}: {'; '.join(found)}"] if found else []
    return lines


def _rows(comparison: Comparison, name: str, references: list[RunGroup]) -> list[list[str]]:
    """Return the scores of references, and below them the differences of every strategy."""
    unit, scores = comparison.unit(name), []
    for reference in references:
        mean, std = reference.mean(name), reference.std(name)
        shown = "" if mean is None or math.isnan(mean) else unit.format_score(mean)
        scores.append(shown if std is None else f"{shown} ± {unit.format_score(std)}")
    cells = [["(score)", *scores]]
    for group in comparison.groups:
        marks = [mark(comparison, group, reference, name) for reference in references]
        cells.append([group.label, *(_cell(unit, found) for found in marks)])
    return cells


def _cell(unit: Unit, found: Mark) -> str:
    if found.contrast is None or not found.contrast.has_interval:
        return ""
    estimate = unit.format_difference(found.contrast.estimate, found.contrast.num_texts)
    interval = unit.format_interval(found.contrast.interval(LEVEL), found.contrast.num_texts)
    return f"{estimate} ({interval}) {'' if found.word == 'above' else found.word}".strip()
