"""Comparison of runs: groups of runs, their scores and costs, and differences with confidence intervals.

The differences of all arms to the baseline in the primary metric of a task are one family of comparisons; see
:mod:`gpt2_pl.experiments.differences`. Differences in other scores are only described.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.common_rows import comparable_runs
from gpt2_pl.experiments.comparison_notes import family_notes, pairing_notices
from gpt2_pl.experiments.differences import Difference, compare_arms, disagreeing_rows, is_usable, judge, matched
from gpt2_pl.experiments.levels import reliability_notices
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.run_group import RunGroup, deduplicate_seeds, disambiguate_labels
from gpt2_pl.experiments.selection import select
from gpt2_pl.experiments.trials import find_trials, tuning_notes
from gpt2_pl.experiments.units import Unit

_DEFAULT_METRICS: dict[str, dict[str, Any]] = {  # for runs whose metrics.json does not describe its metrics
    **{name: {"higher_is_better": False} for name in ("loss", "perplexity")},
    **{name: {"percent": True} for name in ("accuracy", "macro_f1", "f1", "precision", "recall")},
}


@dataclass
class Comparison:
    """Groups of runs of one task; the first group is the baseline.

    Args:
        task: class of the task.
        monitor: score that selected the best epoch of each run.
        split: split whose scores are compared: ``test`` if all runs have its scores, else that of ``monitor``.
        comparison_key: properties that all runs share; see :meth:`Run.comparison_key`.
        groups: groups of runs.
        notes: notes on runs that were left out or repeated, and on the comparisons.
        margin: difference in the primary metric that matters, on the internal scale of its unit; None if none was
            declared.
        references: groups of reference baselines, which are not among ``groups``.
        is_paired: differences are of pairs of runs with the same seed.
        num_dropped: number of rows of ``split`` that are not compared, because not all runs have them.
    """

    task: str
    monitor: str
    split: str
    comparison_key: dict[str, Any]
    groups: list[RunGroup]
    notes: list[str] = field(default_factory=list)
    margin: float | None = None
    references: list[RunGroup] = field(default_factory=list)
    num_dropped: int = 0
    is_paired: bool = False

    def metric(self, name: str) -> Mapping[str, Any]:
        """Return how the runs' task describes the metric of a score; see :class:`~gpt2_pl.metrics.MetricInfo`."""
        metric = name.partition("/")[2]
        described = (run.record.get("metrics") or {} for group in self.groups for run in group.runs)
        return next((metrics[metric] for metrics in described if metric in metrics), _DEFAULT_METRICS.get(metric, {}))

    def higher_is_better(self, name: str) -> bool:
        """Return whether a higher score is better; True if this is unknown."""
        return self.metric(name).get("higher_is_better") is not False

    def unit(self, name: str) -> Unit:
        """Return the unit of a score."""
        is_ratio = name.endswith("perplexity")
        return Unit(self.higher_is_better(name), bool(self.metric(name).get("percent")), is_ratio)

    @property
    def primary_metric(self) -> str:
        """Score that ranks strategies: the primary metric of the task if runs have it, else the monitored score."""
        name = _primary(self.groups[0].runs[0], self.split) if self.groups else ""
        return name if name in self.scores() else self.monitor

    @property
    def is_crossed(self) -> bool:
        """Whether the scores that are compared are of rows of the validation set that did not choose the epoch."""
        return self.split == self.monitor.partition("/")[0] and all(group.selections for group in self.groups)

    @property
    def is_optimistic(self) -> bool:
        """Whether the rows that are compared have chosen the epoch of a run."""
        chose = any(len(run.record["epochs"]) > 1 for group in self.groups for run in group.runs)
        return chose and self.split == self.monitor.partition("/")[0] and not self.is_crossed

    def best(self) -> RunGroup:
        """Return the group with the best mean of the primary metric."""
        name, sign = self.primary_metric, self.unit(self.primary_metric).sign
        scored = [group for group in self.groups if group.usable(name)]
        return max(scored or self.groups[:1], key=lambda group: sign * (group.mean(name) or 0.0))

    def scores(self) -> list[str]:
        """Return the names of all scores, the monitored one first."""
        names = dict.fromkeys([self.monitor])
        for group in self.groups:
            for run in group.runs:
                known = (name for name in run.record["scores"] if "/" in name and run.score(name) is not None)
                names.update(dict.fromkeys(known))
        return list(names)

    @cached_property
    def has_sizes(self) -> bool:
        """Whether several strategies were trained on several numbers of rows, so that they have learning curves."""
        sizes: dict[str, set[Any]] = defaultdict(set)
        for group in self.groups:
            sizes[group.strategy].add(group.training_rows)
        return sum(len(of_strategy - {None}) > 1 for of_strategy in sizes.values()) > 1

    def is_baseline(self, group: RunGroup) -> bool:
        """Return whether a group is the baseline, or with several numbers of training rows one of its strategy."""
        return group is self.groups[0] or (self.has_sizes and group.strategy == self.groups[0].strategy)

    def baseline_of(self, group: RunGroup) -> RunGroup | None:
        """Return the baseline of a group; None for a baseline itself, and without one.

        With several numbers of training rows, it is the group of the baseline's strategy with as many rows.
        """
        if self.is_baseline(group):
            return None
        of_first = (g for g in self.groups if self.is_baseline(g))
        return next((g for g in of_first if not self.has_sizes or g.training_rows == group.training_rows), None)

    @property
    def baseline_name(self) -> str:
        """The baseline in words."""
        return f"{self.groups[0].strategy} with as many training rows" if self.has_sizes else self.groups[0].label

    @property
    def compared(self) -> list[RunGroup]:
        """The groups that are compared with a baseline."""
        return [group for group in self.groups if self.baseline_of(group) is not None]

    @property
    def family(self) -> list[RunGroup]:
        """The groups whose difference to the baseline in the primary metric was tested, one family of comparisons."""
        name = self.primary_metric
        return [g for g in self.groups if (d := g.differences.get(name)) is not None and d.is_tested]

    def pairs(self, group: RunGroup, other: RunGroup, name: str) -> tuple[list[Run], list[Run]]:
        """Return the usable runs of two groups that are compared; with paired seeds those of the seeds of both."""
        runs = group.usable(name), other.usable(name)
        return matched(*runs) if self.is_paired else runs

    def difference(self, group: RunGroup, other: RunGroup, name: str) -> Difference | None:
        """Return the difference of a group to another in a score, without a verdict; None without runs to compare."""
        runs = self.pairs(group, other, name)
        names = (group.label, other.label)
        return compare_arms(*runs, name, self.unit(name), names, self.is_paired) if all(runs) else None

    def cheapest(self) -> RunGroup | None:
        """Return the group with the fewest trainable parameters for which a loss of the margin or more is excluded.

        Candidates are the baseline and all groups with a verdict that excludes such a loss.

        Returns:
            The group, or None if no margin was declared, no group has a verdict, or there are several numbers of
            training rows.
        """
        name = self.primary_metric
        if self.margin is None or not self.family or self.has_sizes:
            return None
        verdicts = {id(group): group.differences[name].verdict for group in self.family}
        not_worse = [g for g in self.family if (found := verdicts[id(g)]) is not None and found.is_not_worse]
        sign = self.unit(name).sign
        return min(
            [self.groups[0], *not_worse],
            key=lambda group: (group.cost("trainable") or math.inf, -sign * (group.mean(name) or 0.0)),
        )


def compare(
    runs: Iterable[Run],
    baseline: str | None = None,
    margin: float | None = None,
    *,
    allow_missing_rows: bool = False,
    paired_seeds: bool = False,
) -> list[Comparison]:
    """Group runs by task, strategy and settings, and compare every group with the baseline.

    In each task, runs are compared that have the most common data and base. Other runs, and unfinished ones, are left
    out, with a note on the reason. If runs lack rows of others, only the rows that all of them have are compared.

    Args:
        runs: runs in any order.
        baseline: strategy or label of the baseline; defaults to ``full`` if it exists, else the first group.
        margin: difference in the primary metric that matters, fixed before the runs are looked at: points for a share,
            percent for a perplexity, else in the unit of the score; above 0. None if none was declared.
        allow_missing_rows: permit that more than 1 % of the rows are dropped, because not all runs have them.
        paired_seeds: compare the runs of two strategies in pairs of the same seed. It must be declared before the runs
            are looked at, and only if a seed fixes the same order of the data or the same initial weights in both.

    Returns:
        The comparison of each task.

    Raises:
        InputError: the given baseline does not exist in any task, the margin is not above 0, or too many rows are
            missing.
    """
    if margin is not None and not 0 < margin < math.inf:
        raise InputError(key="margin", value=margin, expected="above 0")
    tasks: dict[str, list[Run]] = defaultdict(list)
    notes: dict[str, list[str]] = defaultdict(list)
    unique_runs = {run.folder.resolve(): run for run in runs}
    failed: dict[str, list[Run]] = defaultdict(list)
    for run in unique_runs.values():
        task = str(run.record.get("task"))
        is_finished, is_reference = run.record.get("status") == "finished", bool(run.record.get("reference"))
        if is_finished and not is_reference and not _with_monitor([run], notes[task]):
            tasks[task] += []
        elif run.record.get("status") != "finished" or not (run.record.get("epochs") or run.needs_no_training):
            status = "trained nothing" if run.record.get("status") == "finished" else str(run.record.get("status"))
            notes[task].append(f"{run.path} is left out: it is not a finished training run ({status})")
            tasks[task] += []
            if status == "failed":
                failed[task].append(run)
        else:
            tasks[task].append(run)
    comparisons = [_group_task(task, group, notes[task], baseline, allow_missing_rows) for task, group in tasks.items()]
    for comparison in comparisons:
        _add_failed(comparison, failed[comparison.task])
        comparison.is_paired = paired_seeds
        _add_differences(comparison, margin)
    groups = [group for comparison in comparisons for group in comparison.groups]
    if baseline is not None and not any(baseline in (group.strategy, group.label) for group in groups):
        strategies = ", ".join(dict.fromkeys(group.strategy for group in groups))
        expected = f"one of {strategies or '(no runs to compare)'}"
        raise InputError(key="baseline", value=baseline, expected=expected)
    return comparisons


def _group_task(
    task: str, runs: list[Run], notes: list[str], baseline: str | None, allow_missing_rows: bool
) -> Comparison:
    if not (trained := [run for run in runs if not run.record.get("reference")]):
        trained = runs = _with_monitor(runs, notes)
    if not runs:
        return Comparison(task, "", "", {}, [], notes)
    split = compared_split(trained, notes)
    comparable, shared, num_dropped = comparable_runs(runs, split, notes, allow_missing_rows)
    by_settings: dict[str, list[Run]] = defaultdict(list)
    for run in comparable:
        by_settings[_settings_key(run)].append(run)
    groups = []
    for same in by_settings.values():
        group = RunGroup(same[0].strategy, deduplicate_seeds(same, notes), same[0].strategy)
        group.trials = find_trials(group.runs[0])
        groups.append(group)
    disambiguate_labels(groups)
    references = sorted((g for g in groups if g.runs[0].record.get("reference")), key=lambda group: group.label)
    if len(references) < len(groups):
        groups = [group for group in groups if group not in references]
    else:  # references alone are compared like strategies
        references = []
    first = baseline or "full"
    groups.sort(key=lambda g: (g.label != first, g.strategy != first, g.strategy, g.training_rows or 0, g.label))
    if first not in (groups[0].label, groups[0].strategy) and len(groups) > 1:
        notes.append(f"there is no baseline {first!r}; differences are to {groups[0].label}")
    monitor = str(comparable[0].record["monitor"])
    comparison = Comparison(task, monitor, split, shared, groups, notes, None, references, num_dropped)
    use_crossed_scores(comparison)
    return comparison


def _with_monitor(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """Return the runs that have the score that selects the best epoch; notes name the others."""
    found = [run for run in runs if run.record.get("monitor") in (run.record.get("scores") or {})]
    notes += [f"{run.path} is left out: it has no {run.record.get('monitor')}" for run in runs if run not in found]
    return found


def use_crossed_scores(comparison: Comparison) -> None:
    """Score runs on rows that did not choose their epoch, if the rows that did are compared and all runs permit it.

    Every run needs the rows of all its validations (``save_predictions: every_epoch``).
    """
    groups = [*comparison.groups, *comparison.references]
    runs = [run for group in groups for run in group.runs]
    for run in runs:
        run.crossed = {}
    for group in groups:
        found = [select(run) for run in group.runs]
        group.selections = [one for one in found if one is not None] if None not in found else []
    if comparison.is_crossed:
        for group in groups:
            for run, selection in zip(group.runs, group.selections, strict=False):
                run.crossed = selection.scores


def _primary(run: Run, split: str) -> str:
    """Return the name of the primary metric of a run's task in a split."""
    return f"{split}/{str(run.record.get('primary') or run.record.get('monitor')).partition('/')[2]}"


def compared_split(runs: Sequence[Run], notes: list[str]) -> str:
    """Return ``test`` if all runs have its score, because no run chose its epoch there; else that of the monitor."""
    tested = sum(_primary(run, "test") in run.record["scores"] for run in runs)
    if tested == len(runs):
        return "test"
    if tested:
        notes.append(
            f"{tested} of {len(runs)} runs have scores of a test set; those of the validation set are compared"
        )
    return runs[0].split


def _settings_key(run: Run) -> str:
    """Return a text that is the same for runs that differ in nothing but the seed."""
    return json.dumps([run.strategy, run.flat], sort_keys=True, default=str)


def _add_failed(comparison: Comparison, failed: Iterable[Run]) -> None:
    """Add failed runs to the groups with the same settings."""
    groups = {_settings_key(group.runs[0]): group for group in comparison.groups}
    for run in failed:
        if (group := groups.get(_settings_key(run))) is not None:
            group.failed.append(run)


def _add_differences(comparison: Comparison, margin: float | None) -> None:
    """Add to each group its differences to the baseline and its notices, and to the comparison its notes."""
    if not comparison.groups:
        return
    primary = comparison.primary_metric
    unit = comparison.unit(primary)
    comparison.margin = None if margin is None else unit.margin(margin)
    for name in comparison.scores():
        for group in comparison.compared:
            baseline = comparison.baseline_of(group)
            if baseline and (found := comparison.difference(group, baseline, name)) is not None:
                group.differences[name] = found
    family = {str(i): g.differences[primary] for i, g in enumerate(comparison.groups) if primary in g.differences}
    for i, judged in judge(family, comparison.margin).items():
        comparison.groups[int(i)].differences[primary] = judged
    if comparison.is_paired:
        for group in comparison.compared:
            group.notices += pairing_notices(comparison, group)
    for group in comparison.groups:
        diverged = [run for run in group.runs if not is_usable(run, primary)]
        group.notices += reliability_notices(group.usable(primary), [*group.failed, *diverged], primary, unit)
        for run in group.runs:
            comparison.notes += [f"{run.path}: {text}" for text in disagreeing_rows(run)]
    comparison.notes += family_notes(comparison)
    comparison.notes += tuning_notes({group.label: group.trials for group in comparison.groups})
