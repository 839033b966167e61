"""Runs side by side: which belong together, what they scored, what they cost, and how sure the differences are."""

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

_UNDESCRIBED: dict[str, dict[str, Any]] = {  # metrics of runs whose metrics.json describes none
    **{name: {"higher_is_better": False} for name in ("loss", "perplexity")},
    **{name: {"percent": True} for name in ("accuracy", "macro_f1", "f1", "precision", "recall")},
}
_LONGEST_SETTING, _MOST = 200, 20  # characters of a setting's value in a label, and settings in one


@dataclass
class RunGroup:
    """Runs of one configuration that differ in the seed.

    Args:
        label: what it is called.
        runs: one for each seed.
        strategy: the part of the label that its files give.
        over_texts: by score, its difference to the baseline, and how sure that is of these models on other texts.
            Empty for the baseline, and where rows have no outcomes.
        over_seeds: the same, and how sure it is with other seeds too.
    """

    label: str
    runs: list[Run]
    strategy: str = ""
    over_texts: dict[str, EffectEstimate] = field(default_factory=dict)
    over_seeds: dict[str, EffectEstimate] = field(default_factory=dict)

    def values(self, score: str) -> list[float]:
        """A score of every run that has it."""
        return [float(run.record["scores"][score]) for run in self.runs if score in run.record["scores"]]

    def mean(self, score: str) -> float | None:
        """The mean over seeds."""
        return statistics.mean(values) if (values := self.values(score)) else None

    def std(self, score: str) -> float | None:
        """The standard deviation over seeds; None of one, NaN where a score is no finite number."""
        if len(values := self.values(score)) < 2:
            return None
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan

    def cost(self, name: str) -> float | None:
        """The median over runs of ``trainable``, ``total``, ``seconds_to_best`` or a figure of ``metrics.json``."""
        found = [value for run in self.runs if (value := _cost(run, name)) is not None]
        return statistics.median(found) if found else None


def _cost(run: Run, name: str) -> float | None:
    if name in ("trainable", "total"):
        return run.record["parameters"][name]
    before = (run.record.get("base") or {}).get("cpu_seconds" if name == "cpu_seconds" else "seconds") or 0.0
    if name == "seconds_to_best":
        epochs, best = len(run.record["epochs"]), run.record["scores"].get("best_epoch")
        return before + run.record["seconds"] * best / epochs if epochs and best else None
    value = run.record.get(name)
    return before + value if value is not None and name in ("seconds", "cpu_seconds") else value


@dataclass
class Comparison:
    """The groups of one task, the baseline first.

    Args:
        task: its class.
        monitor: the score that chose each run's best epoch.
        comparison_key: what all runs share.
        groups: the groups.
        notes: runs left out, and repeated ones.
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
        return next((metrics[metric] for metrics in described if metric in metrics), _UNDESCRIBED.get(metric, {}))

    def higher_is_better(self, name: str) -> bool:
        """Return whether more of a score is better, or not known to be worse."""
        return self.metric(name).get("higher_is_better") is not False

    @property
    def primary_metric(self) -> str:
        """The score that strategies are judged by: the task's primary one where runs have it, else the monitored."""
        primary = self.groups[0].runs[0].record.get("primary") if self.groups else None
        return str(primary) if primary in self.scores() else self.monitor

    def best(self) -> RunGroup:
        """The group that is best on average."""
        name, sign = self.primary_metric, 1 if self.higher_is_better(self.primary_metric) else -1
        scored = [group for group in self.groups if group.values(name)]
        return max(scored, key=lambda group: sign * statistics.mean(group.values(name)))

    def scores(self) -> list[str]:
        """The names of all scores, the monitored one first."""
        names = dict.fromkeys([self.monitor])
        for group in self.groups:
            for run in group.runs:
                names.update(dict.fromkeys(name for name in run.record["scores"] if "/" in name))
        return list(names)

    def cheapest(self) -> RunGroup | None:
        """Of the baseline and the groups that are not shown to be worse, the one that trains the fewest parameters.

        A group whose difference is not known, over texts and seeds, is none of them; None where that is every other.
        """
        name = self.primary_metric
        sign = 1 if self.higher_is_better(name) else -1
        known = [group for group in self.groups if name in group.over_seeds]
        good = [g for g in known if max(sign * g.over_seeds[name].low, sign * g.over_seeds[name].high) >= 0]
        if not known:
            return None
        return min(
            [self.groups[0], *good], key=lambda g: (g.cost("trainable") or math.inf, -sign * (g.mean(name) or 0.0))
        )


def compare(runs: Iterable[Run], baseline: str | None = None) -> list[Comparison]:
    """Group runs by task, strategy and settings, and hold every group against the baseline.

    Of each task the runs on the data and base that most of them share are compared; the others, and unfinished ones,
    are left out, and a note says why.

    Args:
        runs: in any order.
        baseline: the strategy, or the label, that differences are to; by default ``full``, or else the first.

    Raises:
        InputError: no group of any task is the baseline.
    """
    tasks: dict[str, list[Run]] = defaultdict(list)
    notes: dict[str, list[str]] = defaultdict(list)
    once = {run.folder.resolve(): run for run in runs}
    for run in once.values():
        task = str(run.record.get("task"))
        scores = run.record.get("scores") or {}
        if run.record.get("status") == "finished" and run.record.get("monitor") not in scores:
            notes[task].append(f"{run.folder} is left out: it has no {run.record.get('monitor')}")
            tasks[task] += []
        elif run.record.get("status") != "finished" or not run.record.get("epochs"):
            what = "trained nothing" if run.record.get("status") == "finished" else str(run.record.get("status"))
            notes[task].append(f"{run.folder} is left out: it is not a finished training run ({what})")
            tasks[task] += []
        else:
            tasks[task].append(run)
    found = [_compare_task(task, group, notes[task], baseline) for task, group in tasks.items()]
    groups = [group for comparison in found for group in comparison.groups]
    if baseline is not None and not any(baseline in (group.strategy, group.label) for group in groups):
        known = ", ".join(dict.fromkeys(group.strategy for group in groups))
        raise InputError(f"baseline: no run is {baseline!r}; there are {known or 'none to compare'}")
    return found


def _compare_task(task: str, runs: list[Run], notes: list[str], baseline: str | None) -> Comparison:
    if not runs:
        return Comparison(task, "", {}, [], notes)
    key = {id(run): json.dumps(run.comparison_key, sort_keys=True) for run in runs}
    (most, _), *_ = Counter(key.values()).most_common(1)
    shared = json.loads(most)
    kept = []
    for run in runs:
        if key[id(run)] == most:
            kept.append(run)
        else:
            other = [name for name, value in json.loads(key[id(run)]).items() if value != shared[name]]
            notes.append(
                f"{run.folder} is left out: other {', '.join(other)} than most ({run.comparison_key[other[0]]})"
            )
    settings: dict[str, list[Run]] = defaultdict(list)
    for run in kept:
        settings[json.dumps([run.strategy, run.flat], sort_keys=True, default=str)].append(run)
    groups = []
    for found in settings.values():
        groups.append(RunGroup(found[0].strategy, _deduplicate_seeds(found, notes), found[0].strategy))
    _disambiguate_labels(groups)
    wanted = baseline or "full"
    groups.sort(key=lambda group: (group.label != wanted, group.strategy != wanted, group.label))
    if wanted not in (groups[0].label, groups[0].strategy) and len(groups) > 1:
        notes.append(f"no run is the baseline {wanted!r}; differences are to {groups[0].label}")
    for split in ("val", "test"):
        _add_differences(groups, split, notes)
    return Comparison(task, str(kept[0].record["monitor"]), shared, groups, notes)


def _add_differences(groups: list[RunGroup], split: str, notes: list[str]) -> None:
    """Hold every group's outcomes of a split against the first group's."""
    first = [run.judged.get(split) for run in groups[0].runs]
    if any(one is None for one in first):
        return
    reference = first[0]
    assert reference is not None
    held = []
    for group in groups:
        found = [run.judged.get(split) for run in group.runs]
        judged = [
            one for one in found if one is not None and one.digest == reference.digest and one.names == reference.names
        ]
        if len(judged) == len(found):
            held.append((group, judged))
        else:
            notes.append(
                f"{group.label} has no differences in {split}: not all of its runs have the outcomes of those rows"
            )
    score = reference.score
    texts = paired_bootstrap([[one.features for one in judged] for _, judged in held], score)  # (R, G, S)
    of_seeds = [np.array([score(one.features.sum(0)) for one in judged]) for _, judged in held]  # (n, S) each
    noise = seed_noise(of_seeds, len(texts))
    for g, (group, _) in enumerate(held[1:], start=1):
        means = of_seeds[g].mean(0) - of_seeds[0].mean(0)
        draws = texts[:, g] - texts[:, 0]
        of_mean = math.sqrt(1 / len(of_seeds[g]) + 1 / len(of_seeds[0]))
        for s, name in enumerate(reference.names):
            group.over_texts[name] = percentile_interval(means[s], draws[:, s])
            if noise is not None:
                group.over_seeds[name] = percentile_interval(means[s], draws[:, s] + of_mean * noise[:, s])


def _deduplicate_seeds(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """The first run of every seed; a note says whether repeated ones scored the same."""
    by_seed: dict[Any, Run] = {}
    for run in sorted(runs, key=lambda run: (run.record.get("seed") or 0, str(run.folder))):
        first = by_seed.setdefault(run.record.get("seed"), run)
        if first is not run:
            same = first.record["scores"] == run.record["scores"]
            verdict = "the same scores to the last digit" if same else "OTHER SCORES"
            notes.append(f"{run.folder} repeats {first.folder}, seed {run.record.get('seed')}: {verdict}")
    return list(by_seed.values())


def _shown(value: Any) -> str:
    text = printable(value)
    return text if len(text) <= _LONGEST_SETTING else f"{text[:_LONGEST_SETTING]}..."


def _disambiguate_labels(groups: list[RunGroup]) -> None:
    """Add to labels that several groups have the settings in which these differ."""
    for label, n in Counter(group.label for group in groups).items():
        if n == 1:
            continue
        same = [group for group in groups if group.label == label]
        names = dict.fromkeys(name for group in same for name in group.runs[0].flat)
        differing = [
            name for name in names if len({json.dumps(g.runs[0].flat.get(name), default=str) for g in same}) > 1
        ]
        for group in same:
            told = [f"{name.rpartition('.')[2]} {_shown(group.runs[0].flat.get(name))}" for name in differing[:_MOST]]
            more = [f"{len(differing) - _MOST} more"] if len(differing) > _MOST else []
            group.label = f"{label} ({', '.join(told + more)})"
