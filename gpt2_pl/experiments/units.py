"""Units of differences between scores: points, percent of a perplexity, or the score's own unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gpt2_pl.experiments.statistics.contrast import Floats

_MAX_EXPONENT = 700.0  # of a floating-point number
NO_DIFFERENCE = "none"
"""Text of a difference that is impossible."""
_MANY_TEXTS = 500  # from here on differences in points have two decimals


@dataclass(frozen=True)
class Unit:
    """How a score is compared and printed.

    A score is compared on an internal scale on which higher is better: the score, its negative, or for a perplexity the
    negative of its logarithm. Shares are compared as fractions and printed in percent; their differences are in points.

    Args:
        higher_is_better: whether a higher score is better.
        is_percent: the score is a share.
        is_ratio: the score is a perplexity, so that two scores are compared by their ratio.
    """

    higher_is_better: bool = True
    is_percent: bool = False
    is_ratio: bool = False

    @property
    def sign(self) -> float:
        """1 if higher is better, else -1."""
        return 1.0 if self.higher_is_better else -1.0

    def internal(self, scores: Floats) -> Floats:
        """Convert scores of runs to the internal scale."""
        with np.errstate(divide="ignore", invalid="ignore"):  # a run may diverge
            return self.sign * (np.log(scores) if self.is_ratio else scores)

    def external(self, value: float) -> float:
        """Convert a value on the internal scale to a score; the inverse of :meth:`internal`."""
        return _exp(self.sign * value) if self.is_ratio else self.sign * value

    def margin(self, amount: float) -> float:
        """Convert an amount to a difference on the internal scale.

        Args:
            amount: points for a share, percent for a perplexity, else in the unit of the score; above 0.
        """
        return math.log1p(amount / 100) if self.is_ratio else amount / 100 if self.is_percent else amount

    def amount(self, difference: float) -> float:
        """Convert a difference on the internal scale to an amount; the inverse of :meth:`margin`."""
        return 100 * (_exp(difference) - 1.0) if self.is_ratio else 100 * difference if self.is_percent else difference

    def limit_score(self, score: float) -> float:
        """Return the nearest possible score: from 0 to 1 for shares."""
        return min(max(score, 0.0), 1.0) if self.is_percent else score

    def limit_difference(self, limits: tuple[float, float], reach: float = 1.0) -> tuple[float, float]:
        """Return the limits of an interval within the possible differences: from -1 to 1 for shares.

        Args:
            limits: the limits, on the internal scale; NaN without an interval.
            reach: largest possible difference of shares; 2 for a difference of differences.
        """
        if not self.is_percent:
            return limits
        low, high = np.clip(limits, -reach, reach).tolist()
        return low, high

    def format_amount(self, difference: float, digits: int = 3) -> str:
        """Format the size of a difference, such as ``1 point``, ``2.3 %`` or ``0.12``."""
        number = f"{self.amount(difference):.{digits}g}"
        if self.is_percent:
            return f"{number} point{'s' * (number != '1')}"
        return f"{number} %" if self.is_ratio else number

    def format_rounded_up(self, difference: float) -> str:
        """Format the size of a difference, rounded up to 0.1 point or percent, or to two digits.

        A share cannot differ by more than 100 points, so that a greater size is ``none``.
        """
        if self.is_percent and difference > 1.0:
            return NO_DIFFERENCE
        amount = self.amount(difference)
        step = 0.1 if self.is_ratio or self.is_percent else 10.0 ** (math.floor(math.log10(amount)) - 1)
        rounded = step * math.ceil(amount / step - 1e-9)
        if not (self.is_ratio or self.is_percent):
            return f"{rounded:.3g}"
        return f"{rounded:,.1f}{' %' if self.is_ratio else ' points'}"

    def format_difference(self, difference: float, num_texts: int) -> str:
        """Format a signed difference, positive if the arm is better; of perplexities the ratio arm / baseline."""
        if self.is_ratio:
            return f"{_exp(self.sign * difference):.3f}"
        if self.is_percent:
            text = f"{100 * difference:+.{2 if num_texts >= _MANY_TEXTS else 1}f}"
        else:
            text = f"{difference:+.3g}"
        return text.replace("-", "+") if not text.strip("+-0.") else text  # no negative zero

    def format_interval(self, limits: tuple[float, float], num_texts: int, reach: float = 1.0) -> str:
        """Format the limits of a difference, the lower number first; see :meth:`limit_difference`."""
        possible = self.limit_difference(limits, reach)
        low, high = sorted(possible, key=lambda limit: self.sign * limit if self.is_ratio else limit)
        return f"{self.format_difference(low, num_texts)} to {self.format_difference(high, num_texts)}"

    @property
    def word(self) -> str:
        """The unit after a difference: `` points`` or nothing."""
        return " points" if self.is_percent else ""

    def format_score(self, score: float) -> str:
        """Format a score."""
        if self.is_percent:
            return f"{100 * score:.1f}"
        return f"{score:.3g}" if abs(score) < 10 else f"{score:.1f}"


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, _MAX_EXPONENT))
