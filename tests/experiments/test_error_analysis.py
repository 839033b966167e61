"""Calibration, slices and disagreements against torchmetrics, scikit-learn and recounting."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact
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
    holm,
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


def test_slices_p_values_equal_a_recount_of_fishers_test_after_holm(rows):
    found = slices(rows, patterns={"negation": NEGATION})
    raw = []
    for one in found:
        n, correct, total = one.num_rows, round(one.accuracy * one.num_rows), int(rows.hits.sum())
        ways = [math.comb(total, k) * math.comb(400 - total, n - k) for k in range(n + 1)]
        raw.append(sum(w for w in ways if w <= ways[correct] * (1 + 1e-9)) / math.comb(400, n))
    assert [one.p for one in found] == pytest.approx(holm(raw), rel=1e-6)
    assert [one.differs for one in found] == [one.p < 0.05 for one in found]


def test_slices_p_values_equal_scipys_fisher_test():
    generator = np.random.default_rng(3)
    for n, rate in ((3, 0.5), (40, 0.1), (5000, 0.9)):
        hits, inside = generator.random(n) < rate, generator.random(n) < 0.3
        inside[0], inside[1] = True, False
        table = [[(hits & inside).sum(), (~hits & inside).sum()], [(hits & ~inside).sum(), (~hits & ~inside).sum()]]
        labels = np.zeros(n, int)
        p = np.where(hits[:, None], [[0.9, 0.1]], [[0.1, 0.9]])
        one = Predictions(["a b"] * n, labels, p, ["x", "y"], range(n))
        found = {s.name: s.p for s in slices(one, columns={"in": inside.tolist()})}
        adjusted = holm([1.0, fisher_exact(table).pvalue, fisher_exact(table).pvalue])
        assert found["in True"] == pytest.approx(adjusted[1], rel=1e-6)
        assert found["label x"] == 1.0


def test_holm_equals_sequential_rejection():
    generator = np.random.default_rng(1)
    for n in (1, 2, 7):
        p_values = generator.beta(0.3, 3, n).tolist()
        adjusted = holm(p_values)
        for level in (0.01, 0.05, 0.2, 0.9):
            rejected, left = set(), set(range(n))
            while left and p_values[i := min(left, key=p_values.__getitem__)] <= level / len(left):
                rejected.add(i)
                left.remove(i)
            assert rejected == {i for i in range(n) if adjusted[i] <= level}
    assert holm([]) == []


def test_slices_of_noise_differ_less_often_than_without_adjustment(rows):
    generator = np.random.default_rng(2)
    columns = {f"c{i}": generator.integers(0, 2, 400).tolist() for i in range(60)}
    found = [one for one in slices(rows, columns) if one.name.startswith("c")]
    assert len(found) == 120
    assert not any(one.differs for one in found)


@pytest.mark.parametrize(
    ("text", "is_negated"),
    [("I didn't like it", True), ("it ca n't", True), ("isn\u2019t it", True), ("Not so", True), ("cannot", True),
     ("a knot", False), ("nothingness", False), ("can t", False), ("nothing", True)],
)  # fmt: skip
def test_negation_pattern_matches_negated_texts(text, is_negated):
    assert (re.search(NEGATION, text, re.IGNORECASE) is not None) == is_negated


def test_decisions_count_as_predictions_and_leave_calibration_unchanged(rows):
    decided = dataclasses.replace(rows, decisions=np.zeros(400, int))
    assert decided.hits.sum() == (rows.labels == 0).sum()
    assert {c.prediction for c in confusions(decided)} == {"low"}
    assert reliability(decided) == reliability(rows)
    assert np.array_equal(decided.scaled(2.0).predictions, decided.predictions)


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
