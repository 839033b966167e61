"""Results of a classifier's inspection in a few lines: for the top of the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpt2_pl.experiments.error_analysis import Confusion, Predictions, Slice
from gpt2_pl.experiments.inspection.calibration import Calibration, CalibrationScores
from gpt2_pl.experiments.inspection.page import one_line
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.distributions import binomial_cdf
from gpt2_pl.experiments.statistics.intervals import wilson_interval

_NAME = 60  # characters of a name of a class or a slice within a sentence


@dataclass(frozen=True)
class Subject:
    """Run with the predictions that are inspected.

    Args:
        run: the run.
        split: split of the rows.
        rows: the predictions.
    """

    run: Run
    split: str
    rows: Predictions


class Agreement(NamedTuple):
    """Numbers of rows that two models predict correctly.

    Args:
        both, first, second, neither: rows that both, only the first, only the second, or neither predicts correctly.
    """

    both: int
    first: int
    second: int
    neither: int

    @classmethod
    def of(cls, first: Predictions, second: Predictions) -> Agreement:
        """Count the rows of two models."""
        a, b = first.hits, second.hits
        return cls(*(int(np.sum(mask)) for mask in (a & b, a & ~b, ~a & b, ~a & ~b)))

    @property
    def p(self) -> float:
        """P-value of McNemar's exact test that both are equally often the only correct one."""
        n, fewer = self.first + self.second, min(self.first, self.second)
        return min(1.0, 2 * float(binomial_cdf(np.array([fewer]), n, 0.5)[0])) if n else 1.0


def percent(value: float, digits: int = 1) -> str:
    """Return a fraction as a percentage; an en dash for NaN."""
    return "\u2013" if math.isnan(value) else f"{100 * value:.{digits}f} %"


def percent_interval(limits: tuple[float, float]) -> str:
    """Return an interval of fractions as percentages, without the unit."""
    return f"{100 * limits[0]:.1f} to {100 * limits[1]:.1f}"


def p_text(p: float) -> str:
    """Return a p-value with three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


class ClassScores(NamedTuple):
    """Scores of one class.

    Args:
        name: name of the class.
        labels, predictions: numbers of rows with this label, and with this prediction.
        precision: fraction of the rows with this prediction that have this label; NaN without such rows.
        recall: fraction of the rows with this label that are predicted so; NaN without such rows.
        f1: harmonic mean of precision and recall; NaN for a class that does not occur.
        probability: mean probability of the class over all rows.
    """

    name: str
    labels: int
    predictions: int
    precision: float
    recall: float
    f1: float
    probability: float


def class_scores(rows: Predictions) -> list[ClassScores]:
    """Return the scores of every class."""
    K = len(rows.names)
    labels, predictions = (np.bincount(values, minlength=K).tolist() for values in (rows.labels, rows.predictions))
    hits = np.bincount(rows.labels[rows.hits], minlength=K).tolist()
    means = rows.probabilities.mean(0).tolist()
    found = []
    for name, n, m, hit, mean in zip(rows.names, labels, predictions, hits, means, strict=True):
        precision, recall, f1 = (a / b if b else math.nan for a, b in ((hit, m), (hit, n), (2 * hit, n + m)))
        found.append(ClassScores(name, n, m, precision, recall, f1, mean))
    return found


def macro_f1(rows: Predictions) -> float:
    """Return the mean F1 of all classes that occur as a label or a prediction."""
    return float(np.nanmean([one.f1 for one in class_scores(rows)]))


def findings(
    subjects: Sequence[Subject], scores: CalibrationScores, pairs: Sequence[Confusion], found: Sequence[Slice]
) -> list[str]:
    """Return the main results as sentences.

    Args:
        subjects: the inspected run and, optionally, a second one.
        scores: calibration of the first run.
        pairs: its confusions, the most frequent first.
        found: its slices.
    """
    rows = subjects[0].rows
    gap = scores.confidence - scores.accuracy
    kind = "overconfident" if gap > 0 else "underconfident"
    sentences = [
        f"{int((~rows.hits).sum()):,} of {len(rows.labels):,} rows are predicted wrongly.",
        f"Mean confidence is {percent(scores.confidence)} and accuracy {percent(scores.accuracy)}"
        + (f": the probabilities are {kind}." if abs(gap) >= 0.01 else "."),
    ]
    if pairs:
        top = pairs[0]
        sentences.append(
            f"The most frequent confusion is {one_line(top.label, _NAME)} predicted as "
            f"{one_line(top.prediction, _NAME)}: {top.num_rows:,} rows, {percent(top.fraction)} of that label."
        )
    rare = [
        one for one in class_scores(rows) if 2 * one.predictions < min(one.labels, one.probability * len(rows.labels))
    ]
    sentences += [
        f"The class {one_line(one.name, _NAME)} is rarely predicted: {one.labels:,} labels, {one.predictions:,} "
        f"predictions and a mean probability of {percent(one.probability)}."
        for one in sorted(rare, key=lambda one: one.predictions / one.labels)[:3]
    ]
    different = sorted((one for one in found if one.differs), key=lambda one: one.accuracy)
    if different:
        worst = different[0]
        sentences.append(
            f"{len(different)} of {len(found)} slices differ from the rest after Holm's adjustment; the lowest "
            f"accuracy is {percent(worst.accuracy)}, of the {worst.num_rows:,} rows of the slice "
            f'"{one_line(worst.name, _NAME)}".'
        )
    else:
        sentences.append(f"None of the {len(found)} slices differs from the rest after Holm's adjustment.")
    if len(subjects) > 1:
        agreement = Agreement.of(rows, subjects[1].rows)
        sentences.append(
            f"Only the first run is right in {agreement.first:,} rows, only the second in {agreement.second:,} "
            f"(McNemar's exact test: p = {p_text(agreement.p)})."
        )
    return sentences


def summary(
    subjects: Sequence[Subject], calibration: Calibration, pairs: Sequence[Confusion], found: Sequence[Slice]
) -> list[str]:
    """Return the lines of the terminal."""
    lines = []
    for subject in subjects:
        rows, n, hits = subject.rows, len(subject.rows.labels), int(subject.rows.hits.sum())
        lines.append(str(subject.run.folder))
        lines.append(f"  {subject.run.record.get('task')}, {subject.run.strategy}, {subject.split}, {n:,} rows")
        interval = percent_interval(wilson_interval(hits, n))
        scores = f"accuracy {percent(hits / n)} ({interval}), macro F1 {percent(macro_f1(rows))}"
        lines.append(f"  {scores}, loss {rows.losses.mean():.3f}")
    if len(subjects) > 1:
        both, first, second, neither = Agreement.of(subjects[0].rows, subjects[1].rows)
        lines.append(f"Right: both {both:,}, only first {first:,}, only second {second:,}, neither {neither:,}")
    before, after = calibration.scores, calibration.scaled_scores
    lines.append(f"Calibration: ECE {percent(before.error)}, Brier {before.brier:.3f}")
    if after is not None:
        how = "2-fold" if calibration.is_cross_fitted else "of the validation rows"
        values = " and ".join(f"{temperature:.3g}" for temperature in calibration.temperatures)
        lines.append(f"  temperature {values} ({how}): ECE {percent(after.error)}, loss {after.loss:.3f}")
        lines += ["  notice: this temperature raises the loss of these rows"] if calibration.raises_loss else []
    lines += ["Most frequent confusions"] if pairs else []
    for pair in pairs[:3]:
        names = f"{one_line(pair.label, 24)} as {one_line(pair.prediction, 24)}"
        lines.append(f"  {names}: {pair.num_rows:,} ({percent(pair.fraction)} of the label)")
    different = sorted((one for one in found if one.differs), key=lambda one: one.accuracy)
    lines.append(f"Slices that differ from the rest: {len(different)} of {len(found)}")
    for one in different[:5]:
        name, accuracy = one_line(one.name, 28), f"{percent(one.accuracy):>7}"
        lines.append(f"  {name:<32} {accuracy}  ({percent_interval(one.interval)}), {one.num_rows:,} rows")
    return lines
