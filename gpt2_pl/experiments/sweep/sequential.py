"""Seeds that a sweep adds until the difference of every strategy to the baseline is decided."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.comparison import Comparison, compared_split, use_crossed_scores
from gpt2_pl.experiments.differences import Difference, compare_arms
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.statistics.sequential import Decision, look
from gpt2_pl.experiments.sweep.config import Experiment
from gpt2_pl.experiments.sweep.run import SweepRun

if TYPE_CHECKING:
    from gpt2_pl.experiments.sweep.schema import UntilNode


@dataclass
class SequentialSeeds:
    """Adds a seed to the undecided experiments of a task, and to the baseline, whenever all their runs are finished.

    The looks depend only on finished runs, in the order of their seeds. A sweep that is started again therefore repeats
    the same decisions. See :mod:`gpt2_pl.experiments.statistics.sequential` for the rule.

    Args:
        experiments: the experiments of a task; their seeds are extended.
        until: the margin, the maximum number of seeds and the baseline.

    Attributes:
        decisions: the decision about each experiment, by strategy, with the difference at the last look.

    Raises:
        InputError: the baseline is not an experiment of the task, or the experiments have different seeds.
    """

    experiments: list[Experiment]
    until: UntilNode
    decisions: dict[str, tuple[Decision, Difference]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        by_strategy = {one.strategy: one for one in self.experiments}
        if self.until.baseline not in by_strategy:
            expected = f"a strategy of {self.experiments[0].task} ({', '.join(by_strategy)})"
            raise InputError(key="until.baseline", value=self.until.baseline, expected=expected)
        self.baseline = by_strategy[self.until.baseline]
        self.undecided = [one for one in self.experiments if one is not self.baseline]
        self.num_seeds = len(self.baseline.seeds)
        if any(one.seeds != self.baseline.seeds for one in self.experiments):
            message = f"until: all strategies of {self.baseline.task} must have the same seeds, as new ones are added"
            raise InputError(message, key="until")
        if self.num_seeds > self.until.at_most:
            expected = f"at least the number of seeds, {self.num_seeds}"
            raise InputError(key="until.at_most", value=self.until.at_most, expected=expected)

    def update(self) -> list[str]:
        """Look at the finished runs, and extend the seeds of undecided experiments.

        Returns:
            A line for every new decision.
        """
        lines = []
        while self.undecided and all(run.finished for run in _runs([self.baseline, *self.undecided], self.num_seeds)):
            for experiment in list(self.undecided):
                decision, difference = self._look(experiment)
                if decision is not Decision.CONTINUE:
                    self.undecided.remove(experiment)
                    self.decisions[experiment.strategy] = (decision, difference)
                    text = f"{decision.value} after {self.num_seeds} seeds; {difference.line()}"
                    lines.append(f"{experiment.task} {experiment.strategy}: {text}")
            if self.undecided:
                self.num_seeds += 1
                for experiment in (self.baseline, *self.undecided):
                    experiment.seeds = _extended(experiment.seeds, self.num_seeds)
        return lines

    def _look(self, experiment: Experiment) -> tuple[Decision, Difference]:
        """Compare an experiment with the baseline on their first seeds."""
        arm, reference = (
            [Run.read(run.folder) for run in _runs([one], self.num_seeds)] for one in (experiment, self.baseline)
        )
        groups = [RunGroup(self.baseline.strategy, reference), RunGroup(experiment.strategy, arm)]
        split = compared_split([*arm, *reference], [])
        comparison = Comparison(experiment.task, str(reference[0].record["monitor"]), split, {}, groups)
        use_crossed_scores(comparison)
        name = comparison.primary_metric
        unit = comparison.unit(name)
        usable = [group.usable(name) for group in groups]
        if not all(usable):
            raise InputError(f"until: no run of {experiment.strategy} has a finite {name}", key="until")
        difference = compare_arms(usable[1], usable[0], name, unit, (experiment.strategy, self.baseline.strategy))
        return look(difference.contrast, unit.margin(self.until.margin), self.until.at_most), difference


def _runs(experiments: Iterable[Experiment], num_seeds: int) -> list[SweepRun]:
    """Return the runs of the first seeds of several experiments."""
    return [run for experiment in experiments for run in experiment.runs()[:num_seeds]]


def _extended(seeds: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return seeds, continued by the numbers after the largest one."""
    missing = max(0, count - len(seeds))
    return (*seeds, *range(max(seeds) + 1, max(seeds) + 1 + missing))
