"""Inspection of classifiers: cross-fitted calibration and macro F1 against loops."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.predicted_rows import write_rows, write_run

from gpt2_pl.experiments.error_analysis import Predictions
from gpt2_pl.experiments.inspection.calibration import CalibrationScores, calibrate, cross_fit
from gpt2_pl.experiments.inspection.classification import temperature_text
from gpt2_pl.experiments.inspection.predictions import read_predictions
from gpt2_pl.experiments.inspection.summary import class_scores, macro_f1


@pytest.fixture
def folder(tmp_path):
    """A run with validation rows."""
    return write_rows(write_run(tmp_path / "run"), "val", n=80)


def test_calibration_of_validation_rows_never_scores_a_row_with_its_own_temperature(folder):
    rows = read_predictions(folder / "predictions_val.csv")
    calibration = calibrate(rows, rows, is_validation=True)
    assert calibration.is_cross_fitted
    halves = np.array_split(np.random.default_rng(0).permutation(80), 2)
    grid = np.exp(np.linspace(-3, 3, 3001))
    total = 0.0
    for half, other in (halves, halves[::-1]):
        fitted = min(grid, key=lambda temperature: rows.scaled(temperature).losses[other].sum())
        total += rows.scaled(fitted).losses[half].sum()
    assert calibration.scaled_scores.loss == pytest.approx(total / 80, rel=1e-4)
    assert calibration.scores == CalibrationScores.of(rows)
    assert np.array_equal(cross_fit(rows)[0].probabilities.argmax(1), rows.probabilities.argmax(1))


def test_temperature_text_raised_loss_is_stated(folder):
    """Validation rows that are all wrong ask for the highest temperature; rows that are all right suffer from it."""
    rows = read_predictions(folder / "predictions_val.csv")
    right = replace(rows, labels=rows.probabilities.argmax(1))
    wrong = replace(rows, labels=rows.probabilities.argmin(1))
    for test, validation, raises in ((right, wrong, True), (right, right, False)):
        calibration = calibrate(test, validation, is_validation=False)
        assert (calibration.scaled_scores.loss > calibration.scores.loss) == raises
        assert ("raises the loss of these rows" in temperature_text(calibration, "test")) == raises


def test_macro_f1_equals_a_loop_over_classes(folder):
    rows = read_predictions(folder / "predictions_val.csv")
    scores = []
    for k in range(3):
        both = sum((rows.labels == k) & (rows.predictions == k))
        scores.append(2 * both / (sum(rows.labels == k) + sum(rows.predictions == k)))
        assert class_scores(rows)[k].f1 == pytest.approx(scores[-1])
        assert class_scores(rows)[k].recall == pytest.approx(both / sum(rows.labels == k))
        assert class_scores(rows)[k].precision == pytest.approx(both / sum(rows.predictions == k))
    assert macro_f1(rows) == pytest.approx(np.mean(scores))


def test_macro_f1_leaves_out_classes_that_do_not_occur(folder):
    rows = read_predictions(folder / "predictions_val.csv")
    kept = rows.labels == 0
    few = Predictions([], rows.labels[kept], rows.probabilities[kept], rows.names, [], np.zeros(kept.sum(), int))
    assert macro_f1(few) == 1.0
    assert np.isnan(class_scores(few)[1].recall)
