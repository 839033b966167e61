"""Plans of experiments from pilot runs: what numbers of seeds and texts can show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.statistics.power import (
    MAX_SEEDS,
    Pilot,
    detectable_difference,
    seeds_needed,
    texts_needed,
)
from gpt2_pl.experiments.tables import heading
from gpt2_pl.experiments.units import Unit

SEEDS = (3, 4, 5, 8, 10, 15)
"""Numbers of seeds of each arm in a plan."""


@dataclass(frozen=True)
class Plan:
    """Plan for the comparison of an arm with the baseline.

    Args:
        pilot: variance components of the pilot runs.
        unit: unit of the score.
        num_texts: planned number of texts.
        wanted: difference to be shown, on the internal scale.
    """

    pilot: Pilot
    unit: Unit
    num_texts: int
    wanted: float

    def rows(self, seeds: Iterable[int] = SEEDS) -> list[tuple[int, float, float]]:
        """Return for numbers of seeds the smallest difference that is shown with a chance of 80 %.

        Returns:
            Number of seeds, and the difference if the pilot's standard deviations over seeds are right and if they are
            the upper 80 % bounds.
        """
        plans = self.pilot, self.pilot.unlucky()
        shown = [[detectable_difference(pilot, S, self.num_texts) for pilot in plans] for S in sorted(set(seeds))]
        return [(S, right, unlucky) for S, (right, unlucky) in zip(sorted(set(seeds)), shown, strict=True)]

    def needed(self) -> str:
        """Return the number of seeds that shows the wanted difference, or why none does."""
        wanted = self.unit.format_amount(self.wanted)
        texts = texts_needed(self.pilot, self.wanted)
        if texts > self.num_texts:
            never = f"A difference of {wanted} is out of reach, whatever the number of seeds: {self.num_texts:,} texts"
            return f"{never} limit. About {texts:,} texts are needed."
        counts = [seeds_needed(pilot, self.num_texts, self.wanted) for pilot in (self.pilot, self.pilot.unlucky())]
        right, unlucky = (f"more than {MAX_SEEDS:,}" if count is None else f"{count}" for count in counts)
        return f"A difference of {wanted} needs {right} seeds of each strategy; {unlucky} if the pilot was lucky."


def make_plan(
    comparison: Comparison, group: RunGroup, score: str, difference: float, num_texts: int | None = None
) -> Plan:
    """Plan the comparison of an arm with the baseline.

    Args:
        comparison: the pilot runs.
        group: the arm, not the baseline.
        score: name of the score.
        difference: wanted difference: points for a share, percent for a perplexity, else in the unit of the score.
        num_texts: planned number of texts; by default that of the pilot.

    Raises:
        InputError: the pilot runs give no plan.
    """
    found = group.differences.get(score)
    if found is None:
        raise InputError(f"{group.label} has no {score}", key="RUN")
    if not found.is_tested:
        raise InputError(f"{group.label} gives no plan: {found.reason}", key="RUN")
    try:
        pilot = Pilot.from_contrast(found.contrast)
    except ValueError as error:
        raise InputError(f"{group.label} gives no plan: {error}", key="RUN") from None
    return Plan(pilot, found.unit, num_texts or found.contrast.num_texts, found.unit.margin(difference))


def plan_title(comparison: Comparison, group: RunGroup, plan: Plan, score: str) -> str:
    """Return what a plan is about, as a line of text."""
    counts = plan.pilot.num_seeds
    pilot_seeds = f"{counts[0]} pairs of seeds" if len(counts) == 1 else f"{' + '.join(map(str, counts))} seeds"
    baseline = comparison.baseline_of(group) or comparison.groups[0]
    names = f"{group.label} against {baseline.label}"
    return f"{names}, {heading(score)}, {plan.num_texts:,} texts; pilot of {pilot_seeds}"


def plan_table(plan: Plan, seeds: Iterable[int]) -> str:
    """Return a plan's rows as an aligned table."""
    lines = [f"  {'seeds':>5}  {'can show':>12}  {'if the pilot was lucky':>22}"]
    for S, right, unlucky in plan.rows(seeds):
        texts = [plan.unit.format_rounded_up(difference) for difference in (right, unlucky)]
        lines.append(f"  {S:>5}  {texts[0]:>12}  {texts[1]:>22}")
    return "\n".join(lines)
