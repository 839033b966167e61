"""The tables of a comparison: headings and cells as text."""

from __future__ import annotations

import math

from gpt2_pl.experiments.comparison import Comparison, RunGroup
from gpt2_pl.experiments.inference import EffectEstimate

Table = tuple[list[str], list[list[str]]]
"""Headings, and rows of cells."""

COSTS = {  # name -> heading, divisor, digits
    "trainable": ("trainable", 1, 0),
    "checkpoint_bytes": ("checkpoint, MB", 1e6, 1),
    "examples_per_second": ("examples/s", 1, 1),
    "peak_memory_bytes": ("peak memory, GB", 1e9, 2),
    "seconds": ("minutes", 60, 1),
    "cpu_seconds": ("CPU minutes", 60, 1),
    "seconds_to_best": ("minutes to best", 60, 1),
}
SCORE_CAPTION = (
    "Scores are those of the epoch best by {monitor}: means over seeds ± standard deviation, shares in percent. Costs "
    "are medians over seeds."
)
DIFFERENCE_CAPTION = (
    "Differences to {baseline}, each with its 95 % interval and two-sided p. Over texts: a paired bootstrap of the "
    "evaluated rows, which shows how sure the difference of these trained models is. Over texts and seeds: Student's t "
    "with the standard deviation over seeds pooled over strategies, which shows how sure the difference of the "
    "strategies is."
)
SUMMARY_CAPTION = (
    "Cheapest is the strategy that trains the fewest parameters of those that are not shown to be worse than the "
    "baseline (95 %, over texts and seeds). Differences are to the baseline."
)


def score_table(comparison: Comparison) -> Table:
    """Return the scores and the costs of every strategy."""
    names = comparison.scores()
    headings = ["strategy", "seeds", *(_heading(name) for name in names)]
    has_best = any(len(group.runs) > 1 for group in comparison.groups)
    headings += [*(["best seed"] if has_best else []), *(heading for heading, _, _ in COSTS.values())]
    cells = []
    for group in comparison.groups:
        row = [group.label, str(len(group.runs)), *(_score(comparison, group, name) for name in names)]
        row += [_best(comparison, group)] if has_best else []
        row += [_number(group.cost(name), divisor, digits) for name, (_, divisor, digits) in COSTS.items()]
        cells.append(row)
    return headings, cells


def difference_table(comparison: Comparison) -> Table:
    """Return the differences to the baseline; without rows if no run has outcomes of single rows."""
    names = list(dict.fromkeys(name for group in comparison.groups for name in group.over_texts))
    headings = ["strategy"]
    for name in names:
        headings += [f"{_heading(name)}: difference over texts", "over texts and seeds"]
    cells = []
    for group in comparison.groups[1:]:
        row = [group.label]
        for name in names:
            row.append(_difference(comparison, group.over_texts.get(name), name, True))
            row.append(_difference(comparison, group.over_seeds.get(name), name, False))
        cells.append(row)
    return headings, cells if names else []


def summary_table(comparisons: list[Comparison]) -> Table:
    """Return the baseline, the best and the cheapest strategy of every task."""
    headings = ["task", "by", "baseline", "best", "cheapest not shown to be worse"]
    cells = []
    for comparison in comparisons:
        if comparison.groups:
            chosen = (comparison.groups[0], comparison.best(), comparison.cheapest())
            texts = ["not known" if group is None else _summary(comparison, group) for group in chosen]
            cells.append([comparison.task, _heading(comparison.primary_metric), *texts])
    return headings, cells


def _heading(name: str) -> str:
    return name.replace("val/", "").replace("_", " ")


def _scaled(comparison: Comparison, name: str, value: float) -> str:
    if comparison.metric(name).get("percent"):
        return f"{100 * value:.1f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _score(comparison: Comparison, group: RunGroup, name: str) -> str:
    mean, std = group.mean(name), group.std(name)
    if mean is None:
        return ""
    return _scaled(comparison, name, mean) + (f" ± {_scaled(comparison, name, std)}" if std is not None else "")


def _best(comparison: Comparison, group: RunGroup) -> str:
    name = comparison.primary_metric
    values = group.values(name)
    return _scaled(comparison, name, (max if comparison.higher_is_better(name) else min)(values)) if values else ""


def _difference(comparison: Comparison, estimate: EffectEstimate | None, name: str, with_mean: bool) -> str:
    if estimate is None:
        return ""
    mean, low, high = (_scaled(comparison, name, value) for value in estimate[:3])
    signed = ["+" * (not text.startswith("-")) + text for text in (mean, low, high)]
    p = f"p {estimate.p:.3f}" if estimate.p >= 0.001 else "p < 0.001"
    return f"{signed[0] + ' ' if with_mean else ''}[{signed[1]}, {signed[2]}], {p}"


def _number(value: float | None, divisor: float, digits: int) -> str:
    return "" if value is None else f"{value / divisor:,.{digits}f}"


def _summary(comparison: Comparison, group: RunGroup) -> str:
    """Return the score, the difference to the baseline and the cost of a strategy."""
    name, first = comparison.primary_metric, comparison.groups[0]
    text = f"{group.label}: {_score(comparison, group, name)}"
    estimate = group.over_seeds.get(name, group.over_texts.get(name))
    if estimate is not None:
        text += f", {_difference(comparison, estimate, name, True)}"
        text += "" if name in group.over_seeds else " over texts"
    share = (group.cost("trainable") or 0.0) / (first.cost("total") or math.inf)
    minutes = group.cost("cpu_seconds")
    return f"{text}; {share:.1%} of the parameters" + ("" if minutes is None else f", {minutes / 60:.1f} CPU minutes")
