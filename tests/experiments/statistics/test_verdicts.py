"""Verdicts and Holm's correction against brute force, and false findings in simulated worlds."""

import itertools
import math

import numpy as np
import pytest

from gpt2_pl.experiments.statistics.contrast import Arm, Contrast, difference
from gpt2_pl.experiments.statistics.verdicts import Verdict, findings, holm, simultaneous_level, verdict


def contrast_of(low, high):
    """Contrast whose 95 % interval has these limits, with many degrees of freedom."""
    error = (high - low) / 2 / 1.959964
    return Contrast((low + high) / 2, error**2, 1e9, (), 0.0, (3, 3), 1000, "texts and seeds", False)


def judge(low, high, margin):
    found = findings({"arm": contrast_of(low, high)}, margin)
    return verdict(found.get("arm"), margin is not None)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.5, 3.0, Verdict.SUPERIOR_BY_MARGIN),
        (0.2, 0.8, Verdict.SUPERIOR_WITHIN_MARGIN),
        (0.2, 1.8, Verdict.SUPERIOR),
        (-3.0, -1.5, Verdict.INFERIOR_BY_MARGIN),
        (-0.8, -0.2, Verdict.INFERIOR_WITHIN_MARGIN),
        (-1.8, -0.2, Verdict.INFERIOR),
        (-0.8, 0.8, Verdict.EQUIVALENT),
        (-0.8, 1.8, Verdict.NON_INFERIOR),
        (-1.8, 0.8, Verdict.NOT_SUPERIOR_BY_MARGIN),
        (-1.8, 1.8, Verdict.UNDECIDED),
    ],
)
def test_verdict_with_a_margin_follows_the_interval(low, high, expected):
    assert judge(low, high, 1.0) is expected


def test_verdict_without_a_margin_is_better_worse_or_undecided():
    assert judge(0.1, 2.0, None) is Verdict.BETTER
    assert judge(-2.0, -0.1, None) is Verdict.WORSE
    assert judge(-2.0, 0.1, None) is Verdict.UNDECIDED


def test_verdict_of_single_seeds_is_not_assessed():
    rows = np.random.default_rng(0).normal(size=(2, 1, 30)) + np.array([9.0, 0.0])[:, None, None]
    single = difference(*(Arm(r.mean(1), r) for r in rows))
    assert findings({"arm": single}, 1.0) == {}
    assert verdict(None, True) is Verdict.NOT_ASSESSED


def test_findings_margin_not_above_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        findings({}, 0.0)


def test_holm_equals_closed_testing_with_bonferroni():
    generator = np.random.default_rng(1)
    for _ in range(50):
        p = generator.uniform(0, 0.2, 4)
        closed = [
            max(
                min(1.0, len(subset) * min(p[list(subset)]))
                for size in range(1, 5)
                for subset in itertools.combinations(range(4), size)
                if i in subset
            )
            for i in range(4)
        ]
        assert holm(p) == pytest.approx(closed)


def test_holm_leaves_out_what_was_not_assessed():
    adjusted = holm([0.01, math.nan, 0.04])
    assert adjusted[0::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(adjusted[1])


def test_findings_of_many_comparisons_need_smaller_p_values():
    barely = contrast_of(0.01, 2.0)
    alone = findings({"a": barely}, None)
    many = findings({name: barely for name in "abcdefg"}, None)
    assert alone["a"].above_zero
    assert not many["a"].above_zero
    assert simultaneous_level(5) == pytest.approx(0.99)


def test_findings_in_worlds_without_differences_are_seldom():
    generator, false, uncorrected = np.random.default_rng(2), 0, 0
    for _ in range(300):
        scores = generator.normal(0, 1, (8, 3))
        arms = [Arm(s, np.repeat(s[:, None], 100, axis=1)) for s in scores]
        contrasts = {str(i): difference(arm, arms[0]) for i, arm in enumerate(arms[1:])}
        false += any(f.above_zero or f.below_zero for f in findings(contrasts, None).values())
        uncorrected += any(c.p_value() < 0.05 for c in contrasts.values())
    assert false / 300 <= 0.05
    assert uncorrected / 300 >= 0.10
