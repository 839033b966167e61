"""Where a classifier errs: rows with the highest loss, confusions, calibration, slices and disagreements.

References:
    Guo et al. (2017), On Calibration of Modern Neural Networks (expected calibration error, temperature scaling). Brier
    (1950), Verification of forecasts expressed in terms of probability. Holm (1979), A simple sequentially rejective
    multiple test procedure.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.statistics.contrast import Floats
from gpt2_pl.experiments.statistics.intervals import wilson_interval

NUM_BINS = 15
"""Bins of equal width over the confidence."""
_SMALLEST = 1e-12  # probabilities below it count as this much in a loss
_TIE = 1e-7  # relative; outcomes that differ less are equally probable but for rounding
NEGATION = r"\b(?:not|no|never|nothing|nobody|neither|nor|none|hardly|without|cannot)\b|n['\u2019]t\b"
"""Pattern of texts that contain a negation, in English."""


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of labeled rows.

    Args:
        texts: (N,) text of each row.
        labels: (N,) true classes.
        probabilities: (N, K).
        names: (K,) names of the classes.
        row_numbers: (N,) number of each row in its file.
        decisions: (N,) predicted classes, if they are not the most probable ones, as with a tuned threshold.
    """

    texts: Sequence[str]
    labels: NDArray[np.integer]
    probabilities: Floats
    names: Sequence[str]
    row_numbers: Sequence[int]
    decisions: NDArray[np.integer] | None = None

    @property
    def predictions(self) -> NDArray[np.integer]:
        """(N,) predicted classes, by default the most probable ones."""
        classes: NDArray[np.integer] = self.probabilities.argmax(1) if self.decisions is None else self.decisions
        return classes

    @property
    def hits(self) -> NDArray[np.bool_]:
        """(N,) whether each row is predicted correctly."""
        hits: NDArray[np.bool_] = self.predictions == self.labels
        return hits

    @property
    def losses(self) -> Floats:
        """(N,) negative log probability of the true class."""
        of_label = self.probabilities[np.arange(len(self.labels)), self.labels]
        losses: Floats = -np.log(np.maximum(of_label, _SMALLEST))
        return losses

    @property
    def lengths(self) -> NDArray[np.integer]:
        """(N,) number of words of each text."""
        return np.array([len(text.split()) for text in self.texts])

    def scaled(self, temperature: float) -> Predictions:
        """Return the predictions with the logits divided by a temperature."""
        logits = np.log(np.maximum(self.probabilities, _SMALLEST)) / temperature
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return replace(self, probabilities=weights / weights.sum(1, keepdims=True))


class Bin(NamedTuple):
    """Rows whose confidence is within an interval.

    Args:
        low, high: the interval of confidence.
        num_rows: number of rows.
        confidence: mean confidence.
        accuracy: accuracy of the rows.
        interval: 95 % interval of the accuracy.
    """

    low: float
    high: float
    num_rows: int
    confidence: float
    accuracy: float
    interval: tuple[float, float]


def reliability(rows: Predictions, num_bins: int = NUM_BINS) -> list[Bin]:
    """Return accuracy by confidence, in bins of equal width; empty bins are left out.

    Confidence is the probability of the most probable class, and accuracy is how often that class is the true one.
    """
    confidence, hits = rows.probabilities.max(1), rows.probabilities.argmax(1) == rows.labels
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    members = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, num_bins - 1)
    bins = []
    for i in np.unique(members):
        inside = members == i
        n, correct = int(inside.sum()), int(hits[inside].sum())
        interval = wilson_interval(correct, n)
        bins.append(Bin(edges[i], edges[i + 1], n, float(confidence[inside].mean()), correct / n, interval))
    return bins


def expected_calibration_error(rows: Predictions, num_bins: int = NUM_BINS) -> float:
    """Return the mean difference of confidence and accuracy over bins, weighted by their rows."""
    bins = reliability(rows, num_bins)
    return sum(b.num_rows * abs(b.confidence - b.accuracy) for b in bins) / len(rows.labels)


def brier_score(rows: Predictions) -> float:
    """Return the mean squared distance of the probabilities from the one-hot labels, summed over classes."""
    one_hot = np.eye(rows.probabilities.shape[1])[rows.labels]
    return float(np.square(rows.probabilities - one_hot).sum(1).mean())


def fit_temperature(rows: Predictions) -> float:
    """Return the temperature that minimizes the loss on validation rows.

    Fit it on other rows than those on which the calibrated model is scored.
    """
    from scipy.optimize import minimize_scalar

    result = minimize_scalar(
        lambda log_t: float(rows.scaled(np.exp(log_t)).losses.mean()), bounds=(-3.0, 3.0), method="bounded"
    )
    return float(np.exp(result.x))


class Confusion(NamedTuple):
    """Rows of one true class that are predicted as another.

    Args:
        label, prediction: names of the classes.
        num_rows: number of such rows.
        fraction: their fraction of the rows with this label.
    """

    label: str
    prediction: str
    num_rows: int
    fraction: float


def confusions(rows: Predictions) -> list[Confusion]:
    """Return all confusions that occur, the most frequent first."""
    K = rows.probabilities.shape[1]
    counts = np.bincount(rows.labels * K + rows.predictions, minlength=K * K).reshape(K, K)
    pairs = [
        Confusion(rows.names[i], rows.names[j], int(counts[i, j]), float(counts[i, j] / counts[i].sum()))
        for i in range(K)
        for j in range(K)
        if i != j and counts[i, j]
    ]
    return sorted(pairs, key=lambda pair: -pair.num_rows)


class Slice(NamedTuple):
    """Accuracy of the rows with a property.

    Args:
        name: the property.
        num_rows: number of rows.
        accuracy: accuracy of the rows.
        interval: 95 % interval of the accuracy.
        loss: mean loss of the rows.
        p: p-value of the hypothesis that the accuracy equals that of all other rows: Fisher's exact test, adjusted for
            the number of slices (Holm).
        differs: whether ``p`` is below 0.05.
    """

    name: str
    num_rows: int
    accuracy: float
    interval: tuple[float, float]
    loss: float
    p: float
    differs: bool


def slices(
    rows: Predictions, columns: Mapping[str, Sequence[Any]] | None = None, patterns: Mapping[str, str] | None = None
) -> list[Slice]:
    """Return the accuracy of rows by length, label, column and pattern.

    Args:
        rows: the predictions.
        columns: further columns of the rows, by name; each of their values is a slice.
        patterns: regular expressions by name; rows whose text matches, in any case, are a slice.

    Returns:
        The slices that have rows. The test of whether they differ from the rest is adjusted for their number.

    Raises:
        InputError: a pattern is no regular expression.
    """
    named = _length_quartiles(rows.lengths)
    for k, name in enumerate(rows.names):
        named[f"label {name}"] = rows.labels == k
    for column, values in (columns or {}).items():
        for value in dict.fromkeys(values):
            named[f"{column} {value}"] = np.array([other == value for other in values])
    for name, pattern in (patterns or {}).items():
        try:
            expression = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise InputError(key="pattern", value=pattern, expected=f"a regular expression ({error})") from None
        matches = np.array([expression.search(text) is not None for text in rows.texts])
        named[f"with {name}"], named[f"without {name}"] = matches, ~matches
    named = {name: inside for name, inside in named.items() if inside.any()}
    hits, losses = rows.hits, rows.losses
    adjusted = holm([_fisher(hits, inside) for inside in named.values()])
    return [_slice(hits, losses, name, inside, p) for (name, inside), p in zip(named.items(), adjusted, strict=True)]


def _length_quartiles(lengths: NDArray[np.integer]) -> dict[str, NDArray[np.bool_]]:
    """Return which rows are in each quartile of the number of words; fewer if quartiles are equal."""
    named = {}
    edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1], method="lower"))
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (lengths >= low) & ((lengths <= high) if i == len(edges) - 2 else (lengths < high))
        named[f"{low} to {high if i == len(edges) - 2 else high - 1} words"] = inside
    return named


def _slice(hits: NDArray[np.bool_], losses: Floats, name: str, inside: NDArray[np.bool_], p: float) -> Slice:
    n, correct = int(inside.sum()), int(hits[inside].sum())
    return Slice(name, n, correct / n, wilson_interval(correct, n), float(losses[inside].mean()), p, p < 0.05)


def _fisher(hits: NDArray[np.bool_], inside: NDArray[np.bool_]) -> float:
    """Return the p-value of Fisher's exact test that hits are as frequent inside as outside; 1 if all are inside."""
    from scipy.special import gammaln

    N, total, n, correct = len(hits), int(hits.sum()), int(inside.sum()), int(hits[inside].sum())

    def log_ways(items: int, chosen: NDArray[np.int_]) -> Floats:
        ways: Floats = gammaln(items + 1) - gammaln(chosen + 1) - gammaln(items - chosen + 1)
        return ways

    possible = np.arange(max(0, n + total - N), min(n, total) + 1)  # numbers of hits inside
    log_p = log_ways(total, possible) + log_ways(N - total, n - possible)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    return min(1.0, float(p[p <= p[correct - possible[0]] * (1 + _TIE)].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, so that the chance of any false rejection is bounded (Holm 1979).

    Args:
        p_values: the p-values.

    Returns:
        The adjusted p-values, in the same order.
    """
    order, adjusted, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def highest_losses(rows: Predictions, count: int) -> NDArray[np.intp]:
    """Return the indices of the rows with the highest loss, in descending order."""
    return np.argsort(-rows.losses, kind="stable")[:count]


def disagreements(first: Predictions, second: Predictions) -> NDArray[np.intp]:
    """Return the rows that exactly one of two models predicts correctly, those with the largest loss difference first.

    Raises:
        InputError: the models were not evaluated on the same rows.
    """
    if list(first.texts) != list(second.texts) or not np.array_equal(first.labels, second.labels):
        raise InputError("the two runs were evaluated on different rows", key="runs")
    rows = np.flatnonzero(first.hits != second.hits)
    return rows[np.argsort(-np.abs(first.losses - second.losses)[rows], kind="stable")]
