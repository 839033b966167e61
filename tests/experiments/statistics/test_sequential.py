"""The rule for adding seeds: decisions by limits, and wrong decisions in simulated worlds."""

import numpy as np
import pytest

from gpt2_pl.experiments.statistics.contrast import Arm, Contrast, difference
from gpt2_pl.experiments.statistics.sequential import Decision, look


def contrast_of(estimate, error, seeds=(5, 5), text_variance=0.0):
    return Contrast(estimate, error**2, 1e9, (), text_variance, seeds, 1000, "texts and seeds", False)


@pytest.mark.parametrize(
    ("estimate", "decision"),
    [
        (3.0, Decision.BETTER),
        (1.0, Decision.NON_INFERIOR),
        (-2.0, Decision.CONTINUE),
        (-5.0, Decision.INFERIOR),
    ],
)
def test_look_decides_by_the_limits_at_99_percent(estimate, decision):
    assert look(contrast_of(estimate, 1.0), margin=2.0) is decision


def test_look_before_the_first_and_at_the_last_does_not_decide():
    assert look(contrast_of(9.0, 1.0, (2, 2)), 2.0) is Decision.CONTINUE
    assert look(contrast_of(9.0, 1.0, (3, 3)), 2.0) is Decision.BETTER
    assert look(contrast_of(9.0, 1.0, (3, 8)), 2.0) is Decision.CONTINUE
    assert look(contrast_of(-2.0, 1.0, (15, 15)), 2.0) is Decision.UNDECIDED
    assert look(contrast_of(-2.0, 1.0, (6, 6)), 2.0, max_seeds=6) is Decision.UNDECIDED


def test_look_when_texts_limit_stops_without_a_decision():
    assert look(contrast_of(-1.9, 1.0, (8, 8), text_variance=0.9), 2.0) is Decision.LIMITED_BY_TEXTS
    assert look(contrast_of(-1.9, 1.0, (8, 8)), 2.0) is Decision.CONTINUE


def test_look_for_several_arms_needs_more():
    barely = contrast_of(0.7, 1.0)
    assert look(barely, 2.0) is Decision.NON_INFERIOR
    assert look(barely, 2.0, num_arms=5) is Decision.CONTINUE


def test_look_at_identical_runs_continues_to_the_last():
    same = Arm(np.full(4, 0.5), np.tile([0.0, 1.0], (4, 1)))
    assert look(difference(same, same), 2.0) is Decision.CONTINUE
    assert look(difference(same, same), 2.0, max_seeds=4) is Decision.UNDECIDED


def test_looks_in_worlds_at_the_boundary_are_seldom_wrong():
    generator, margin, wrong = np.random.default_rng(0), 1.0, 0
    for _ in range(400):
        scores = generator.normal([[-margin], [0.0]], 0.91, (2, 15))
        for S in range(3, 16):
            arms = [Arm(s[:S], np.repeat(s[:S, None], 2, axis=1)) for s in scores]
            decision = look(difference(*arms), margin)
            if decision is not Decision.CONTINUE:
                break
        wrong += decision in (Decision.NON_INFERIOR, Decision.BETTER, Decision.INFERIOR)
    assert wrong / 400 <= 0.07  # 4.6 % in 20,000 worlds; the plain 95 % interval decides in 18 %
