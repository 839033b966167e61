"""Selection of a run's epoch: the score of the best epoch, and the score on rows that did not choose it.

With ``save_predictions: every_epoch``, a run keeps the rows of every validation. Half-split crossing scores each half
of the rows with the checkpoint that is best on the other half; see :mod:`gpt2_pl.experiments.statistics.selection`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.rows import RowScore, RowTable
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.contrast import Floats
from gpt2_pl.experiments.statistics.selection import choose, cross, expected_optimism, half_splits

_MAX_DISAGREEMENT = 1e-3  # of the recorded best score and the best of the tables, relative to 1 or the score


@dataclass(frozen=True, eq=False)
class Selection:
    """Scores of a run on rows that chose no checkpoint.

    Args:
        scores: the crossed scores by name, such as ``val/accuracy``.
        chosen: (E,) how often each of E validations was chosen, in order of training; the sum is that of all halves.
        expected_optimism: upper figure of the optimism by a rule of thumb; None for scores that are not shares.
    """

    scores: dict[str, RowScore]
    chosen: NDArray[np.intp]
    expected_optimism: float | None = None


def select(run: Run) -> Selection | None:
    """Score a run by half-split crossing of its validations.

    Args:
        run: the run.

    Returns:
        The crossed scores; None if the run has no tables of its validations, or no score that chose its epoch in them.

    Raises:
        InputError: a table is invalid, or the tables are not those of the run.
    """
    monitor = str(run.record.get("monitor"))
    tables = run.validations
    if not tables or monitor not in (found := [table.scores().scores for table in tables])[0]:
        return None
    _check(run, tables, [scores[monitor].value for scores in found])
    if (kept := run.kept.get("val")) is not None:
        tables = [table.select(kept.positions, kept.scores.digest) for table in tables]
        found = [table.scores().scores for table in tables]
    sign = -1.0 if run.record.get("mode") == "min" else 1.0
    values = np.array([scores[monitor].contributions for scores in found])

    def goodness(half: NDArray[np.bool_]) -> Floats:
        if found[0][monitor].is_mean:
            means: Floats = sign * values[:, half].mean(1)
            return means
        parts = [{name: column[half] for name, column in table.columns.items()} for table in tables]
        return sign * np.array([table.compute(part)[monitor].value for table, part in zip(tables, parts, strict=True)])

    splits = half_splits(tables[0].digest, len(tables[0]))
    chosen = choose(goodness, splits)
    stacks = {name: np.array([table.columns[name] for table in tables]) for name in tables[0].columns}
    crossed = [
        tables[0].compute({name: cross(stack, first, pair) for name, stack in stacks.items()})
        for first, pair in zip(splits, chosen, strict=True)
    ]
    scores = {name: _mean([scores[name] for scores in crossed]) for name in crossed[0]}
    thumb = expected_optimism(values) if found[0][monitor].is_binary else None
    return Selection(scores, np.bincount(chosen.ravel(), minlength=len(tables)), thumb)


def _mean(scores: list[RowScore]) -> RowScore:
    """Return the mean of a score over splits."""
    contributions = np.mean([score.contributions for score in scores], 0)
    return RowScore(float(np.mean([score.value for score in scores])), contributions, is_mean=scores[0].is_mean)


def _check(run: Run, tables: list[RowTable], scores: list[float]) -> None:
    """Check that tables are of the same rows, and that the best of them has the score of the best epoch.

    Raises:
        InputError: they are not; the message names the folder.
    """
    folder = run.folder / "validations"
    of_best = [run.row_scores["val"].digest] if "val" in run.kept else []
    if len({*of_best, *(table.digest for table in tables)}) > 1:
        raise InputError(f"{folder}: the tables of all validations must have the same rows")
    best = run.record["scores"].get(run.record.get("monitor"))
    finite = [score for score in scores if np.isfinite(score)]
    if best is None or not finite:
        return
    found = min(finite) if run.record.get("mode") == "min" else max(finite)
    if abs(found - best) > _MAX_DISAGREEMENT * max(1.0, abs(best)):
        raise InputError(f"{folder}: the best validation must have the score of the run, {best:.4g}, got {found:.4g}")
