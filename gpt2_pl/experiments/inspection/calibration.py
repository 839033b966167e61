"""Calibration of a classifier: scores, reliability diagram, and the temperature that is stored with a run.

References:
    Guo et al. (2017), On Calibration of Modern Neural Networks. Okabe and Ito (2008), Color universal design.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.errors import InputError, RunError
from gpt2_pl.experiments.error_analysis import (
    Bin,
    Predictions,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.utils.plots import drawing

CALIBRATION_FILE = "calibration.json"
MIN_ROWS = 20
"""With fewer rows no temperature is fitted."""
_FOLD_SEED = 0
_BLUE, _VERMILION = "#0072b2", "#d55e00"  # of the palette by Okabe and Ito, for any colour vision


class CalibrationScores(NamedTuple):
    """Scores of class probabilities.

    Args:
        loss: mean negative log probability of the true class.
        brier: Brier score.
        error: expected calibration error.
        confidence: mean probability of the most probable class.
        accuracy: how often the most probable class is the true one.
    """

    loss: float
    brier: float
    error: float
    confidence: float
    accuracy: float

    @classmethod
    def of(cls, rows: Predictions) -> CalibrationScores:
        """Compute the scores of predictions."""
        hits = rows.probabilities.argmax(1) == rows.labels
        confidence = float(rows.probabilities.max(1).mean())
        error = expected_calibration_error(rows)
        return cls(float(rows.losses.mean()), brier_score(rows), error, confidence, float(hits.mean()))


@dataclass(frozen=True)
class Calibration:
    """Calibration of inspected rows, before and after temperature scaling.

    Args:
        scores: scores of the probabilities as predicted.
        bins: their reliability.
        scaled_scores: scores after scaling; None without scaling.
        scaled_bins: reliability after scaling; empty without scaling.
        temperatures: the temperatures with which the inspected rows were scaled: one that was fitted on validation
            rows, or two that were each fitted on one half of the inspected rows and applied to the other half.
        stored: temperature fitted on all validation rows; None if the run has none.
        num_fitted: number of validation rows on which ``stored`` was fitted.
    """

    scores: CalibrationScores
    bins: Sequence[Bin]
    scaled_scores: CalibrationScores | None
    scaled_bins: Sequence[Bin]
    temperatures: tuple[float, ...]
    stored: float | None
    num_fitted: int

    @property
    def raises_loss(self) -> bool:
        """Whether scaling raises the loss of the inspected rows."""
        return self.scaled_scores is not None and self.scaled_scores.loss > self.scores.loss

    @property
    def is_cross_fitted(self) -> bool:
        """Whether the temperatures were fitted on halves of the inspected rows."""
        return len(self.temperatures) > 1


def calibrate(rows: Predictions, validation: Predictions | None, is_validation: bool) -> Calibration:
    """Score the calibration of rows, before and after temperature scaling.

    A temperature is never scored on rows on which it was fitted. Rows other than those of validation are scaled by the
    temperature of the validation rows. Otherwise the rows are halved at random, and each half is scaled by the
    temperature of the other (2-fold cross-fitting).

    Args:
        rows: the inspected rows.
        validation: validation rows of the same run, if there are any.
        is_validation: whether ``rows`` are the validation rows.
    """
    num_fitted = 0 if validation is None else len(validation.labels)
    stored = fit_temperature(validation) if validation is not None and num_fitted >= MIN_ROWS else None
    scaled, temperatures = None, tuple[float, ...]()
    if stored is not None and not is_validation:
        scaled, temperatures = rows.scaled(stored), (stored,)
    elif len(rows.labels) >= MIN_ROWS:
        scaled, temperatures = cross_fit(rows)
    return Calibration(
        scores=CalibrationScores.of(rows),
        bins=reliability(rows),
        scaled_scores=None if scaled is None else CalibrationScores.of(scaled),
        scaled_bins=[] if scaled is None else reliability(scaled),
        temperatures=temperatures,
        stored=stored,
        num_fitted=num_fitted if stored is not None else 0,
    )


def cross_fit(rows: Predictions) -> tuple[Predictions, tuple[float, float]]:
    """Scale each half of the rows, drawn with a fixed seed, by the temperature fitted on the other half.

    Returns:
        The scaled predictions in the order of the rows, and the temperatures of the first and the second half.
    """
    order = np.random.default_rng(_FOLD_SEED).permutation(len(rows.labels))
    halves = np.array_split(order, 2)
    probabilities, temperatures = np.empty_like(rows.probabilities), []
    for half, other in (halves, halves[::-1]):
        temperatures.append(fit_temperature(_select(rows, other)))
        probabilities[half] = _select(rows, half).scaled(temperatures[-1]).probabilities
    return replace(rows, probabilities=probabilities), (temperatures[0], temperatures[1])


def _select(rows: Predictions, indices: NDArray[Any]) -> Predictions:
    """Return the probabilities and labels of some rows, without texts."""
    return Predictions([], rows.labels[indices], rows.probabilities[indices], rows.names, [])


def store_temperature(folder: Path, calibration: Calibration) -> str:
    """Write the temperature that was fitted on validation rows to a run folder.

    Args:
        folder: folder of the run.
        calibration: the calibration; nothing is written without a stored temperature.

    Returns:
        What was written, or why it was not, in one line.
    """
    if calibration.stored is None:
        return f"{CALIBRATION_FILE} is not written: fewer than {MIN_ROWS} validation rows have predictions"
    content = {"temperature": calibration.stored, "split": "val", "rows": calibration.num_fitted}
    try:
        with atomic_write(folder / CALIBRATION_FILE) as file:
            file.write(json.dumps(content, indent=2) + "\n")
    except (InputError, RunError) as error:  # the folder of a run may be read-only
        return f"{CALIBRATION_FILE} is not written: {error}"
    return f"{folder / CALIBRATION_FILE} has the temperature {calibration.stored:.4g} for new rows"


def reliability_diagram(calibration: Calibration) -> bytes:
    """Return a PNG image: accuracy by confidence with 95 % intervals, and the number of rows in each bin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 6.2))
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.09, top=0.97, hspace=0.08)
    axes.plot([0, 1], [0, 1], color="#555555", linestyle="--", linewidth=1, label="calibrated")
    series = [("as predicted", calibration.bins, _BLUE, "o", 0.0)]
    if calibration.scaled_bins:
        series.append(("temperature-scaled", calibration.scaled_bins, _VERMILION, "s", 0.004))
    for label, bins, color, marker, shift in series:
        x = np.array([one.confidence for one in bins]) + shift
        y = np.array([one.accuracy for one in bins])
        limits = np.array([one.interval for one in bins])
        errors = np.maximum([y - limits[:, 0], limits[:, 1] - y], 0.0)
        axes.errorbar(x, y, errors, fmt=marker, color=color, markersize=5, capsize=3, linewidth=1.2, label=label)
        edges = [*(one.low for one in bins)]
        widths = [one.high - one.low for one in bins]
        style: dict[str, Any] = {"color": color, "alpha": 0.35} if marker == "o" else {"fill": False, "hatch": "///"}
        counts.bar(edges, [one.num_rows for one in bins], widths, align="edge", edgecolor=color, **style)
    axes.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left", frameon=False)
    counts.set(xlabel="confidence (probability of the most probable class)", ylabel="rows")
    for panel in (axes, counts):
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    file = io.BytesIO()
    with drawing():
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
