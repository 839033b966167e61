"""Expected best of k trials against published ranks, enumeration and simulation."""

import itertools

import numpy as np
import pytest

from gpt2_pl.experiments.statistics.tuning import best_of, expected_best_weights, median_ranks


def test_expected_best_weights_are_the_published_ones():
    expected = [0, 0, 0.01786, 0.05357, 0.10714, 0.17857, 0.26786, 0.375]
    assert expected_best_weights(8, 3) == pytest.approx(expected, abs=5e-6)


def test_expected_best_equals_the_mean_over_all_subsets():
    scores = np.random.default_rng(0).normal(size=9)
    for k in (1, 2, 5, 9):
        subsets = [max(subset) for subset in itertools.combinations(scores, k)]
        assert best_of(scores, k).expected == pytest.approx(np.mean(subsets))


@pytest.mark.parametrize(
    ("n", "ranks"),
    [
        (16, {1: (4, 13), 2: (8, 16), 4: (10, None), 8: (12, None)}),
        (32, {1: (10, 23), 2: (17, 28), 4: (23, 32), 8: (26, None)}),
        (64, {1: (24, 41), 2: (38, 53), 4: (48, 60), 8: (54, 64), 16: (58, None)}),
    ],
)
def test_median_ranks_are_the_published_ones(n, ranks):
    assert {k: median_ranks(n, k) for k in ranks} == ranks


def test_limits_in_simulated_searches_cover_the_median_best():
    generator, covered = np.random.default_rng(1), 0
    truth = float(np.quantile(np.max(generator.normal(size=(200_000, 4)), axis=1), 0.5))
    for _ in range(500):
        best = best_of(generator.normal(size=32), 4)
        covered += best.low <= truth <= best.high
    assert 0.94 <= covered / 500 <= 1.0


def test_best_of_few_trials_has_no_limits_and_of_too_many_is_refused():
    assert best_of(np.array([1.0, 2.0, 3.0]), 2)[1:] == (None, None)
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        best_of(np.array([1.0, 2.0, 3.0]), 4)
