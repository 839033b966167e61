"""The tables of a comparison: headings and cells as text."""

from __future__ import annotations

import math

import numpy as np

from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.costs import COSTS, format_cost
from gpt2_pl.experiments.differences import Difference
from gpt2_pl.experiments.levels import collapse_text, score_interval, spread_interval
from gpt2_pl.experiments.run_group import RunGroup

Table = tuple[list[str], list[list[str]]]
"""Headings, and rows of cells."""

SCORE_CAPTION = (
    "Scores are those of the epoch best by {monitor}: means over seeds ± standard deviation, shares in percent."
)
COST_CAPTION = "Costs are medians over seeds. Tuning is the search that chose the settings of a strategy."
ARM_CAPTION = (
    "The {metric} of every strategy with its 95 % interval over new seeds and new texts (of one run: over new texts), "
    "its standard deviation over seeds with the 95 % interval of that, and the runs that collapsed: far below their "
    "strategy."
)
DIFFERENCE_CAPTION = (
    "Differences in {metric} to {baseline}{sign}. Each has its 95 % interval over new seeds and new texts: variances "
    "over seeds{welch}, over texts, and of seeds with texts; Student's t with Satterthwaite's "
    "degrees of freedom. {pairing}{tests}"
)
TEST_CAPTION = (
    "The wider intervals cover all of them together. p is two-sided, then corrected for {count} comparison{plural} "
    "(Holm). Verdicts use the corrected p{margin}. Detectable is the true difference that such runs show with a chance "
    "of 80 %."
)
SECONDARY_CAPTION = (
    "Differences in other scores, positive if better than {baseline} (of scores without a direction: if higher), with "
    "the 95 % interval of each. They are descriptive: no correction, no verdict. Intervals in brackets are of scores "
    "without rows, about new seeds and these very texts."
)
SELECTION_CAPTION = (
    "Selection of the epoch by {monitor}: the {metric} of the best epoch, the same on rows that did not choose it "
    "(half-splits), and their difference, the optimism of the former. Chosen is the share of the halves that chose "
    "each validation; with fewer than 50 rows, it is the last one.{thumb}"
)
SUMMARY_CAPTION = (
    "Cheapest is the strategy that trains the fewest parameters of the baseline and those for which a loss of the "
    "declared margin or more is excluded. Verdicts count all other strategies."
)
PAIRED = "Seeds are paired: every difference is the mean of those of two runs with the same seed. "
UNPAIRED = "Seeds are not paired. "
_MIN_VALIDATIONS = 2  # to choose from
_NOT_DECLARED = "needs --margin"
_NO_CHEAPEST = {False: "not known", True: "see the learning curves"}


def score_table(comparison: Comparison) -> Table:
    """Return the scores of every strategy."""
    names = comparison.scores()
    headings = ["strategy", "seeds", *(heading(name) for name in names)]
    has_best = any(len(group.runs) > 1 for group in comparison.groups)
    headings += ["best seed"] if has_best else []
    cells = []
    for group in comparison.groups:
        row = [group.label, str(len(group.runs)), *(score_text(comparison, group, name) for name in names)]
        cells.append(row + ([_best_seed(comparison, group)] if has_best else []))
    return headings, cells


def cost_table(comparison: Comparison) -> Table:
    """Return the costs of every strategy that are known of any."""
    known = [name for name in COSTS if any(group.cost(name) is not None for group in comparison.groups)]
    cells = [[group.label, *(cost_text(group, name) for name in known)] for group in comparison.groups]
    return ["strategy", *(COSTS[name][0] for name in known)], cells


def arm_table(comparison: Comparison) -> Table:
    """Return the primary metric of every strategy with intervals."""
    name = comparison.primary_metric
    unit = comparison.unit(name)
    headings = ["strategy", "seeds", heading(name), "95 %", "sd over seeds", "95 % of the sd", "collapsed"]
    cells = []
    for group in comparison.groups:
        usable, values, std = group.usable(name), group.usable_values(name), group.std(name)
        row = [group.label, str(len(usable)), "" if (mean := group.mean(name)) is None else unit.format_score(mean)]
        row.append(interval_text(comparison, name, score_interval(usable, name, unit)))
        row.append("" if std is None else unit.format_score(std))
        row.append(interval_text(comparison, name, spread_interval(values, unit)))
        cells.append([*row, collapse_text(usable, name, unit)])
    return headings, cells


def difference_table(comparison: Comparison) -> Table:
    """Return the differences in the primary metric to the baseline."""
    name = comparison.primary_metric
    headings = ["strategy", "difference", "95 % each", "verdict", "95 % all together", "p", "p (Holm)", "detectable"]
    headings += ["df", "variance: seeds"]
    cells = []
    for group in comparison.compared:
        if (found := group.differences.get(name)) is None:
            cells.append([group.label, "", "", _no_runs(comparison), *[""] * (len(headings) - 4)])
            continue
        contrast = found.contrast
        share = f"{100 * contrast.seed_share:.0f} %" if found.is_tested else ""
        narrow = f" ({found.population})" if contrast.has_interval and not found.is_tested else ""
        df, p = f"{contrast.df:.1f}" if contrast.has_interval else "", contrast.p_value()
        cells.append([
            group.label, found.estimate_text(), found.interval_text() + narrow, found.sentence(), found.together_text(),
            p_text(p if found.is_tested else math.nan), p_text(found.p_adjusted), detectable_text(found), df, share,
        ])  # fmt: skip
    return headings, cells


def _no_runs(comparison: Comparison) -> str:
    return f"Not assessed: no {'pairs of seeds' if comparison.is_paired else 'scores'}."


def secondary_table(comparison: Comparison) -> Table:
    """Return the differences in all other scores to the baseline."""
    found = dict.fromkeys(name for group in comparison.groups for name in group.differences)
    names = [name for name in found if name != comparison.primary_metric]
    cells = []
    for group in comparison.compared:
        cells.append([group.label, *(_described(group.differences.get(name)) for name in names)])
    return ["strategy", *map(heading, names)], cells if names else []


def selection_caption(comparison: Comparison) -> str:
    """Return the caption of :func:`selection_table`."""
    has_thumb = any(one.expected_optimism is not None for group in comparison.groups for one in group.selections)
    thumb = " The rule of thumb for the optimism is 0.7 m sqrt(q / N), an upper figure." if has_thumb else ""
    metric, monitor = _validation_metric(comparison), heading(comparison.monitor)
    return SELECTION_CAPTION.format(monitor=monitor, metric=heading(metric), thumb=thumb)


def selection_table(comparison: Comparison) -> Table:
    """Return the optimism of the best epoch of every strategy whose runs kept the rows of every validation."""
    name = _validation_metric(comparison)
    unit = comparison.unit(name)
    has_test = comparison.split != comparison.monitor.partition("/")[0]
    tested = [heading(comparison.primary_metric)] if has_test else []
    headings = ["strategy", "seeds", "best epoch", "other rows", "optimism", "rule of thumb", *tested, "chosen"]
    cells = []
    for group in comparison.groups:
        if not group.selections or len(group.selections[0].chosen) < _MIN_VALIDATIONS:
            continue
        pairs = [(run.best_score(name), one) for run, one in zip(group.runs, group.selections, strict=True)]
        known = [(best, one.scores[name].value) for best, one in pairs if best is not None and name in one.scores]
        if not known:
            continue
        best = float(unit.internal(np.array([value for value, _ in known])).mean())
        crossed = unit.sign * float(np.mean([value for _, value in known]))
        num_texts = len(group.selections[0].scores[name].contributions)
        row = [group.label, str(len(known)), *(unit.format_score(unit.external(value)) for value in (best, crossed))]
        thumbs = [one.expected_optimism for one in group.selections if one.expected_optimism is not None]
        row += [unit.format_difference(best - crossed, num_texts), "" if not thumbs else
                unit.format_difference(float(np.mean(thumbs)), num_texts)]  # fmt: skip
        row += [score_text(comparison, group, comparison.primary_metric)] if has_test else []
        cells.append([*row, _chosen(group)])
    return headings, cells


def _validation_metric(comparison: Comparison) -> str:
    """Return the primary metric of the split that chose the epochs."""
    split = comparison.monitor.partition("/")[0]
    return f"{split}/{comparison.primary_metric.partition('/')[2]}"


def _chosen(group: RunGroup) -> str:
    """Return how often each validation was chosen, in percent of all halves of all runs."""
    counts: dict[int, int] = {}
    for one in group.selections:
        for i, count in enumerate(one.chosen, 1):
            counts[i] = counts.get(i, 0) + int(count)
    total = sum(counts.values())
    return ", ".join(f"{i}: {100 * count / total:.0f} %" for i, count in sorted(counts.items()) if count)


def summary_table(comparisons: list[Comparison]) -> Table:
    """Return the baseline, the strategy with the best mean, the cheapest one and the verdicts of every task."""
    headings = ["task", "by", "baseline", "best mean", "cheapest not worse by the margin", "verdicts"]
    cells = []
    for comparison in comparisons:
        if comparison.groups:
            name, cheapest = comparison.primary_metric, comparison.cheapest()
            none = _NOT_DECLARED if comparison.margin is None else _NO_CHEAPEST[comparison.has_sizes]
            chosen = [_summary(comparison, group) for group in (comparison.groups[0], comparison.best())]
            chosen.append(none if cheapest is None else _summary(comparison, cheapest))
            cells.append([comparison.task, heading(name), *chosen, verdict_counts(comparison)])
    return headings, cells


def verdict_counts(comparison: Comparison) -> str:
    """Return how many strategies are better, worse, equivalent and so on, in words."""
    counts: dict[str, int] = {}
    for group in comparison.compared:
        found = group.differences.get(comparison.primary_metric)
        word = found.verdict.word if found is not None and found.verdict is not None else "not assessed"
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def difference_caption(comparison: Comparison) -> str:
    """Return the caption of :func:`difference_table`."""
    name, count = comparison.primary_metric, len(comparison.family)
    unit, margin = comparison.unit(name), ""
    if comparison.margin is not None:
        margin = f" and the margin of {unit.format_amount(comparison.margin)} that was declared beforehand"
    in_points = " in points," if unit.is_percent else ""
    sign = ", as ratios: below 1 is better" if unit.is_ratio else f",{in_points} positive if better"
    tests = TEST_CAPTION.format(count=count, plural="s" * (count != 1), margin=margin) if count else ""
    return DIFFERENCE_CAPTION.format(
        metric=heading(name), baseline=comparison.baseline_name, sign=sign, tests=tests,
        pairing=PAIRED if comparison.is_paired else UNPAIRED,
        welch=" of the pairs" if comparison.is_paired else " of each strategy (Welch)",
    ).rstrip()  # fmt: skip


# Cells


def heading(name: str) -> str:
    """Return a score's name as a heading."""
    return name.replace("val/", "").replace("_", " ")


def score_text(comparison: Comparison, group: RunGroup, name: str) -> str:
    """Format the mean of a score and its standard deviation."""
    mean, std, unit = group.mean(name), group.std(name), comparison.unit(name)
    if mean is None:
        return ""
    return unit.format_score(mean) + (f" ± {unit.format_score(std)}" if std is not None else "")


def interval_text(comparison: Comparison, name: str, limits: tuple[float, float] | None) -> str:
    """Format the limits of a score; empty if there are none."""
    unit = comparison.unit(name)
    return "" if limits is None else f"{unit.format_score(limits[0])} to {unit.format_score(limits[1])}"


def p_text(p: float) -> str:
    """Format a p-value; empty without a test."""
    return "" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def detectable_text(found: Difference) -> str:
    """Format the detectable difference; empty if it is not known, ``none`` if it is larger than any can be."""
    return "" if found.detectable is None else found.unit.format_rounded_up(found.detectable)


def cost_text(group: RunGroup, name: str) -> str:
    """Format a cost; empty if it is not known."""
    return "" if (value := group.cost(name)) is None else format_cost(value, name)


def _best_seed(comparison: Comparison, group: RunGroup) -> str:
    name = comparison.primary_metric
    values, unit = group.usable_values(name), comparison.unit(name)
    return unit.format_score(max(values, key=lambda value: unit.sign * value)) if values else ""


def _described(found: Difference | None) -> str:
    if found is None:
        return ""
    interval = found.interval_text()
    if not interval:
        return found.estimate_text()
    return f"{found.estimate_text()} ({interval})" if found.has_rows else f"{found.estimate_text()} [{interval}]"


def _summary(comparison: Comparison, group: RunGroup) -> str:
    """Return the score, the difference to the baseline and the cost of a strategy."""
    name, first = comparison.primary_metric, comparison.groups[0]
    text = f"{group.label}: {score_text(comparison, group, name)}"
    if (found := group.differences.get(name)) is not None:
        interval = f" ({found.interval_text()})" if found.contrast.has_interval else ""
        text += f", {found.estimate_text()}{interval}"
    share = (group.cost("trainable") or 0.0) / (first.cost("total") or math.inf)
    minutes = cost_text(group, "cpu_seconds")
    return f"{text}; {share:.1%} of the parameters" + (f", {minutes} CPU minutes" if minutes else "")
