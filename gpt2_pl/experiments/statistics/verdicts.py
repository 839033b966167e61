"""Verdicts of a comparison against a stated margin, corrected for the number of comparisons.

References:
    Holm (1979), A simple sequentially rejective multiple test procedure. Schuirmann (1987) for equivalence by two
    one-sided tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from gpt2_pl.experiments.statistics.contrast import Contrast


class Verdict(Enum):
    """What the data show about a difference that is positive if the arm is better than the baseline.

    The value is the verdict's sentence, in which ``m`` is the margin and ``low`` and ``high`` are the limits of the
    interval.
    """

    NOT_ASSESSED = "not assessed"
    SUPERIOR_BY_MARGIN = "better by more than {m}"
    SUPERIOR_WITHIN_MARGIN = "better, but by less than {m}"
    SUPERIOR = "better; the gain may be smaller than {m}"
    INFERIOR_BY_MARGIN = "worse by more than {m}"
    INFERIOR_WITHIN_MARGIN = "worse, but by less than {m}"
    INFERIOR = "worse; the loss may exceed {m} or not"
    EQUIVALENT = "no difference of {m} or more in either direction"
    NON_INFERIOR = "not worse by {m} or more; a gain is not shown"
    NOT_SUPERIOR_BY_MARGIN = "any gain is below {m}; a loss is not excluded"
    UNDECIDED = "these data allow differences from {low} to {high}; more seeds are needed"
    BETTER = "better"
    WORSE = "worse"

    @property
    def word(self) -> str:
        """The verdict in a few words."""
        return _WORDS[self]

    @property
    def is_not_worse(self) -> bool:
        """Whether the verdict excludes a loss of the margin or more."""
        return self in (
            Verdict.SUPERIOR_BY_MARGIN,
            Verdict.SUPERIOR_WITHIN_MARGIN,
            Verdict.SUPERIOR,
            Verdict.BETTER,
            Verdict.EQUIVALENT,
            Verdict.NON_INFERIOR,
            Verdict.INFERIOR_WITHIN_MARGIN,
        )


_WORDS = {
    Verdict.NOT_ASSESSED: "not assessed",
    Verdict.SUPERIOR_BY_MARGIN: "superior by more than the margin",
    Verdict.SUPERIOR_WITHIN_MARGIN: "superior, within the margin",
    Verdict.SUPERIOR: "superior",
    Verdict.INFERIOR_BY_MARGIN: "inferior by more than the margin",
    Verdict.INFERIOR_WITHIN_MARGIN: "inferior, within the margin",
    Verdict.INFERIOR: "inferior",
    Verdict.EQUIVALENT: "equivalent",
    Verdict.NON_INFERIOR: "non-inferior",
    Verdict.NOT_SUPERIOR_BY_MARGIN: "not superior by the margin",
    Verdict.UNDECIDED: "undecided",
    Verdict.BETTER: "superior",
    Verdict.WORSE: "inferior",
}


@dataclass(frozen=True)
class Findings:
    """Which one-sided hypotheses about a difference are rejected at 2.5 %.

    Args:
        above_margin, above_zero, above_minus_margin: the difference is shown to be above m, 0 or -m.
        below_margin, below_zero, below_minus_margin: it is shown to be below m, 0 or -m.
    """

    above_margin: bool
    above_zero: bool
    above_minus_margin: bool
    below_margin: bool
    below_zero: bool
    below_minus_margin: bool


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values; NaN stays NaN and is not counted as a comparison.

    Args:
        p_values: p-values of one family of comparisons.

    Returns:
        The adjusted p-values, in the same order.
    """
    p = np.asarray(p_values, float)
    assessed = np.flatnonzero(~np.isnan(p))
    order = assessed[np.argsort(p[assessed], kind="stable")]
    adjusted = np.full(len(p), math.nan)
    steps = np.minimum(1.0, (len(order) - np.arange(len(order))) * p[order])
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted.tolist()


def is_assessed(contrast: Contrast) -> bool:
    """Return whether a contrast can carry a verdict about strategies: it has an interval over texts and seeds."""
    return contrast.has_interval and contrast.population == "texts and seeds"


def findings(contrasts: Mapping[str, Contrast], margin: float | None, level: float = 0.95) -> dict[str, Findings]:
    """Test every difference of a family against 0 and the margins, with Holm's correction for each question.

    Args:
        contrasts: the differences of all arms to the baseline, positive if the arm is better.
        margin: difference that matters, in the unit of the score; None if none was declared.
        level: confidence level.

    Returns:
        The findings of each arm that :func:`is_assessed`.

    Raises:
        ValueError: the margin is not above 0.
    """
    if margin is not None and not margin > 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    tested = {name: c for name, c in contrasts.items() if is_assessed(c)}
    m, tail = math.inf if margin is None else margin, (1.0 - level) / 2

    def rejected(p_values: list[float]) -> list[bool]:
        return [p < tail for p in holm(p_values)]

    # The two-sided p-value decides about better and worse, so that both are one question with one correction.
    differs = [p < 1.0 - level for p in holm([c.p_value() for c in tested.values()])]
    questions = {
        "above_margin": rejected([c.p_above(m) for c in tested.values()]),
        "above_zero": [d and c.estimate > 0 for d, c in zip(differs, tested.values(), strict=True)],
        "above_minus_margin": rejected([c.p_above(-m) if margin else 1.0 for c in tested.values()]),
        "below_margin": rejected([c.p_below(m) if margin else 1.0 for c in tested.values()]),
        "below_zero": [d and c.estimate < 0 for d, c in zip(differs, tested.values(), strict=True)],
        "below_minus_margin": rejected([c.p_below(-m) for c in tested.values()]),
    }
    return {name: Findings(**{q: answers[i] for q, answers in questions.items()}) for i, name in enumerate(tested)}


def verdict(found: Findings | None, has_margin: bool) -> Verdict:
    """Return the verdict of one comparison; None of findings means that it was not assessed."""
    if found is None:
        return Verdict.NOT_ASSESSED
    if not has_margin:
        return Verdict.BETTER if found.above_zero else Verdict.WORSE if found.below_zero else Verdict.UNDECIDED
    rules = (
        (Verdict.SUPERIOR_BY_MARGIN, found.above_margin),
        (Verdict.SUPERIOR_WITHIN_MARGIN, found.above_zero and found.below_margin),
        (Verdict.SUPERIOR, found.above_zero),
        (Verdict.INFERIOR_BY_MARGIN, found.below_minus_margin),
        (Verdict.INFERIOR_WITHIN_MARGIN, found.below_zero and found.above_minus_margin),
        (Verdict.INFERIOR, found.below_zero),
        (Verdict.EQUIVALENT, found.above_minus_margin and found.below_margin),
        (Verdict.NON_INFERIOR, found.above_minus_margin),
        (Verdict.NOT_SUPERIOR_BY_MARGIN, found.below_margin),
    )
    return next((name for name, applies in rules if applies), Verdict.UNDECIDED)


def simultaneous_level(num_comparisons: int, level: float = 0.95) -> float:
    """Return the level of each interval for which all intervals of a family cover together (Bonferroni)."""
    return 1.0 - (1.0 - level) / max(1, num_comparisons)
