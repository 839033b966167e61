"""Comparison of runs: groups of runs, their scores and costs, and differences with confidence intervals."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt2_pl.errors import InputError, printable
from gpt2_pl.experiments.inference import EffectEstimate, paired_bootstrap, percentile_interval, seed_noise
from gpt2_pl.experiments.run import Run

_DEFAULT_METRICS: dict[str, dict[str, Any]] = {  # for runs whose metrics.json does not describe its metrics
    **{name: {"higher_is_better": False} for name in ("loss", "perplexity")},
    **{name: {"percent": True} for name in ("accuracy", "macro_f1", "f1", "precision", "recall")},
}
_MAX_VALUE_CHARACTERS, _MAX_SETTINGS = 200, 20  # limits of a setting's value in a label, and of a label's settings


@dataclass
class RunGroup:
    """Runs with the same configuration and different seeds.

    Args:
        label: display name.
        runs: one run per seed.
        strategy: the part of the label that the strategy files determine.
        over_texts: for each score, its difference to the baseline with an interval over texts, for these models. Empty
            for the baseline, and if the runs have no outcomes of rows.
        over_seeds: the same with an interval over texts and seeds.
    """

    label: str
    runs: list[Run]
    strategy: str = ""
    over_texts: dict[str, EffectEstimate] = field(default_factory=dict)
    over_seeds: dict[str, EffectEstimate] = field(default_factory=dict)

    def values(self, score: str) -> list[float]:
        """Return a score of every run that has it."""
        return [float(run.record["scores"][score]) for run in self.runs if score in run.record["scores"]]

    def mean(self, score: str) -> float | None:
        """Return the mean of a score over seeds, or None if no run has it."""
        return statistics.mean(values) if (values := self.values(score)) else None

    def std(self, score: str) -> float | None:
        """Return the standard deviation of a score over seeds: None for one seed, NaN if a score is not finite."""
        if len(values := self.values(score)) < 2:
            return None
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan

    def cost(self, name: str) -> float | None:
        """Return the median of a cost over runs.

        Args:
            name: ``trainable`` or ``total`` (parameters), ``seconds_to_best``, or a number in ``metrics.json``. Times
                include that of a pretraining run of this library.

        Returns:
            The median, or None if no run has the cost.
        """
        costs = [value for run in self.runs if (value := _cost(run, name)) is not None]
        return statistics.median(costs) if costs else None


def _cost(run: Run, name: str) -> float | None:
    if name in ("trainable", "total"):
        return run.record["parameters"][name]
    base_seconds = (run.record.get("base") or {}).get("cpu_seconds" if name == "cpu_seconds" else "seconds") or 0.0
    if name == "seconds_to_best":
        epochs, best = len(run.record["epochs"]), run.record["scores"].get("best_epoch")
        return base_seconds + run.record["seconds"] * best / epochs if epochs and best else None
    value = run.record.get(name)
    return base_seconds + value if value is not None and name in ("seconds", "cpu_seconds") else value


@dataclass
class Comparison:
    """Groups of runs of one task; the first group is the baseline.

    Args:
        task: class of the task.
        monitor: score that selected the best epoch of each run.
        comparison_key: properties that all runs share; see :attr:`Run.comparison_key`.
        groups: groups of runs.
        notes: notes on runs that were left out or repeated.
    """

    task: str
    monitor: str
    comparison_key: dict[str, Any]
    groups: list[RunGroup]
    notes: list[str] = field(default_factory=list)

    def metric(self, name: str) -> Mapping[str, Any]:
        """Return how the runs' task describes the metric of a score; see :class:`~gpt2_pl.metrics.MetricInfo`."""
        metric = name.partition("/")[2]
        described = (run.record.get("metrics") or {} for group in self.groups for run in group.runs)
        return next((metrics[metric] for metrics in described if metric in metrics), _DEFAULT_METRICS.get(metric, {}))

    def higher_is_better(self, name: str) -> bool:
        """Return whether a higher score is better; True if this is unknown."""
        return self.metric(name).get("higher_is_better") is not False

    @property
    def primary_metric(self) -> str:
        """Score that ranks strategies: the primary metric of the task if runs have it, else the monitored score."""
        primary = self.groups[0].runs[0].record.get("primary") if self.groups else None
        return str(primary) if primary in self.scores() else self.monitor

    def best(self) -> RunGroup:
        """Return the group with the best mean of the primary metric."""
        name, sign = self.primary_metric, 1 if self.higher_is_better(self.primary_metric) else -1
        scored = [group for group in self.groups if group.values(name)]
        return max(scored, key=lambda group: sign * statistics.mean(group.values(name)))

    def scores(self) -> list[str]:
        """Return the names of all scores, the monitored one first."""
        names = dict.fromkeys([self.monitor])
        for group in self.groups:
            for run in group.runs:
                names.update(dict.fromkeys(name for name in run.record["scores"] if "/" in name))
        return list(names)

    def cheapest(self) -> RunGroup | None:
        """Return the group with the fewest trainable parameters that is not significantly worse than the baseline.

        Candidates are the baseline and all groups whose interval over texts and seeds is not entirely worse.

        Returns:
            The group, or None if no group has such an interval.
        """
        name = self.primary_metric
        sign = 1 if self.higher_is_better(name) else -1
        estimated = [group for group in self.groups if name in group.over_seeds]
        not_worse = [g for g in estimated if max(sign * g.over_seeds[name].low, sign * g.over_seeds[name].high) >= 0]
        if not estimated:
            return None
        return min(
            [self.groups[0], *not_worse],
            key=lambda group: (group.cost("trainable") or math.inf, -sign * (group.mean(name) or 0.0)),
        )


def compare(runs: Iterable[Run], baseline: str | None = None) -> list[Comparison]:
    """Group runs by task, strategy and settings, and compare every group with the baseline.

    In each task, runs are compared that have the most common data and base. Other runs, and unfinished ones, are left
    out, with a note on the reason.

    Args:
        runs: runs in any order.
        baseline: strategy or label of the baseline; defaults to ``full`` if it exists, else the first group.

    Returns:
        The comparison of each task.

    Raises:
        InputError: the given baseline does not exist in any task.
    """
    tasks: dict[str, list[Run]] = defaultdict(list)
    notes: dict[str, list[str]] = defaultdict(list)
    unique_runs = {run.folder.resolve(): run for run in runs}
    for run in unique_runs.values():
        task = str(run.record.get("task"))
        scores = run.record.get("scores") or {}
        if run.record.get("status") == "finished" and run.record.get("monitor") not in scores:
            notes[task].append(f"{run.folder} is left out: it has no {run.record.get('monitor')}")
            tasks[task] += []
        elif run.record.get("status") != "finished" or not run.record.get("epochs"):
            status = "trained nothing" if run.record.get("status") == "finished" else str(run.record.get("status"))
            notes[task].append(f"{run.folder} is left out: it is not a finished training run ({status})")
            tasks[task] += []
        else:
            tasks[task].append(run)
    comparisons = [_compare_task(task, group, notes[task], baseline) for task, group in tasks.items()]
    groups = [group for comparison in comparisons for group in comparison.groups]
    if baseline is not None and not any(baseline in (group.strategy, group.label) for group in groups):
        strategies = ", ".join(dict.fromkeys(group.strategy for group in groups))
        expected = f"one of {strategies or '(no runs to compare)'}"
        raise InputError(key="baseline", value=baseline, expected=expected)
    return comparisons


def _compare_task(task: str, runs: list[Run], notes: list[str], baseline: str | None) -> Comparison:
    if not runs:
        return Comparison(task, "", {}, [], notes)
    keys = {id(run): json.dumps(run.comparison_key, sort_keys=True) for run in runs}
    (most_common, _), *_ = Counter(keys.values()).most_common(1)
    shared = json.loads(most_common)
    comparable = []
    for run in runs:
        if keys[id(run)] == most_common:
            comparable.append(run)
        else:
            other = [name for name, value in json.loads(keys[id(run)]).items() if value != shared[name]]
            difference = f"other {', '.join(other)} than most ({run.comparison_key[other[0]]})"
            notes.append(f"{run.folder} is left out: {difference}")
    by_settings: dict[str, list[Run]] = defaultdict(list)
    for run in comparable:
        by_settings[json.dumps([run.strategy, run.flat], sort_keys=True, default=str)].append(run)
    groups = []
    for same in by_settings.values():
        groups.append(RunGroup(same[0].strategy, _deduplicate_seeds(same, notes), same[0].strategy))
    _disambiguate_labels(groups)
    first = baseline or "full"
    groups.sort(key=lambda group: (group.label != first, group.strategy != first, group.label))
    if first not in (groups[0].label, groups[0].strategy) and len(groups) > 1:
        notes.append(f"there is no baseline {first!r}; differences are to {groups[0].label}")
    for split in ("val", "test"):
        _add_differences(groups, split, notes)
    return Comparison(task, str(comparable[0].record["monitor"]), shared, groups, notes)


def _add_differences(groups: list[RunGroup], split: str, notes: list[str]) -> None:
    """Add to each group its differences in a split to the first group, if both have outcomes of the same rows."""
    baseline_scores = [run.row_scores.get(split) for run in groups[0].runs]
    if any(scores is None for scores in baseline_scores):
        return
    reference = baseline_scores[0]
    assert reference is not None
    comparable = []
    for group in groups:
        of_runs = [run.row_scores.get(split) for run in group.runs]
        of_same_rows = [s for s in of_runs if s and s.digest == reference.digest and s.names == reference.names]
        if len(of_same_rows) == len(of_runs):
            comparable.append((group, of_same_rows))
        else:
            reason = "not all of its runs have the outcomes of those rows"
            notes.append(f"{group.label} has no differences in {split}: {reason}")
    score = reference.score
    resamples = paired_bootstrap([[rows.features for rows in runs] for _, runs in comparable], score)  # (R, G, S)
    seed_scores = [np.array([score(rows.features.sum(0)) for rows in runs]) for _, runs in comparable]  # each (n, S)
    noise = seed_noise(seed_scores, len(resamples))
    for g, (group, _) in enumerate(comparable[1:], start=1):
        difference = seed_scores[g].mean(0) - seed_scores[0].mean(0)
        draws = resamples[:, g] - resamples[:, 0]
        noise_scale = math.sqrt(1 / len(seed_scores[g]) + 1 / len(seed_scores[0]))
        for s, name in enumerate(reference.names):
            group.over_texts[name] = percentile_interval(difference[s], draws[:, s])
            if noise is not None:
                group.over_seeds[name] = percentile_interval(difference[s], draws[:, s] + noise_scale * noise[:, s])


def _deduplicate_seeds(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """Return the first run of each seed; notes state whether repeated runs have the same scores."""
    by_seed: dict[Any, Run] = {}
    for run in sorted(runs, key=lambda run: (run.record.get("seed") or 0, str(run.folder))):
        first = by_seed.setdefault(run.record.get("seed"), run)
        if first is not run:
            same = first.record["scores"] == run.record["scores"]
            verdict = "the same scores to the last digit" if same else "OTHER SCORES"
            notes.append(f"{run.folder} repeats {first.folder}, seed {run.record.get('seed')}: {verdict}")
    return list(by_seed.values())


def _shorten_value(value: Any) -> str:
    text = printable(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[:_MAX_VALUE_CHARACTERS]}..."


def _disambiguate_labels(groups: list[RunGroup]) -> None:
    """Append to the labels of groups with the same label the settings in which the groups differ."""
    for label, n in Counter(group.label for group in groups).items():
        if n == 1:
            continue
        same = [group for group in groups if group.label == label]
        names = dict.fromkeys(name for group in same for name in group.runs[0].flat)
        differing = [
            name for name in names if len({json.dumps(g.runs[0].flat.get(name), default=str) for g in same}) > 1
        ]
        more = [f"{len(differing) - _MAX_SETTINGS} more"] if len(differing) > _MAX_SETTINGS else []
        for group in same:
            values = group.runs[0].flat
            settings = [
                f"{name.rpartition('.')[2]} {_shorten_value(values.get(name))}" for name in differing[:_MAX_SETTINGS]
            ]
            group.label = f"{label} ({', '.join(settings + more)})"
