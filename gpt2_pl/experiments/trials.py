"""Trials of the search that chose the settings of a run: their number, their cost and the expected best of k.

A sweep writes the trials of a search beside its runs: those of ``SWEEP/TASK/STRATEGY/seed_N`` are
``SWEEP.search/TASK/STRATEGY/trial_N``, and ``STRATEGY.json`` describes the search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.tuning import BestOfTrials, best_of
from gpt2_pl.utils.yaml_json import read_json

RANDOM = "random"
"""Sampler that draws all trials independently from one distribution."""


@dataclass(frozen=True)
class Trials:
    """Trials of a search.

    Args:
        sampler: ``random``, or the name of a sampler that adapts to earlier trials.
        monitor: name of the score that chose the best trial.
        scores: monitored score of each trial, negative if lower is better; of a failed trial minus infinity.
        cpu_seconds: CPU time of all trials; None if it is not known of any.
        seconds: time of all trials; None if it is not known of any.
    """

    sampler: str
    monitor: str
    scores: tuple[float, ...]
    cpu_seconds: float | None
    seconds: float | None

    @property
    def num_failed(self) -> int:
        """Number of trials without a score."""
        return sum(score == -math.inf for score in self.scores)

    @property
    def is_independent(self) -> bool:
        """Whether the trials are independent draws, without which an expected best of k is not defined."""
        return self.sampler == RANDOM

    def cost(self, name: str) -> float | None:
        """Return ``trials``, ``trial_seconds`` or ``trial_cpu_seconds``."""
        costs = {"trials": len(self.scores), "trial_seconds": self.seconds, "trial_cpu_seconds": self.cpu_seconds}
        return costs[name]

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
        InputError: a file of the search is not JSON.
    """
    strategy = run.folder.resolve().parent
    sweep = strategy.parent.parent
    folder = sweep.with_name(f"{sweep.name}.search") / strategy.parent.name / strategy.name if sweep.name else strategy
    if not (run.folder / "sweep.json").is_file() or not folder.is_dir():
        return None
    records = [_record(trial / "metrics.json") for trial in sorted(folder.glob("trial_*"))]
    if not records:
        return None
    description = folder.with_name(f"{folder.name}.json")
    content = read_json(description) if description.is_file() else None
    sampler = str(content.get("sampler", "tpe")) if isinstance(content, dict) else "unknown"
    monitor = str(run.record.get("monitor"))
    scores = tuple(_score(record, monitor) for record in records)
    seconds, cpu_seconds = (_sum(records, name) for name in ("seconds", "cpu_seconds"))
    return Trials(sampler, monitor, scores, cpu_seconds, seconds)


def _record(file: Path) -> dict[str, Any]:
    from gpt2_pl.utils.run_schema import check_metrics

    return check_metrics(read_json(file), str(file)) if file.is_file() else {}


def _score(record: dict[str, Any], monitor: str) -> float:
    value = (record.get("scores") or {}).get(monitor)
    if record.get("status") != "finished" or value is None or not math.isfinite(value):
        return -math.inf
    return -float(value) if record.get("mode") == "min" else float(value)


def _sum(records: list[dict[str, Any]], name: str) -> float | None:
    known = [float(record[name]) for record in records if record.get(name) is not None]
    return sum(known) if known else None
