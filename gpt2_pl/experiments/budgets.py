"""Scores of strategies within a budget, and how each strategy was tuned.

The best score of k trials of a random search is estimated from all its trials; see
:mod:`gpt2_pl.experiments.statistics.tuning`. A budget, such as an amount of CPU time, pays for some k of each strategy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.costs import BUDGETS, COSTS, budget_cost
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.tables import Table
from gpt2_pl.experiments.trials import Trials

TUNING_CAPTION = (
    "How each strategy was tuned: the search that chose the settings of its runs by {monitor}. CPU minutes are those "
    "of all its trials."
)
NO_SEARCH = "no search is known: settings were given"
BEST_OF_CAPTION = (
    "Expected best {monitor} of k independent trials of the search, with the exact 95 % limits of the median best. The "
    "scores are of the rows that choose among the trials, and therefore optimistic."
)
_BUDGET_CAPTION = (
    "Equal budgets: expected best {monitor} of the k trials that a budget pays for, with the exact 95 % limits of the "
    "median best. Two strategies differ at a budget if their limits do not overlap. The last budget is that of the "
    "cheapest search. An asterisk marks estimates from more than half of the trials, which are imprecise. A strategy "
    "without a search has the score of one run."
)
_FRACTIONS = (0.25, 0.5, 1.0)  # of the cheapest search
_MAX_TEXT = 60  # characters of a list of choices or of a chosen value


class BestOf(NamedTuple):
    """Estimated best score of the first k trials of a search.

    Args:
        k: number of trials.
        expected: expected best score; not finite if failed trials without a worst score have weight.
        worse, better: limits of the median best score; None where the trials give no limit.
        is_imprecise: k is more than half of the number of trials.
    """

    k: int
    expected: float
    worse: float | None
    better: float | None
    is_imprecise: bool


def best_of(comparison: Comparison, trials: Trials, k: int) -> BestOf:
    """Estimate the best monitored score of k trials, in the unit of the score.

    A failed trial has the score 0 if the score is a share, and else no finite score.

    Raises:
        InputError: the sampler adapts to earlier trials.
    """
    unit = comparison.unit(comparison.monitor)
    found = trials.best_of(k, 0.0 if unit.is_percent and unit.higher_is_better else -math.inf)
    worse, better = (
        None if limit is None or not math.isfinite(limit) else unit.sign * limit for limit in (found.low, found.high)
    )
    return BestOf(k, unit.sign * found.expected, worse, better, 2 * k > max(2, len(trials.scores)))


def budget_costs(comparison: Comparison) -> list[str]:
    """Return the costs by which the strategies can be compared.

    Returns:
        GPU time if all strategies record it, else CPU time; and FLOPs. Empty if not all strategies record them.
    """
    names = [name for name in BUDGETS if all(_records(group, name) for group in comparison.groups)]
    return [name for name in names if name != "cpu_seconds" or "gpu_seconds" not in names]


def _records(group: RunGroup, cost: str) -> bool:
    if group.trials is not None:
        return bool(group.trials.total(cost))
    return any((parts := budget_cost(run.record, cost)) is not None and sum(parts) > 0 for run in group.runs)


def independent_trials(group: RunGroup) -> Trials | None:
    """Return the trials of a strategy's random search; None for other searches and without one."""
    return group.trials if group.trials is not None and group.trials.is_independent else None


def equal_budgets(comparison: Comparison, cost: str) -> list[float]:
    """Return budgets that the random searches of all strategies have reached.

    Returns:
        A quarter, half and all of the cost of the cheapest search. The fractions are left out if they do not pay for
        one trial of every strategy. Empty without random searches.
    """
    searches = [trials for group in comparison.groups if (trials := independent_trials(group)) is not None]
    wholes = [trials.total(cost) for trials in searches]
    known = [whole for whole in wholes if whole is not None]
    if not known or len(known) < len(wholes):
        return []
    least = min(known)
    budgets = [fraction * least for fraction in _FRACTIONS]
    return [budget for budget in budgets if budget == least or all(t.within(cost, budget) for t in searches)]


# Tables


def tuning_table(comparison: Comparison) -> Table:
    """Return one row on the search of every strategy; without rows if no search is known."""
    headings = ["strategy", "trials", "failed", "sampler", "seed", "searched", "chosen", "CPU minutes"]
    cells = []
    for group in comparison.groups:
        trials = group.trials
        if trials is None:
            cells.append([group.label, "0", "", "", "", NO_SEARCH, "", ""])
            continue
        cpu = trials.total("cpu_seconds")
        cells.append([
            group.label, str(len(trials.scores)), str(trials.num_failed), trials.sampler,
            "" if trials.seed is None else str(trials.seed), space_text(trials.space), _chosen_text(trials.chosen),
            "" if cpu is None else _amount(cpu, "cpu_seconds"),
        ])  # fmt: skip
    return headings, cells if any(group.trials is not None for group in comparison.groups) else []


def best_of_table(comparison: Comparison) -> Table:
    """Return the expected best score of k trials for every strategy with a search; without rows if no one has one."""
    cells = []
    for group in comparison.groups:
        if (trials := group.trials) is None:
            continue
        failed = f", {trials.num_failed} failed" if trials.num_failed else ""
        about = f"{len(trials.scores)}{failed}, {trials.sampler}"
        if not trials.is_independent:
            cells.append([group.label, about, "", "not estimated: the trials are not independent draws", ""])
            continue
        k = 1
        while k <= max(1, len(trials.scores) // 2):
            found = best_of(comparison, trials, k)
            cells.append([group.label, about, str(k), _score(comparison, found.expected), _limits(comparison, found)])
            k *= 2
    return ["strategy", "trials", "k", "expected best", "95 % of the median best"], cells


def budget_table(comparison: Comparison, cost: str) -> Table:
    """Return the expected best score of every strategy within equal budgets; without rows if it is not known."""
    budgets = equal_budgets(comparison, cost)
    heading = COSTS[cost][0]
    headings = ["strategy", *(f"{_amount(budget, cost)} {heading}" for budget in budgets)]
    if not budgets or len(comparison.groups) < 2:
        return headings, []
    return headings, [
        [group.label, *(_within(comparison, group, cost, budget) for budget in budgets)] for group in comparison.groups
    ]


def budget_caption(comparison: Comparison, cost: str) -> str:
    """Return the caption of :func:`budget_table`; the table of the first cost has the explanations."""
    if cost != budget_costs(comparison)[0]:
        return f"The same for budgets of {COSTS[cost][0]}."
    return _BUDGET_CAPTION.format(monitor=comparison.monitor)


def _within(comparison: Comparison, group: RunGroup, cost: str, budget: float) -> str:
    """Return the expected best score of a strategy within a budget as text."""
    if group.trials is None:
        price = group.cost(cost)
        recorded = [run.record["scores"][comparison.monitor] for run in group.runs]  # of the best epoch, as of trials
        text = _score(comparison, statistics.mean(recorded))
        return "" if price is None else f"{text}, one run" if price <= budget else "less than one run"
    if (trials := independent_trials(group)) is None:
        return "not estimated"
    if not (k := trials.within(cost, budget)):
        return "less than one trial"
    found = best_of(comparison, trials, k)
    limits = f" ({text})" if (text := _limits(comparison, found)) else ""
    return f"{_score(comparison, found.expected)}{'*' * found.is_imprecise}{limits}, k = {k}"


def space_text(space: Mapping[str, Any]) -> str:
    """Return the searched keys with their ranges or choices, as one line."""
    return "; ".join(f"{_short(key)}: {_range_text(values)}" for key, values in space.items())


def _range_text(values: Any) -> str:
    if not isinstance(values, dict):
        return _cut(f"one of {', '.join(map(str, values))}" if isinstance(values, list) else str(values))
    more = ", log" if values.get("log") else f", step {values['step']}" if values.get("step") else ""
    return _cut(f"{values.get('low')} to {values.get('high')}{more}")


def _chosen_text(chosen: Mapping[str, str]) -> str:
    return "; ".join(f"{_short(key)}: {_value_text(value)}" for key, value in chosen.items())


def _value_text(value: str) -> str:
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return _cut(value)


def _short(key: str) -> str:
    """Return a key without the parts that carry no meaning for a reader."""
    return key.replace(".init_args", "")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def _amount(value: float, cost: str) -> str:
    """Format a budget with three digits."""
    _, divisor, digits = COSTS[cost]
    amount = value / divisor
    return f"{amount:.2e}" if digits is None else f"{amount:,.0f}" if amount >= 1000 else f"{amount:.3g}"


def _score(comparison: Comparison, value: float) -> str:
    return comparison.unit(comparison.monitor).format_score(value) if math.isfinite(value) else "not finite"


def _limits(comparison: Comparison, found: BestOf) -> str:
    """Return the limits of the median best, of which one or both may be missing, in the order of the score."""
    worse, better = ("" if limit is None else _score(comparison, limit) for limit in (found.worse, found.better))
    low, high = (worse, better) if comparison.unit(comparison.monitor).higher_is_better else (better, worse)
    if low and high:
        return f"{low} to {high}"
    return f"≥ {low}" if low else f"≤ {high}" if high else ""


# Data


def tuning_as_json(comparison: Comparison, trials: Trials) -> dict[str, Any]:
    """Return a search as plain values, with the expected best of every number of trials if they are independent."""
    points = []
    for k in range(1, len(trials.scores) + 1) if trials.is_independent else ():
        found = best_of(comparison, trials, k)._asdict()
        costs = {name: cost for name in BUDGETS if (cost := trials.mean_cost(name, k)) is not None}
        expected = found["expected"] if math.isfinite(found["expected"]) else None
        points.append({**found, "expected": expected, "costs": costs})
    return {
        "trials": len(trials.scores),
        "failed": trials.num_failed,
        "sampler": trials.sampler,
        "monitor": trials.monitor,
        "seed": trials.seed,
        "space": dict(trials.space),
        "chosen": dict(trials.chosen),
        "best_of": points,
    }
