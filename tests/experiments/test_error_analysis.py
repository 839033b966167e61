"""Calibration, slices and disagreements against torchmetrics, scikit-learn and recounting."""

import dataclasses

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.error_analysis import (
    NEGATION,
    Predictions,
    brier_score,
    confusions,
    disagreements,
    expected_calibration_error,
    fit_temperature,
    highest_losses,
    reliability,
    slices,
)


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(400, 3)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([generator.choice(3, p=p) for p in probabilities])
    words = ["good", "bad", "not", "film", "never"]
    texts = [" ".join(generator.choice(words, generator.integers(1, 20))) for _ in labels]
    return Predictions(texts, labels, probabilities, ["low", "mid", "high"], list(range(1, 401)))


def test_calibration_error_equals_torchmetrics(rows):
    expected = multiclass_calibration_error(
        torch.tensor(rows.probabilities), torch.tensor(rows.labels), num_classes=3, n_bins=15
    )
    assert expected_calibration_error(rows) == pytest.approx(float(expected))


def test_reliability_bins_hold_every_row_once(rows):
    bins = reliability(rows)
    assert sum(b.num_rows for b in bins) == 400
    assert sum(b.num_rows * b.accuracy for b in bins) == pytest.approx(rows.hits.sum())
    assert all(b.low < b.confidence <= b.high for b in bins)
    assert all(b.interval[0] <= b.accuracy <= b.interval[1] for b in bins)


def test_brier_score_equals_a_loop(rows):
    total = 0.0
    for p, label in zip(rows.probabilities, rows.labels, strict=True):
        total += sum((p[k] - (k == label)) ** 2 for k in range(3))
    assert brier_score(rows) == pytest.approx(total / 400)


def test_temperature_of_overconfident_predictions_restores_their_calibration(rows):
    assert fit_temperature(rows) == pytest.approx(1.0, abs=0.25)  # 400 rows
    sharp = rows.scaled(1 / 3)
    temperature = fit_temperature(sharp)
    assert temperature == pytest.approx(3 * fit_temperature(rows), rel=1e-2)
    assert expected_calibration_error(sharp.scaled(temperature)) < expected_calibration_error(sharp)
    assert np.array_equal(sharp.predictions, rows.predictions)


def test_confusions_equal_a_recount(rows):
    for confusion in confusions(rows):
        i, j = rows.names.index(confusion.label), rows.names.index(confusion.prediction)
        n = sum(1 for label, p in zip(rows.labels, rows.predictions, strict=True) if (label, p) == (i, j))
        assert confusion.num_rows == n > 0
        assert confusion.fraction == n / (rows.labels == i).sum()
    assert sum(c.num_rows for c in confusions(rows)) == (~rows.hits).sum()


def test_slices_by_length_and_label_cover_every_row_once(rows):
    found = slices(rows, patterns={"negation": NEGATION})
    for kind in ("words", "label", "negation"):
        assert sum(s.num_rows for s in found if kind in s.name) == 400
    negated = next(s for s in found if s.name == "with negation")
    has = np.array([bool({"not", "never"} & set(text.split())) for text in rows.texts])
    assert (negated.num_rows, negated.accuracy) == (has.sum(), pytest.approx(rows.hits[has].mean()))
    assert negated.loss == pytest.approx(rows.losses[has].mean())


def test_slices_of_a_column_that_decides_differ(rows):
    column = ["hit" if hit else "miss" for hit in rows.hits]
    found = {s.name: s for s in slices(rows, columns={"outcome": column})}
    assert found["outcome hit"].accuracy == 1
    assert found["outcome miss"].differs
    same = {s.name: s for s in slices(rows, columns={"source": ["one"] * 400})}
    assert not same["source one"].differs


def test_slices_invalid_pattern_is_refused(rows):
    with pytest.raises(InputError) as error:
        slices(rows, patterns={"broken": "("})
    assert error.value.key == "pattern"


def test_highest_losses_are_those_of_the_smallest_probabilities(rows):
    true = rows.probabilities[np.arange(400), rows.labels]
    assert highest_losses(rows, 5).tolist() == sorted(range(400), key=lambda i: true[i])[:5]


def test_disagreements_are_rows_that_one_model_predicts(rows):
    other = dataclasses.replace(rows, probabilities=np.roll(rows.probabilities, 1, axis=1))
    found = disagreements(rows, other)
    assert set(found) == {i for i in range(400) if rows.hits[i] != other.hits[i]}
    gaps = np.abs(rows.losses - other.losses)[found]
    assert (np.diff(gaps) <= 0).all()
    with pytest.raises(InputError) as error:
        disagreements(rows, dataclasses.replace(other, texts=["other"] * 400))
    assert error.value.key == "runs"
