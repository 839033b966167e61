"""Runs with the same configuration and different seeds: their scores and costs."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2_pl.errors import printable
from gpt2_pl.experiments.costs import record_cost
from gpt2_pl.experiments.differences import Difference, is_usable
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.selection import Selection
from gpt2_pl.experiments.trials import Trials

_MAX_VALUE_CHARACTERS, _MAX_SETTINGS = 200, 20  # limits of a setting's value in a label, and of a label's settings


@dataclass
class RunGroup:
    """Runs with the same configuration and different seeds.

    Args:
        label: display name.
        runs: one run per seed.
        strategy: the part of the label that the strategy files determine.
        failed: runs with this configuration that ended with an error.
        differences: for each score, the difference to the baseline. Empty for the baseline.
        notices: what a reader must know about the runs, such as that one has collapsed.
        trials: the search that chose the settings of the runs; None if none is known.
        selections: for each run its scores of rows that did not choose the epoch; empty if not all runs have them.
    """

    label: str
    runs: list[Run]
    strategy: str = ""
    failed: list[Run] = field(default_factory=list)
    differences: dict[str, Difference] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    trials: Trials | None = None
    selections: list[Selection] = field(default_factory=list)

    @property
    def training_rows(self) -> int | None:
        """Number of training rows; None if it is not known."""
        rows = self.runs[0].flat.get("data.training_rows")
        return rows if isinstance(rows, int) else None

    @property
    def shots(self) -> int | None:
        """Number of training rows of each class, ``data.shots``; None without it."""
        shots = self.runs[0].flat.get("data.shots")
        return shots if isinstance(shots, int) else None

    def values(self, score: str) -> list[float]:
        """Return a score of every run that has it."""
        return [value for run in self.runs if (value := run.score(score)) is not None]

    def usable(self, score: str) -> list[Run]:
        """Return the runs with a score that is a number of usual size, on all of its rows."""
        return [run for run in self.runs if is_usable(run, score)]

    def usable_values(self, score: str) -> list[float]:
        """Return the score of every usable run."""
        return [value for run in self.usable(score) if (value := run.score(score)) is not None]

    def mean(self, score: str) -> float | None:
        """Return the mean of a score over usable runs: None if no run has the score, NaN if no run is usable."""
        if usable := self.usable_values(score):
            return statistics.mean(usable)
        return math.nan if self.values(score) else None

    def std(self, score: str) -> float | None:
        """Return the standard deviation of a score over usable runs: None for fewer than two."""
        usable = self.usable_values(score)
        return statistics.stdev(usable) if len(usable) > 1 else None

    def cost(self, name: str) -> float | None:
        """Return the median of a cost over runs.

        Args:
            name: ``trials``, a cost of :func:`~gpt2_pl.experiments.costs.record_cost`, or ``trial_`` before one of the
                :data:`~gpt2_pl.experiments.costs.BUDGETS`, for the sum over the trials of the search that chose the
                settings.

        Returns:
            The median, or None if no run has the cost.
        """
        if name == "trials":
            return None if self.trials is None else len(self.trials.scores)
        if name.startswith("trial_"):
            return None if self.trials is None else self.trials.total(name.removeprefix("trial_"))
        costs = [value for run in self.runs if (value := record_cost(run.record, name)) is not None]
        return statistics.median(costs) if costs else None


def deduplicate_seeds(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """Return the first run of each seed; notes state whether repeated runs have the same scores."""
    by_seed: dict[Any, Run] = {}
    for run in sorted(runs, key=lambda run: (run.record.get("seed") or 0, str(run.folder))):
        first = by_seed.setdefault(run.record.get("seed"), run)
        if first is not run:
            same = first.record["scores"] == run.record["scores"]
            verdict = "the same scores to the last digit" if same else "OTHER SCORES"
            notes.append(f"{run.path} repeats {first.path}, seed {run.record.get('seed')}: {verdict}")
    return list(by_seed.values())


def _shorten_value(value: Any) -> str:
    text = printable(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[:_MAX_VALUE_CHARACTERS]}..."


def disambiguate_labels(groups: Sequence[RunGroup]) -> None:
    """Append to the labels of groups with the same label the settings in which the groups differ."""
    for label, n in Counter(group.label for group in groups).items():
        if n == 1:
            continue
        same = [group for group in groups if group.label == label]
        names = dict.fromkeys(name for group in same for name in group.runs[0].flat)
        differing = [
            name for name in names if len({json.dumps(g.runs[0].flat.get(name), default=str) for g in same}) > 1
        ]
        if "data.shots" in differing:  # which determines the number of rows
            differing = [name for name in differing if name != "data.training_rows"]
        more = [f"{len(differing) - _MAX_SETTINGS} more"] if len(differing) > _MAX_SETTINGS else []
        for group in same:
            values = group.runs[0].flat
            settings = [
                f"{name.rpartition('.')[2]} {_shorten_value(values.get(name))}" for name in differing[:_MAX_SETTINGS]
            ]
            group.label = f"{label} ({', '.join(settings + more)})"
