"""The bootstrap: coverage of its intervals, and equality with rows drawn one by one."""

import numpy as np
import pytest
from torch import tensor
from torchmetrics.functional.classification import multiclass_f1_score

from gpt2_pl.experiments.inference import (
    confusion_scores,
    loss_scores,
    paired_bootstrap,
    percentile_interval,
    seed_noise,
)


def outcomes(generator, n):
    """Two models that are right 70 and 74 times in 100, mostly on the same rows."""
    both = generator.random(n)
    a = np.where(both < 0.6, 1.0, generator.random(n) < 0.25)
    b = np.where(both < 0.6, 1.0, generator.random(n) < 0.35)
    return a, b


def accuracy(sums):
    """The mean outcome as the only score."""
    return sums[..., :1] / sums[..., 1:]


def difference(a, b, seed, n_resamples=500):
    """The interval of two models' difference in accuracy, from their outcomes (N,)."""
    rows = [[np.stack([model, np.ones_like(model)], 1)] for model in (a, b)]
    draws = paired_bootstrap(rows, accuracy, n_resamples, seed)[..., 0]
    return percentile_interval((b - a).mean(), draws[:, 1] - draws[:, 0])


def test_paired_bootstrap_accuracy_interval_covers_known_difference():
    generator, covered, draws = np.random.default_rng(1), 0, 1000
    for i in range(draws):
        found = difference(*outcomes(generator, 400), seed=i)
        covered += found.low <= 0.04 <= found.high
    assert 0.93 <= covered / draws <= 0.97


def test_paired_bootstrap_without_difference_p_is_rarely_small():
    generator, small, draws = np.random.default_rng(2), 0, 1000
    for i in range(draws):
        a, b = outcomes(generator, 400)[0], outcomes(generator, 400)[0]
        small += difference(a, b, seed=i).p < 0.05
    assert 0.03 <= small / draws <= 0.07


@pytest.mark.parametrize("deviation", [0.0, 0.02, 0.05])
def test_paired_bootstrap_with_seed_noise_interval_covers_zero_difference(deviation):
    """Simulate three seeds per group with varying accuracies and no true difference."""
    generator, covered, draws = np.random.default_rng(3), 0, 400
    for i in range(draws):
        hard = generator.random(300)  # the same texts for all
        groups = []
        for _ in range(2):
            shares = 0.6 + deviation * generator.standard_normal(3)
            groups.append([np.clip(hard * 0.5 + generator.random(300) * 0.5, 0, 1) < share for share in shares])
        rows = [[np.stack([model, np.ones(300)], 1) for model in group] for group in groups]
        of_texts = paired_bootstrap(rows, accuracy, 300, seed=i)[..., 0]
        scores = [np.array([[model.mean()] for model in group]) for group in groups]
        noise = np.sqrt(2 / 3) * seed_noise(scores, 300, seed=i)
        found = percentile_interval(0.0, of_texts[:, 1] - of_texts[:, 0] + noise[:, 0])
        covered += found.low <= 0.0 <= found.high
    assert covered / draws >= 0.93


def test_seed_noise_several_groups_pools_variance():
    groups = [np.array([[1.0], [3.0]]), np.array([[5.0], [6.0], [10.0]]), np.array([[7.0]])]
    draws = seed_noise(groups, 200_000)[:, 0]
    deviation = np.sqrt((2.0 + 14.0) / 3)
    assert np.quantile(draws, 0.975) == pytest.approx(3.182 * deviation, rel=0.02)  # of Student's t, 3 degrees
    assert seed_noise(groups[2:], 10) is None


def test_paired_bootstrap_equal_outcomes_give_zero_difference():
    a = np.array([1.0, 0, 1, 1])
    assert difference(a, a, seed=0) == (0.0, 0.0, 0.0, 1.0)


def as_confusion(label, prediction, K):
    return np.eye(K * K)[label * K + prediction]


@pytest.mark.parametrize("K", [2, 5])
def test_confusion_scores_random_predictions_equal_torchmetrics(K):
    generator = np.random.default_rng(K)
    label = generator.integers(0, K - (K == 5), 200)  # of five classes one is neither a label nor a prediction
    prediction = np.where(generator.random(200) < 0.5, label, generator.integers(0, K - (K == 5), 200))
    accuracy, macro_f1, f1 = confusion_scores(as_confusion(label, prediction, K).sum(0))
    assert accuracy == pytest.approx((label == prediction).mean())
    assert macro_f1 == pytest.approx(float(multiclass_f1_score(tensor(prediction), tensor(label), K, average="macro")))
    assert f1 == pytest.approx(float(multiclass_f1_score(tensor(prediction), tensor(label), K, average="none")[1]))


def test_paired_bootstrap_scores_equal_rows_drawn_one_by_one():
    generator = np.random.default_rng(4)
    label = generator.integers(0, 2, 60)
    models = [as_confusion(label, np.where(generator.random(60) < 0.7, label, 1 - label), 2) for _ in range(3)]
    texts = paired_bootstrap([models[:2], models[2:]], confusion_scores, n_resamples=50, seed=5)
    drawn = np.random.default_rng(5).integers(0, 60, (50, 60))
    for r, rows in enumerate(drawn):
        each = [confusion_scores(sum(model[row] for row in rows)) for model in models]
        np.testing.assert_allclose(texts[r], [(each[0] + each[1]) / 2, each[2]])


def test_paired_bootstrap_macro_f1_interval_covers_known_difference():
    """Require that 93 to 97 of 100 intervals cover the difference in a large population of texts."""
    generator = np.random.default_rng(6)

    def population(n):
        label = generator.integers(0, 3, n)
        shared = generator.random(n) < 0.5
        predictions = [
            np.where(shared | (generator.random(n) < share), label, generator.integers(0, 3, n)) for share in (0.1, 0.3)
        ]
        return [as_confusion(label, prediction, 3) for prediction in predictions]

    a, b = population(400_000)
    true = confusion_scores(b.sum(0))[1] - confusion_scores(a.sum(0))[1]
    covered, draws = 0, 1000
    for i in range(draws):
        rows = generator.integers(0, 400_000, 300)
        texts = paired_bootstrap([[a[rows]], [b[rows]]], confusion_scores, n_resamples=400, seed=i)
        found = percentile_interval(0.0, texts[:, 1, 1] - texts[:, 0, 1])
        covered += found.low <= true <= found.high
    assert 0.93 <= covered / draws <= 0.97


def test_loss_scores_rows_of_any_length_are_weighted_by_tokens():
    rows = np.array([[30.0, 10], [2.0, 1]])
    loss, perplexity = loss_scores(rows.sum(0))
    assert loss == pytest.approx(32 / 11)
    assert perplexity == pytest.approx(np.exp(32 / 11))


def test_paired_bootstrap_different_numbers_of_rows_raises():
    with pytest.raises(ValueError, match="same"):
        paired_bootstrap([[np.ones((3, 2))], [np.ones((2, 2))]], loss_scores)
