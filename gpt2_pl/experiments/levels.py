"""Scores of single arms: intervals, spread over seeds, and runs that failed or collapsed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from gpt2_pl.experiments.differences import LEVEL, measure
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.contrast import contrast
from gpt2_pl.experiments.statistics.intervals import exact_interval, max_rate_unseen, mean_interval, std_interval
from gpt2_pl.experiments.units import Unit

COLLAPSE = 0.10
"""A share that is this much below the median of its arm is that of a collapsed run."""
_MAX_STD = 0.5  # of a share
_MAX_LISTED = 6  # collapsed runs in a notice


def score_interval(runs: Sequence[Run], score: str, unit: Unit) -> tuple[float, float] | None:
    """Return the interval of an arm's mean score over new seeds and new texts; of one run over new texts.

    Args:
        runs: the usable runs of the arm.
        score: name of the score.
        unit: unit of the score.

    Returns:
        The limits, lower first, in the unit of the score, shares from 0 to 1; None if the runs do not give an interval.
    """
    if not runs:
        return None
    found = measure(runs, score, unit)
    if len(runs) > 1:
        mean = contrast([found.arm], [1.0])
        limits = mean.interval(LEVEL) if mean.has_interval else None
    elif found.digest is None:
        limits = None
    elif found.is_binary:
        limits = mean_interval(np.abs(found.arm.contributions[0]), LEVEL)
        limits = limits and (unit.sign * limits[0], unit.sign * limits[1])
    else:
        contributions = found.arm.contributions[0]
        limits = mean_interval(contributions, LEVEL)
        shift = float(found.arm.scores[0] - contributions.mean())  # the interval is that of the score itself
        limits = limits and (limits[0] + shift, limits[1] + shift)
    if limits is None:
        return None
    low, high = sorted(unit.limit_score(unit.external(limit)) for limit in limits)
    return low, high


def spread_interval(values: Sequence[float], unit: Unit) -> tuple[float, float] | None:
    """Return the interval of the standard deviation over seeds, for shares at most 0.5; None for fewer than two."""
    if len(values) < 2:
        return None
    limits = std_interval(statistics.stdev(values), len(values), LEVEL)
    low, high = (min(limit, _MAX_STD) if unit.is_percent else limit for limit in limits)
    return low, high


def collapsed(runs: Sequence[Run], score: str, unit: Unit) -> list[Run]:
    """Return the runs far below their arm: by :data:`COLLAPSE` below its median, or below the majority class.

    Args:
        runs: the usable runs of the arm.
        score: name of the score; only shares are judged.
        unit: unit of the score.
    """
    if not unit.is_percent or not runs:
        return []
    values = [unit.sign * (run.score(score) or 0.0) for run in runs]
    median = statistics.median(values)
    return [
        run
        for run, value in zip(runs, values, strict=True)
        if value < median - COLLAPSE or (score.endswith("/accuracy") and value < _majority_share(run, score))
    ]


def _majority_share(run: Run, score: str) -> float:
    """Return the accuracy of the majority class, the most frequent class of the training rows; -inf if not known."""
    of_split = run.compared_rows(score.partition("/")[0])
    counts = ((run.record.get("data") or {}).get("class_counts") or {}).get("train")
    if of_split is None or of_split.label_shares is None or not counts:
        return -math.inf
    majority = int(np.argmax(counts))
    return of_split.label_shares[majority] if majority < len(of_split.label_shares) else 0.0


def reliability_notices(usable: Sequence[Run], failed: Sequence[Run], score: str, unit: Unit) -> list[str]:
    """Return notices on failed and collapsed runs of an arm.

    Args:
        usable: the runs of the arm with a usable score.
        failed: the runs that failed or whose score is not finite.
        score: name of the score.
        unit: unit of the score.
    """
    notices, total = [], len(usable) + len(failed)
    if failed:
        notices.append(f"{len(failed)} of {total} runs failed ({_rate_text(len(failed), total)})")
    bad = collapsed(usable, score, unit)
    if bad:
        runs = ", ".join(
            f"seed {run.record.get('seed')}: {unit.format_score(run.score(score) or 0.0)}" for run in bad[:_MAX_LISTED]
        )
        rate = _rate_text(len(bad), len(usable))
        notices.append(f"collapsed runs: {len(bad)} of {len(usable)} ({runs}; {rate}), kept in the analysis")
    return notices


def _rate_text(count: int, total: int) -> str:
    low, high = exact_interval(count, total, LEVEL)
    return f"95 % of the rate: {100 * low:.0f} to {100 * high:.0f} %"


def collapse_text(runs: Sequence[Run], score: str, unit: Unit) -> str:
    """Return the number of collapsed runs of an arm and, without one, the highest rate compatible with that."""
    if not runs or not unit.is_percent:
        return ""
    count = len(collapsed(runs, score, unit))
    bound = "" if count else f" (rate ≤ {100 * max_rate_unseen(len(runs), LEVEL):.0f} %)"
    return f"{count} of {len(runs)}{bound}"
