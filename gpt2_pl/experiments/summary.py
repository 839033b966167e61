"""A comparison as lines of text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.hybrids import interactions
from gpt2_pl.experiments.levels import score_interval, spread_interval
from gpt2_pl.experiments.reference_comparison import placements
from gpt2_pl.experiments.report import about, line
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.tables import (
    cost_text,
    detectable_text,
    heading,
    interval_text,
    p_text,
    verdict_counts,
)
from gpt2_pl.experiments.units import NO_DIFFERENCE

_MIN_WIDTH = 40
_COSTS = ("trials", "trainable", "training_flops", "cpu_seconds", "gpu_seconds", "peak_memory_bytes")
_COST_NAMES = {
    "trials": "{} tuning trials",
    "trainable": "{} parameters",
    "training_flops": "{} FLOPs",
    "cpu_seconds": "{} CPU minutes",
    "gpu_seconds": "{} GPU minutes",
    "peak_memory_bytes": "{} GB",
}


def summary(comparisons: list[Comparison], width: int = 80) -> str:
    """Return the primary metric of every strategy, its difference to the baseline, verdicts and notes.

    Args:
        comparisons: one for every task.
        width: maximum number of characters of a line.
    """
    lines: list[str] = []
    for comparison in comparisons:
        lines += [""] * bool(lines)
        for indent, text in _comparison_lines(comparison):
            lines += wrap_lines([text], width, indent)
    return "\n".join(lines)


def wrap_lines(texts: Iterable[str], width: int, indent: int = 0) -> list[str]:
    """Break texts into lines; all but the first of a text are indented by two more spaces.

    Args:
        texts: texts of one line, whose unprintable characters are escaped.
        width: maximum number of characters of a line.
        indent: number of spaces at the start.
    """
    start, lines = " " * indent, []
    for text in texts:
        lines += textwrap.wrap(line(text), max(width, _MIN_WIDTH), initial_indent=start,
                               subsequent_indent=start + "  ", break_on_hyphens=False)  # fmt: skip
    return lines


def _comparison_lines(comparison: Comparison) -> list[tuple[int, str]]:
    """Return lines with their indents."""
    if not comparison.groups:
        return [(0, f"{comparison.task}: no run can be compared"), *((2, note) for note in comparison.notes)]
    name = comparison.primary_metric
    better = "higher" if comparison.higher_is_better(name) else "lower"
    lines = [(0, f"{comparison.task} by {heading(name)} ({better} is better). {about(comparison)}")]
    for group in comparison.groups:
        lines += _group_lines(comparison, group)
    if len(comparison.groups) > 1:
        count, unit = len(comparison.family), comparison.unit(name)
        margin = "none declared (--margin)" if comparison.margin is None else unit.format_amount(comparison.margin)
        pairing = "seeds paired" if comparison.is_paired else "seeds not paired"
        tested = f"{count} comparison{'s' * (count != 1)}, Holm's correction; " if count else ""
        family = f"{tested}{pairing}; margin: {margin}"
        lines.append((0, f"{verdict_counts(comparison)} ({family})"))
    baseline, unit = comparison.groups[0].label, comparison.unit(name)
    lines += [(0, one.sentence(unit, baseline)) for one in interactions(comparison)]
    return [*lines, *((0, f"note: {note}") for note in comparison.notes)]


def _detectable(size: str) -> str:
    """Return the difference that could have been shown as a sentence; empty if it is not known."""
    shown = "No difference could have been shown." if size == NO_DIFFERENCE else f"Could have shown: {size}."
    return f" {shown}" if size else ""


def _group_lines(comparison: Comparison, group: RunGroup) -> list[tuple[int, str]]:
    name = comparison.primary_metric
    unit, usable, std = comparison.unit(name), group.usable(name), group.std(name)
    mean, limits = group.mean(name), score_interval(usable, name, unit)
    text = "no score" if mean is None else unit.format_score(mean)
    text += f" (95 % {interval_text(comparison, name, limits)})" if limits is not None else ""
    text += f", {len(usable)} seed{'s' * (len(usable) != 1)}"
    if std is not None:
        spread = spread_interval(group.usable_values(name), unit)
        text += f", sd over seeds {unit.format_score(std)} ({interval_text(comparison, name, spread)})"
    costs = [_COST_NAMES[cost].format(cost_text(group, cost)) for cost in _COSTS if group.cost(cost) is not None]
    baseline = " (baseline)" if comparison.is_baseline(group) else ""
    lines = [(0, f"{group.label}{baseline}: {text}"), (2, ", ".join(costs))]
    if (found := group.differences.get(name)) is not None:
        p = f"; p {p_text(found.contrast.p_value())}, Holm {p_text(found.p_adjusted)}" if found.is_tested else ""
        detectable = _detectable(detectable_text(found))
        lines += [(2, f"{found.line()}{p}"), (2, f"{found.sentence()}{detectable}")]
        lines += [(2, f"notice: {notice}") for notice in found.notices]
    lines += [(2, f"references by {placed}") for placed in placements(comparison, group)]
    return [*lines, *((2, f"notice: {notice}") for notice in group.notices)]
