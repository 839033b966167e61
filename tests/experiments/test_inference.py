"""The bootstrap: its coverage, and against rows drawn again one by one."""

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
    """The mean of outcomes, as the one score."""
    return sums[..., :1] / sums[..., 1:]


def difference(a, b, seed, n_resamples=500):
    """The interval of two models' difference in accuracy, from their outcomes (N,)."""
    rows = [[np.stack([model, np.ones_like(model)], 1)] for model in (a, b)]
    draws = paired_bootstrap(rows, accuracy, n_resamples, seed)[..., 0]
    return percentile_interval((b - a).mean(), draws[:, 1] - draws[:, 0])


def test_intervals_cover_a_known_difference():
    generator, covered, draws = np.random.default_rng(1), 0, 1000
    for i in range(draws):
        found = difference(*outcomes(generator, 400), seed=i)
        covered += found.low <= 0.04 <= found.high
    assert 0.93 <= covered / draws <= 0.97


def test_p_is_rarely_small_without_a_difference():
    generator, small, draws = np.random.default_rng(2), 0, 1000
    for i in range(draws):
        a, b = outcomes(generator, 400)[0], outcomes(generator, 400)[0]
        small += difference(a, b, seed=i).p < 0.05
    assert 0.03 <= small / draws <= 0.07


@pytest.mark.parametrize("deviation", [0.0, 0.02, 0.05])
def test_intervals_over_texts_and_seeds_cover_too(deviation):
    """Three seeds whose own accuracies vary: an interval of a difference of none is never too narrow."""
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


def test_the_spread_over_seeds_is_pooled():
    groups = [np.array([[1.0], [3.0]]), np.array([[5.0], [6.0], [10.0]]), np.array([[7.0]])]
    draws = seed_noise(groups, 200_000)[:, 0]
    deviation = np.sqrt((2.0 + 14.0) / 3)
    assert np.quantile(draws, 0.975) == pytest.approx(3.182 * deviation, rel=0.02)  # of Student's t, 3 degrees
    assert seed_noise(groups[2:], 10) is None


def test_equal_outcomes_do_not_differ():
    a = np.array([1.0, 0, 1, 1])
    assert difference(a, a, seed=0) == (0.0, 0.0, 0.0, 1.0)


def as_confusion(label, said, K):
    return np.eye(K * K)[label * K + said]


@pytest.mark.parametrize("K", [2, 5])
def test_scores_of_confusion_counts_are_torchmetrics(K):
    generator = np.random.default_rng(K)
    label = generator.integers(0, K - (K == 5), 200)  # of five classes one is neither true nor said
    said = np.where(generator.random(200) < 0.5, label, generator.integers(0, K - (K == 5), 200))
    accuracy, macro_f1, f1 = confusion_scores(as_confusion(label, said, K).sum(0))
    assert accuracy == pytest.approx((label == said).mean())
    assert macro_f1 == pytest.approx(float(multiclass_f1_score(tensor(said), tensor(label), K, average="macro")))
    assert f1 == pytest.approx(float(multiclass_f1_score(tensor(said), tensor(label), K, average="none")[1]))


def test_resampled_scores_are_those_of_rows_drawn_one_by_one():
    generator = np.random.default_rng(4)
    label = generator.integers(0, 2, 60)
    models = [as_confusion(label, np.where(generator.random(60) < 0.7, label, 1 - label), 2) for _ in range(3)]
    texts = paired_bootstrap([models[:2], models[2:]], confusion_scores, n_resamples=50, seed=5)
    drawn = np.random.default_rng(5).integers(0, 60, (50, 60))
    for r, rows in enumerate(drawn):
        each = [confusion_scores(sum(model[row] for row in rows)) for model in models]
        np.testing.assert_allclose(texts[r], [(each[0] + each[1]) / 2, each[2]])


def test_intervals_of_macro_f1_cover_a_known_difference():
    """The difference of two models over a large population of texts lies in 93 to 97 of 100 intervals."""
    generator = np.random.default_rng(6)

    def population(n):
        label = generator.integers(0, 3, n)
        shared = generator.random(n) < 0.5
        said = [
            np.where(shared | (generator.random(n) < share), label, generator.integers(0, 3, n)) for share in (0.1, 0.3)
        ]
        return [as_confusion(label, one, 3) for one in said]

    a, b = population(400_000)
    true = confusion_scores(b.sum(0))[1] - confusion_scores(a.sum(0))[1]
    covered, draws = 0, 1000
    for i in range(draws):
        rows = generator.integers(0, 400_000, 300)
        texts = paired_bootstrap([[a[rows]], [b[rows]]], confusion_scores, n_resamples=400, seed=i)
        found = percentile_interval(0.0, texts[:, 1, 1] - texts[:, 0, 1])
        covered += found.low <= true <= found.high
    assert 0.93 <= covered / draws <= 0.97


def test_perplexity_is_that_of_all_tokens():
    rows = np.array([[30.0, 10], [2.0, 1]])
    loss, perplexity = loss_scores(rows.sum(0))
    assert loss == pytest.approx(32 / 11)
    assert perplexity == pytest.approx(np.exp(32 / 11))


def test_resampling_refuses_models_of_other_rows():
    with pytest.raises(ValueError, match="same"):
        paired_bootstrap([[np.ones((3, 2))], [np.ones((2, 2))]], loss_scores)
