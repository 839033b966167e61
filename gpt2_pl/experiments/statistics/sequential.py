"""Rule for adding seeds until an arm is decided.

Reference:
    Jennison and Turnbull (2000), Group Sequential Methods with Applications to Clinical Trials. The level of each look
    is chosen by simulation: with looks at 3 to 15 seeds, at most 3.7 % of the decisions are wrong.
"""

from __future__ import annotations

import math
from enum import Enum

from gpt2_pl.experiments.statistics.contrast import Contrast
from gpt2_pl.experiments.statistics.distributions import t_quantile

LEVEL = 0.99
"""Confidence level of the interval at each look."""
FIRST_LOOK, LAST_LOOK = 3, 15
"""Numbers of seeds of each arm at the first and the last look."""
_MANY_BASELINE_SEEDS = 8  # from here on the first decision is at four seeds
_LIMITED_BY_TEXTS_FROM = 8


class Decision(Enum):
    """Outcome of a look."""

    CONTINUE = "continue"
    NON_INFERIOR = "not worse by the margin or more"
    BETTER = "better"
    INFERIOR = "worse by more than the margin"
    LIMITED_BY_TEXTS = "more seeds will hardly decide: the texts limit"
    UNDECIDED = "undecided"


def look(contrast: Contrast, margin: float, max_seeds: int = LAST_LOOK, num_arms: int = 1) -> Decision:
    """Decide whether an arm needs more seeds.

    Args:
        contrast: difference of the arm (first) to the baseline (second), positive if the arm is better.
        margin: difference that matters; above 0, fixed before the first look.
        max_seeds: number of seeds at which an undecided arm stops.
        num_arms: arms compared with the baseline, for a statement about all of them.

    Returns:
        The decision.
    """
    arm_seeds, baseline_seeds = contrast.num_seeds
    if contrast.is_identical or not contrast.has_interval:
        first = 5  # without spread nothing is known before
    else:
        first = FIRST_LOOK + (baseline_seeds >= _MANY_BASELINE_SEEDS)
    is_last = arm_seeds >= max_seeds
    if arm_seeds < first or not contrast.has_interval:
        return Decision.UNDECIDED if is_last else Decision.CONTINUE
    low, high = contrast.interval(1.0 - (1.0 - LEVEL) / num_arms)
    if low > 0:
        return Decision.BETTER
    if low > -margin:
        return Decision.NON_INFERIOR
    if high < -margin:
        return Decision.INFERIOR
    if is_last:
        return Decision.UNDECIDED
    texts_only = t_quantile(0.5 + LEVEL / 2, contrast.num_texts - 1) * math.sqrt(contrast.text_variance)
    if arm_seeds >= _LIMITED_BY_TEXTS_FROM and texts_only >= abs(contrast.estimate + margin):
        return Decision.LIMITED_BY_TEXTS
    return Decision.CONTINUE
