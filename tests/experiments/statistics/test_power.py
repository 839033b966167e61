"""Plans against the published sanity figures and simulated experiments."""

import numpy as np
import pytest

from gpt2_pl.experiments.statistics.contrast import Arm, difference
from gpt2_pl.experiments.statistics.power import (
    Pilot,
    detectable_difference,
    non_inferiority_power,
    seeds_needed,
    standard_error,
    texts_needed,
)

N = 1101
E2 = 0.04  # runs of one arm disagree on 8 % of the rows
# The standard deviation of run scores is 0.91 points, of which seed-by-text noise is a part.
SST5 = Pilot((0.0091**2 - E2 / N,) * 2, (E2, E2), 0.02, (3, 3))


@pytest.mark.parametrize(
    ("seeds", "error", "df", "mdd"),
    [
        (3, 0.86, 7.1, 3.2),
        (4, 0.77, 12.4, 2.5),
        (5, 0.72, 19.1, 2.2),
        (8, 0.62, 48.9, 1.8),
        (10, 0.59, 77.6, 1.7),
        (15, 0.54, 183, 1.5),
    ],
)
def test_detectable_difference_of_sst5_is_the_published_one(seeds, error, df, mdd):
    planned, freedom = standard_error(SST5, seeds, N)
    assert 100 * planned == pytest.approx(error, abs=0.006)
    assert freedom == pytest.approx(df, rel=0.01)
    assert 100 * detectable_difference(SST5, seeds, N) == pytest.approx(mdd, abs=0.06)


@pytest.mark.parametrize(("seeds", "chance"), [(3, 0.52), (5, 0.76), (8, 0.88), (10, 0.92), (15, 0.96)])
def test_non_inferiority_power_of_two_points_is_the_published_one(seeds, chance):
    assert non_inferiority_power(0.02, *standard_error(SST5, seeds, N)) == pytest.approx(chance, abs=0.01)


def test_seeds_needed_for_one_point_are_never_enough():
    assert seeds_needed(SST5, N, 0.01) is None
    needed = texts_needed(SST5, 0.01)
    assert needed == pytest.approx(7.85 * 0.02 / 0.01**2, rel=0.01)
    assert seeds_needed(SST5, 3 * needed, 0.01) is not None


@pytest.mark.parametrize("difference_", [0.015, 0.02, 0.03])
def test_seeds_needed_are_the_smallest_that_show_the_difference(difference_):
    S = seeds_needed(SST5, N, difference_)
    assert detectable_difference(SST5, S, N) <= difference_ < detectable_difference(SST5, S - 1, N)


@pytest.mark.parametrize(("seeds", "factor"), [(3, 2.12), (4, 1.73), (5, 1.56), (10, 1.29)])
def test_unlucky_pilot_has_the_published_factor(seeds, factor):
    pilot = Pilot((1.0, 1.0), (0.0, 0.0), 0.0, (seeds, seeds)).unlucky()
    assert np.sqrt(pilot.seed_variances[0]) == pytest.approx(factor, abs=0.006)


def test_detectable_difference_is_shown_in_four_of_five_simulated_experiments():
    mdd, generator, shown = detectable_difference(SST5, 5, N), np.random.default_rng(0), 0
    for _ in range(400):
        arms, stable = [], generator.normal(0, np.sqrt(0.02), N)
        for mean, sign in ((mdd, 0.5), (0.0, -0.5)):
            seed_effects = generator.normal(0, np.sqrt(SST5.seed_variances[0]), (5, 1))
            rows = mean + seed_effects + sign * stable + generator.normal(0, np.sqrt(E2), (5, N))
            arms.append(Arm(rows.mean(1), rows))
        shown += difference(*arms).p_value() < 0.05
    assert shown / 400 == pytest.approx(0.80, abs=0.06)


def test_pilot_of_one_seed_or_difference_of_zero_is_refused():
    rows = np.random.default_rng(1).normal(size=(2, 1, 30))
    with pytest.raises(ValueError, match="at least 2 seeds"):
        Pilot.from_contrast(difference(*(Arm(r.mean(1), r) for r in rows)))
    with pytest.raises(ValueError, match="above 0"):
        seeds_needed(SST5, N, 0.0)


def test_pilot_from_simulated_runs_has_their_components():
    generator = np.random.default_rng(2)
    stable = generator.normal(0, 0.3, 4000)
    arms = []
    for sign in (0.5, -0.5):
        rows = generator.normal(0, 0.02, (40, 1)) + sign * stable + generator.normal(0, 0.2, (40, 4000))
        arms.append(Arm(rows.mean(1), rows))
    pilot = Pilot.from_contrast(difference(*arms))
    assert pilot.text_variance == pytest.approx(0.09, rel=0.1)
    assert pilot.interactions == pytest.approx((0.04, 0.04), rel=0.05)
    assert np.sqrt(pilot.seed_variances) == pytest.approx((0.02, 0.02), rel=0.35)
