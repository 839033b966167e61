"""Notes on what a comparison cannot show."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2_pl.experiments.comparison import Comparison
    from gpt2_pl.experiments.run_group import RunGroup

_MIN_PAIRS = 2
_FEW_SEEDS, _MANY_ARMS = 3, 5  # with so few seeds and so many arms only very large differences can be shown


def pairing_notices(comparison: Comparison, group: RunGroup) -> list[str]:
    """Return notices on the runs that have no run of the same seed in the baseline, and the reverse."""
    first, name = comparison.baseline_of(group) or comparison.groups[0], comparison.primary_metric
    pairs = len(comparison.pairs(group, first, name)[0])
    notices = []
    alone = [(of, len(of.usable(name)) - pairs) for of in (group, first)]
    if any(count for _, count in alone):
        which = " and ".join(f"{count} of {of.label}" for of, count in alone if count)
        notices.append(f"runs without a partner of the same seed are left out of the differences: {which}")
    if pairs < _MIN_PAIRS:
        seeds = f"{pairs or 'no'} seed{'s' * (pairs != 1)}"
        expected = f"--paired_seeds needs at least {_MIN_PAIRS}"
        notices.append(f"{group.label} and {first.label} have {seeds} in common; {expected}")
    return notices


def family_notes(comparison: Comparison) -> list[str]:
    """Return notes on what the comparisons of a task cannot show."""
    notes, primary = [], comparison.primary_metric
    if comparison.is_paired and not comparison.compared:
        notes.append("--paired_seeds has no effect: there is one strategy.")
    family = comparison.family
    num_seeds = min((min(group.differences[primary].contrast.num_seeds) for group in family), default=0)
    if family and num_seeds <= _FEW_SEEDS and len(family) >= _MANY_ARMS:
        notes.append(
            f"With {num_seeds} seeds and {len(family)} comparisons only very large differences can be shown; 5 seeds "
            "raise the power two- to fourfold."
        )
    seeds = {count for group in family for count in group.differences[primary].contrast.num_seeds}
    if seeds and max(seeds) >= 2 * min(seeds):
        notes.append(f"Strategies have {min(seeds)} to {max(seeds)} seeds; equal numbers make intervals more reliable.")
    epochs = {len(run.record["epochs"]) for group in comparison.groups for run in group.runs} - {0}
    if comparison.is_optimistic and len(epochs) > 1:
        notes.append(
            f"Runs chose among {min(epochs)} to {max(epochs)} epochs; more epochs to choose from make a score more "
            "optimistic. A test file, or save_predictions: every_epoch in all runs, gives scores of rows that did not "
            "choose."
        )
    return notes
