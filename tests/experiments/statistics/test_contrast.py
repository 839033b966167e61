"""Contrasts of arms against hand-computed vectors, textbook tests and simulated worlds."""

import numpy as np
import pytest
from scipy import stats

from gpt2_pl.experiments.statistics.contrast import Arm, contrast, difference, paired_difference


def arm(*rows):
    outcomes = np.array([[float(character) for character in row] for row in rows])
    return Arm(outcomes.mean(1), outcomes)


A = arm("11011011", "11010011", "10011111")
B = arm("10011010", "10111000", "00011010", "10010011")


def test_difference_of_the_published_vector_has_its_components():
    result = difference(A, B)
    assert result.estimate == pytest.approx(0.2395833, abs=5e-8)
    assert [v.of_scores for v in result.seed_variances] == pytest.approx([0.0052083, 0.0039063], abs=5e-8)
    assert [v.interaction for v in result.seed_variances] == pytest.approx([0.1369048, 0.1741071], abs=5e-8)
    assert [v.of_mean for v in result.seed_variances] == pytest.approx([0.0057044, 0.0054408], abs=5e-8)
    assert [v.df for v in result.seed_variances] == [14, 21]
    assert result.text_variance == pytest.approx(0.0040923, abs=5e-8)
    assert result.variance == pytest.approx(0.0152375, abs=5e-8)
    assert result.df == pytest.approx(37.899, abs=5e-4)
    assert result.interval() == pytest.approx((-0.0103302, 0.4894968), abs=2e-7)
    assert result.population == "texts and seeds"


def test_difference_order_constant_and_swap_change_nothing_but_the_sign():
    result = difference(A, B)
    generator = np.random.default_rng(0)
    rows, runs = generator.permutation(8), generator.permutation(3)
    shuffled = difference(Arm(A.scores[runs], A.contributions[runs][:, rows]), Arm(B.scores, B.contributions[:, rows]))
    shifted = difference(*(Arm(x.scores + 3, x.contributions + 3) for x in (A, B)))
    for other in (shuffled, shifted):
        assert (other.estimate, other.variance, other.df) == pytest.approx(
            (result.estimate, result.variance, result.df)
        )
    swapped = difference(B, A)
    assert swapped.estimate == -result.estimate
    assert swapped.interval() == pytest.approx(tuple(-limit for limit in reversed(result.interval())))
    assert swapped.p_value() == pytest.approx(result.p_value())


def test_difference_of_many_texts_without_interaction_equals_welch():
    scores = np.array([0.5, 0.53, 0.58]), np.array([0.4, 0.47, 0.49, 0.42])
    x, y = (Arm(s, np.repeat(s[:, None], 200_000, axis=1)) for s in scores)
    welch = stats.ttest_ind(*scores, equal_var=False)
    result = difference(x, y)
    assert result.p_value() == pytest.approx(welch.pvalue, rel=1e-6)
    assert result.df == pytest.approx(welch.df, rel=1e-6)
    low, high = welch.confidence_interval()
    assert result.interval() == pytest.approx((low, high), rel=1e-6)


def test_difference_of_deterministic_arms_equals_the_paired_t_test_over_texts():
    x, y = np.random.default_rng(1).normal(size=(2, 40))
    same = [Arm(np.full(3, row.mean()), np.tile(row, (3, 1))) for row in (x, y)]
    paired = stats.ttest_rel(x, y)
    assert difference(*same).p_value() == pytest.approx(paired.pvalue)
    assert difference(*same).df == pytest.approx(39)


def test_contrast_of_four_cells_with_half_weights_is_the_mean_of_two_differences():
    generator = np.random.default_rng(2)
    cells = [Arm(rows.mean(1), rows) for rows in generator.normal(size=(4, 3, 30))]
    main = contrast(cells, [0.5, 0.5, -0.5, -0.5])
    means = [cell.scores.mean() for cell in cells]
    assert main.estimate == pytest.approx((means[0] + means[1] - means[2] - means[3]) / 2)
    assert contrast(cells[:2], [1, -1]) == difference(cells[0], cells[1])


def test_paired_difference_equals_one_arm_of_differences():
    generator = np.random.default_rng(3)
    shared = generator.normal(size=(5, 1)) * 2
    x, y = (generator.normal(size=(5, 50)) + shared for _ in range(2))
    paired = paired_difference(Arm(x.mean(1), x), Arm(y.mean(1), y))
    unpaired = difference(Arm(x.mean(1), x), Arm(y.mean(1), y))
    assert paired.estimate == pytest.approx(unpaired.estimate)
    assert paired.variance < unpaired.variance / 4
    assert paired.seed_variances[0].of_scores == pytest.approx(np.var((x - y).mean(1), ddof=1))


def test_difference_of_single_seeds_is_over_texts_only():
    x, y = np.random.default_rng(4).normal(size=(2, 1, 30))
    result = difference(Arm(x.mean(1), x), Arm(y.mean(1), y))
    assert result.population == "texts"
    assert result.p_value() == pytest.approx(stats.ttest_rel(x[0], y[0]).pvalue)


def test_difference_of_one_text_is_over_seeds_only():
    scores = np.array([[0.1, 0.2, 0.4], [0.3, 0.5, 0.6]])
    result = difference(*(Arm(s, s[:, None]) for s in scores))
    assert result.population == "seeds"
    assert result.p_value() == pytest.approx(stats.ttest_ind(*scores, equal_var=False).pvalue)


def test_difference_without_spread_has_no_interval():
    identical = difference(arm("1100", "1100"), arm("1100", "1100"))
    assert identical.is_identical
    assert not identical.has_interval
    assert all(np.isnan(identical.interval()))
    assert np.isnan(identical.p_value())


def test_contrast_of_other_texts_or_failed_runs_is_refused():
    with pytest.raises(ValueError, match="texts"):
        difference(arm("110", "100"), arm("1100", "1000"))
    with pytest.raises(ValueError, match="finite"):
        difference(Arm(np.array([np.nan, 1.0]), A.contributions[:2]), B)


@pytest.mark.parametrize("stds", [(1.5, 1.5), (4.9, 1.5)], ids=["equal spread", "unequal spread"])
def test_interval_in_simulated_worlds_covers_the_truth(stds):
    generator, covered, N = np.random.default_rng(5), 0, 245
    for _ in range(400):
        stable = generator.normal(0, 10 * np.sqrt(2), N)
        arms = []
        for std, sign in zip(stds, (0.5, -0.5), strict=True):
            rows = generator.normal(0, std, (3, 1)) + sign * stable + generator.normal(0, 22, (3, N))
            arms.append(Arm(rows.mean(1), rows))
        low, high = difference(*arms).interval()
        covered += low <= 0 <= high
    assert 0.91 <= covered / 400 <= 0.99
