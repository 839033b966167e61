"""Trials of the search that chose the settings of a run: their scores, their costs and the expected best of k.

A sweep writes the trials of a search beside its runs: those of ``SWEEP/TASK/STRATEGY/seed_N`` are
``SWEEP.search/TASK/STRATEGY/trial_N``, and ``STRATEGY.json`` describes the search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.costs import BUDGETS, budget_cost
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.tuning import BestOfTrials, best_of
from gpt2_pl.utils.yaml_json import read_json

if TYPE_CHECKING:
    from gpt2_pl.utils.run_schema import SearchRecord

RANDOM = "random"
"""Sampler that draws all trials independently from one distribution."""
_MAX_LISTED = 6  # strategies in a note
_ROUNDING = 1e-9  # of a number of trials


@dataclass(frozen=True)
class Trials:
    """Trials of a search.

    Args:
        sampler: ``random``, or the name of a sampler that adapts to earlier trials.
        monitor: name of the score that chose the best trial.
        scores: monitored score of each trial, negative if lower is better; of a failed trial minus infinity.
        costs: for each of the :data:`~gpt2_pl.experiments.costs.BUDGETS` the costs of the trials that record it.
        pretraining: for each cost the part that is paid once before the first trial; 0 without a pretraining run.
        space: for each searched key its choices or its range.
        seed: seed of the sampler and of the trials; None if it is not known.
        chosen: for each searched key the chosen value, as text.
    """

    sampler: str
    monitor: str
    scores: tuple[float, ...]
    costs: Mapping[str, tuple[float, ...]]
    pretraining: Mapping[str, float]
    space: Mapping[str, Any]
    seed: int | None
    chosen: Mapping[str, str]

    @property
    def num_failed(self) -> int:
        """Number of trials without a score."""
        return sum(score == -math.inf for score in self.scores)

    @property
    def is_independent(self) -> bool:
        """Whether the trials are independent draws, without which an expected best of k is not defined."""
        return self.sampler == RANDOM

    def total(self, cost: str) -> float | None:
        """Return the sum of a cost over the trials that record it; None if none does."""
        return self.pretraining[cost] + sum(self.costs[cost]) if self.costs.get(cost) else None

    def mean_cost(self, cost: str, k: int) -> float | None:
        """Return the expected cost of k trials; None if no trial records it."""
        known = self.costs.get(cost)
        return self.pretraining[cost] + k * sum(known) / len(known) if known else None

    def within(self, cost: str, budget: float) -> int:
        """Return how many trials a budget is expected to pay for, at most those of the search."""
        of_none, of_one = self.mean_cost(cost, 0), self.mean_cost(cost, 1)
        if of_none is None or of_one is None or budget < of_none:
            return 0
        n, each = len(self.scores), of_one - of_none
        affordable = (budget - of_none) / each + _ROUNDING if each > 0 else n
        return math.floor(affordable) if affordable < n else n

    def best_of(self, k: int, worst: float = -math.inf) -> BestOfTrials:
        """Estimate the best monitored score of k trials, negative if lower is better.

        Args:
            k: number of trials, from 1 to the number of the search.
            worst: score of a failed trial.

        Raises:
            InputError: the sampler adapts to earlier trials.
        """
        if not self.is_independent:
            expected = f"{RANDOM}, because the trials of others are not independent"
            raise InputError(key="sampler", value=self.sampler, expected=expected)
        return best_of(np.maximum(self.scores, worst), k)


def find_trials(run: Run) -> Trials | None:
    """Return the trials of the search that chose the settings of a sweep's run; None if there was no search.

    Raises:
        InputError: a file of the search is invalid.
    """
    strategy = run.folder.resolve().parent
    sweep = strategy.parent.parent
    folder = sweep.with_name(f"{sweep.name}.search") / strategy.parent.name / strategy.name if sweep.name else strategy
    if not (run.folder / "sweep.json").is_file() or not folder.is_dir():
        return None
    records = [_record(trial / "metrics.json") for trial in sorted(folder.glob("trial_*"))]
    if not records:
        return None
    monitor = str(run.record.get("monitor"))
    parts = {name: [part for one in records if (part := budget_cost(one, name))] for name in BUDGETS}
    search = _description(folder.with_name(f"{folder.name}.json"))
    flags = {} if run.sweep_record is None else run.sweep_record.flags
    return Trials(
        sampler="unknown" if search is None else search.sampler,
        monitor=monitor,
        scores=tuple(_score(record, monitor) for record in records),
        costs={name: tuple(alone for _, alone in known) for name, known in parts.items()},
        pretraining={name: max((base for base, _ in known), default=0.0) for name, known in parts.items()},
        space={} if search is None else search.space,
        seed=None if search is None else search.seed,
        chosen={} if search is None else {key: flags[key] for key in search.space if key in flags},
    )


def _record(file: Path) -> dict[str, Any]:
    from gpt2_pl.utils.run_schema import check_metrics

    return check_metrics(read_json(file), str(file)) if file.is_file() else {}


def _description(file: Path) -> SearchRecord | None:
    from gpt2_pl.utils.run_schema import SearchRecord
    from gpt2_pl.utils.schema import validate

    return validate(SearchRecord, read_json(file), str(file)) if file.is_file() else None


def _score(record: dict[str, Any], monitor: str) -> float:
    value = (record.get("scores") or {}).get(monitor)
    if record.get("status") != "finished" or value is None or not math.isfinite(value):
        return -math.inf
    return -float(value) if record.get("mode") == "min" else float(value)


def tuning_notes(searches: Mapping[str, Trials | None]) -> list[str]:
    """Return notes on how strategies were tuned differently.

    Args:
        searches: the trials of every strategy, by label; None if no search is known.
    """
    notes = []
    adaptive = [
        f"{name}: {trials.sampler}"
        for name, trials in searches.items()
        if trials is not None and not trials.is_independent
    ]
    if adaptive:
        which = _listed(adaptive)
        notes.append(
            f"The best of fewer trials is not estimated for samplers that adapt to earlier trials ({which}); it needs "
            "sampler: random."
        )
    counts = {name: 0 if trials is None else len(trials.scores) for name, trials in searches.items()}
    if len(set(counts.values())) > 1:
        which = _listed([f"{name}: {count or 'no search is known'}" for name, count in counts.items()])
        untuned = " An untuned strategy beside tuned ones is compared unfairly." if 0 in counts.values() else ""
        notes.append(
            f"Strategies were tuned with different numbers of trials ({which}). More trials find better settings, so "
            f"that a part of a difference can be due to the search.{untuned}"
        )
    return notes


def _listed(texts: list[str]) -> str:
    more = [f"{len(texts) - _MAX_LISTED} more"] if len(texts) > _MAX_LISTED else []
    return ", ".join([*texts[:_MAX_LISTED], *more])
