"""Half-split crossing in worlds whose checkpoints differ by known amounts."""

import numpy as np
import pytest

from gpt2_pl.experiments.statistics.selection import (
    NUM_SPLITS,
    choose,
    cross,
    expected_maximum,
    expected_optimism,
    half_splits,
)


def world(generator, N, E, spread=0.003, discordance=0.06):
    """Outcomes of E checkpoints of accuracy near 85 % that disagree on a share of N rows; also the true accuracies."""
    hard = generator.uniform(size=N) < discordance * 2.4
    truth = 0.85 + generator.normal(0, spread, E)
    outcomes = np.where(hard, generator.uniform(size=(E, N)) < 0.5, generator.uniform(size=N) < 0.909)
    flips = generator.uniform(size=(E, N)) < np.abs(truth - 0.85)[:, None]
    return np.where(flips, (truth > 0.85)[:, None], outcomes).astype(float)


def crossed_rows(values, splits):
    """Value of every row under the checkpoints that the other halves choose, the mean over splits; and the choices."""
    chosen = choose(lambda half: values[:, half].mean(1), splits)
    rows = [cross(values, first, pair) for first, pair in zip(splits, chosen, strict=True)]
    return np.mean(rows, 0), np.bincount(chosen.ravel(), minlength=len(values))


def test_half_splits_depend_on_the_rows_alone_and_halve_them():
    splits = half_splits("abc", 101)
    assert splits.shape == (NUM_SPLITS, 101)
    assert set(splits.sum(1)) == {50}
    assert np.array_equal(splits, half_splits("abc", 101))
    assert not np.array_equal(splits, half_splits("abd", 101))
    assert len({tuple(split) for split in splits}) == NUM_SPLITS


def test_half_splits_keep_clusters_together():
    clusters = [i // 3 for i in range(90)]
    for split in half_splits("abc", 90, clusters):
        assert all(len(set(split[3 * c : 3 * c + 3])) == 1 for c in range(30))


def test_cross_equals_a_loop_over_splits():
    values = np.random.default_rng(0).integers(0, 2, (4, 60)).astype(float)
    splits = half_splits("abc", 60)
    expected = np.zeros(60)
    for split in splits:
        for chooser in (split, ~split):
            scores = [np.mean([v for v, c in zip(row, chooser, strict=True) if c]) for row in values]
            best = scores.index(max(scores))
            for i in range(60):
                if not chooser[i]:
                    expected[i] += values[best, i] / NUM_SPLITS
    rows, chosen = crossed_rows(values, splits)
    assert rows == pytest.approx(expected)
    assert chosen.sum() == 2 * NUM_SPLITS


def test_cross_of_several_columns_crosses_each_as_if_alone():
    values, splits = np.random.default_rng(0).random((3, 60, 2)), half_splits("abc", 60)
    pair = choose(lambda half: values[:, half, 0].mean(1), splits)[0]
    both = cross(values, splits[0], pair)
    assert both.shape == (60, 2)
    assert np.array_equal(both[:, 1], cross(values[..., 1], splits[0], pair))


def test_choose_from_few_rows_takes_the_last_checkpoint():
    values = np.vstack([np.ones(20), np.zeros(20)])
    assert crossed_rows(values, half_splits("abc", 20))[0].mean() == 0


def test_choose_never_takes_a_checkpoint_without_a_score():
    chosen = choose(lambda half: np.array([np.nan, 0.1, np.nan]), half_splits("abc", 60))
    assert (chosen == 1).all()


def test_cross_removes_the_optimism_of_equal_checkpoints():
    generator, optimism, bias = np.random.default_rng(1), [], []
    for _ in range(60):
        values = world(generator, 245, 20, spread=0.0)
        optimism.append(values.mean(1).max() - values.mean())
        bias.append(crossed_rows(values, half_splits("abc", 245))[0].mean() - values.mean())
    assert np.mean(optimism) > 0.012
    assert abs(np.mean(bias)) < np.mean(optimism) / 4


def test_cross_of_identical_checkpoints_chooses_the_first_and_has_no_optimism():
    row = np.random.default_rng(2).integers(0, 2, 80).astype(float)
    rows, chosen = crossed_rows(np.tile(row, (5, 1)), half_splits("abc", 80))
    assert rows == pytest.approx(row)
    assert chosen.tolist() == [2 * NUM_SPLITS, 0, 0, 0, 0]


@pytest.mark.parametrize(("count", "value"), [(1, 0.0), (5, 1.16), (10, 1.54), (20, 1.87)])
def test_expected_maximum_of_normals_is_the_published_one(count, value):
    assert expected_maximum(count) == pytest.approx(value, abs=5e-3)


def test_expected_optimism_of_one_checkpoint_is_zero_and_grows_with_disagreement():
    generator = np.random.default_rng(3)
    assert expected_optimism(np.ones((1, 50))) == 0
    few, many = (expected_optimism(world(generator, 500, 5, discordance=d)) for d in (0.01, 0.2))
    assert 0 < few < many
