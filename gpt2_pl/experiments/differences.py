"""Differences of arms to the baseline: estimates, intervals, verdicts and what they are about.

An arm is a group of runs with one configuration and different seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.contrast import Arm, Contrast, Floats, difference, paired_difference
from gpt2_pl.experiments.statistics.intervals import dominant_text, max_rate_unseen
from gpt2_pl.experiments.statistics.power import detectable_with
from gpt2_pl.experiments.statistics.verdicts import (
    Verdict,
    findings,
    holm,
    is_assessed,
    simultaneous_level,
    verdict,
)
from gpt2_pl.experiments.units import Unit

LEVEL = 0.95
"""Confidence level of all intervals."""
_ONE_SEED, _ONE_PAIR = "one seed", "one pair of seeds"
_REMEDIES = {  # of a difference that is not assessed for this reason alone
    _ONE_SEED: "; run it again with another --seed_everything",
    _ONE_PAIR: "; run both again with another --seed_everything",
}
_MAX_SCORE = 1e100  # of a run that has not diverged
_MAX_DISAGREEMENT = 1e-3  # of a recorded score and the score of the rows, relative to 1 or the score


class Measured(NamedTuple):
    """Scores of an arm's runs on the internal scale of a unit.

    Args:
        arm: the scores and the contributions of rows. Without rows, the contributions are the scores, as if of
            one text.
        digest: digest of the rows; None without rows.
        is_binary: the contributions of rows are 0 or 1, or on the internal scale 0 or -1.
    """

    arm: Arm
    digest: str | None
    is_binary: bool


def is_usable(run: Run, score: str) -> bool:
    """Return whether a run has a score that is a number of usual size, also on each of its rows."""
    value = run.score(score)
    if value is None or not abs(value) < _MAX_SCORE:
        return False
    rows = run.row_score(score)
    return rows is None or bool(np.isfinite(rows.contributions).all())


def measure(runs: Sequence[Run], score: str, unit: Unit) -> Measured:
    """Return the scores of an arm.

    Args:
        runs: the usable runs of the arm, at least one.
        score: name of the score, such as ``val/accuracy``.
        unit: unit of the score.

    Returns:
        The scores; with the contributions of rows if all runs have them, of the same rows.
    """
    split = score.partition("/")[0]
    rows = [run.row_score(score) for run in runs]
    digests = {of_split.digest for run in runs if (of_split := run.compared_rows(split)) is not None}
    found = [of_run for of_run in rows if of_run is not None]
    if len(found) == len(rows) and len(digests) == 1:
        values = np.array([of_run.value for of_run in found])
        contributions = np.array([of_run.contributions for of_run in found])
        arm = Arm(unit.sign * values, unit.sign * contributions)
        return Measured(arm, digests.pop(), all(of_run.is_binary for of_run in found))
    return without_rows(_scores(runs, score), unit)


def _scores(runs: Sequence[Run], name: str) -> list[float]:
    return [value for run in runs if (value := run.score(name)) is not None]


def without_rows(scores: Sequence[float], unit: Unit) -> Measured:
    """Return recorded scores as those of one text, for a comparison about new seeds and these very texts."""
    values = unit.internal(np.array(scores))
    return Measured(Arm(values, values[:, None]), None, False)


def disagreeing_rows(run: Run) -> list[str]:
    """Return the scores of a run that differ from those of its table of rows."""
    wrong = []
    for split, of_split in run.row_scores.items():
        for name, row_score in of_split.scores.items():
            recorded = run.record["scores"].get(name)
            computed = row_score.value
            if name == f"{split}/perplexity" and computed < math.log(_MAX_SCORE):
                computed = math.exp(computed)
            if recorded is None or not is_usable(run, name):
                continue
            if abs(recorded - computed) > _MAX_DISAGREEMENT * max(1.0, abs(recorded)):
                wrong.append(f"{name} is {recorded:.4g}, its rows give {computed:.4g}")
    return wrong


def matched(runs: Sequence[Run], others: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return the runs of two arms whose seed both arms have, in the same order of seeds."""
    by_seed = {run.record.get("seed"): run for run in others}
    found = [run for run in runs if run.record.get("seed") in by_seed]
    return found, [by_seed[run.record.get("seed")] for run in found]


@dataclass(frozen=True)
class Difference:
    """Difference of an arm to the baseline in one score, on the internal scale: positive if the arm is better.

    Args:
        contrast: the estimate with its variance components.
        unit: unit of the score.
        has_rows: whether the contrast is of outcomes of rows; else it is Welch's, of the scores of runs.
        notices: what a reader must know, such as that an arm has two seeds.
        reason: why there is no verdict; empty if there is one.
        verdict: the verdict, in the family of all arms; None for scores that are only described.
        margin: the difference that matters; None if none was declared.
        p_adjusted: two-sided p-value with Holm's correction; NaN without a test.
        together: interval of a family whose intervals all cover at the level of 95 %; NaN without a test.
        detectable: the smallest difference that such runs show with a chance of 80 %.
        is_paired: the contrast is of pairs of runs with the same seed.
    """

    contrast: Contrast
    unit: Unit
    has_rows: bool
    notices: tuple[str, ...] = ()
    reason: str = ""
    verdict: Verdict | None = None
    margin: float | None = None
    p_adjusted: float = math.nan
    together: tuple[float, float] = (math.nan, math.nan)
    detectable: float | None = None
    is_paired: bool = False

    @property
    def is_tested(self) -> bool:
        """Whether the difference is about new seeds and new texts, so that it can have a verdict."""
        return not self.reason

    @property
    def population(self) -> str:
        """To what the interval generalizes, in words."""
        if self.contrast.population == "texts":
            return "these weights only"
        return "these texts only" if self.contrast.population == "seeds" else "new seeds and new texts"

    def estimate_text(self) -> str:
        """Format the difference, or for perplexities the ratio."""
        return self.unit.format_difference(self.contrast.estimate, self.contrast.num_texts)

    def interval_text(self) -> str:
        """Format the interval of 95 %; empty without an interval."""
        if not self.contrast.has_interval:
            return ""
        return self.unit.format_interval(self.contrast.interval(LEVEL), self.contrast.num_texts)

    def together_text(self) -> str:
        """Format the interval that covers together with those of the other arms; empty without an interval."""
        if math.isnan(self.together[0]):
            return ""
        return self.unit.format_interval(self.together, self.contrast.num_texts)

    def line(self) -> str:
        """Return the difference, its interval, and the seeds, texts and variances from which they come."""
        contrast, unit = self.contrast, self.unit
        name = "perplexity ratio" if unit.is_ratio else "D ="
        interval = f" (95 % {self.interval_text()})" if contrast.has_interval else ""
        parts = [
            f"{name} {self.estimate_text()}{unit.word}{interval}",
            seeds_text(contrast),
            *([f"{contrast.num_texts:,} texts"] if self.has_rows else []),
        ]
        if contrast.has_interval:
            parts.append(f"df {contrast.df:.1f}")
        line = ", ".join(parts)
        if self.is_tested:
            share = round(100 * contrast.seed_share)
            return f"{line}; variance: seeds {share} %, texts {100 - share} %"
        return f"{line}; {self.population}" if contrast.has_interval else line

    def sentence(self) -> str:
        """Return the verdict as a sentence; empty for scores that are only described."""
        if self.verdict is None:
            return ""
        if self.verdict is Verdict.NOT_ASSESSED:
            return f"Not assessed: {self.reason}{_REMEDIES.get(self.reason, '')}."
        low, _, high = self.together_text().partition(" to ")
        if self.unit.is_ratio:
            low = f"a perplexity ratio of {low}"
        amount = "" if self.margin is None else self.unit.format_amount(self.margin)
        text = self.verdict.value.format(m=amount, low=low, high=high + self.unit.word)
        return f"{text[0].upper()}{text[1:]}."


def seeds_text(contrast: Contrast) -> str:
    """Return the numbers of seeds of a difference, such as ``3 + 3 seeds``, or of its pairs."""
    counts = contrast.num_seeds
    if len(counts) == 1:
        return f"{counts[0]} pair{'s' * (counts[0] != 1)} of seeds"
    return f"{' + '.join(map(str, counts))} seeds"


def compare_arms(
    runs: Sequence[Run],
    baseline: Sequence[Run],
    score: str,
    unit: Unit,
    names: tuple[str, str],
    is_paired: bool = False,
) -> Difference:
    """Estimate the difference of an arm to the baseline in one score.

    If not all runs have outcomes of the same rows, the difference is that of Welch, of the scores of runs. It is about
    new seeds and these very texts, and has no verdict.

    Args:
        runs: the usable runs of the arm, at least one.
        baseline: the usable runs of the baseline, at least one.
        score: name of the score.
        unit: unit of the score.
        names: names of the arm and the baseline, for notices.
        is_paired: the runs are pairs, the same number of each arm in the same order; see :func:`matched`.
    """
    both = [measure(of_arm, score, unit) for of_arm in (runs, baseline)]
    has_rows = both[0].digest is not None and both[0].digest == both[1].digest
    if not has_rows:
        both = [without_rows(_scores(of_arm, score), unit) for of_arm in (runs, baseline)]
    found = (paired_difference if is_paired else difference)(both[0].arm, both[1].arm)
    reason = _reason(found, has_rows, all(measured.is_binary for measured in both), unit)
    notices = _notices(found, [measured.arm for measured in both], names) if has_rows else ()
    return Difference(found, unit, has_rows, notices, reason, is_paired=is_paired)


def _reason(found: Contrast, has_rows: bool, is_binary: bool, unit: Unit) -> str:
    """Return why a difference has no verdict; empty if it has one."""
    has_one_seed = min(found.num_seeds) < 2
    one_seed = _ONE_PAIR if len(found.num_seeds) == 1 else _ONE_SEED
    if not has_rows:
        rows = "not all runs have outcomes of the same rows"
        return f"{one_seed}; {rows}" if has_one_seed else f"{rows}, so the interval is about these very texts"
    if found.is_identical and not found.has_interval:
        same = f"{one_seed}; " * has_one_seed + f"identical on all {found.num_texts:,} rows"
        bound = max_rate_unseen(found.num_texts, 1 - (1 - LEVEL) / 2)
        size = unit.format_difference(bound, found.num_texts).removeprefix("+")
        return f"{same} (for these weights, new texts may differ by ±{size}{unit.word})" if is_binary else same
    if has_one_seed:
        return one_seed
    if not found.has_interval:
        return "no spread"
    return "" if is_assessed(found) else "fewer than two texts"


def _notices(found: Contrast, arms: Sequence[Arm], names: tuple[str, str]) -> tuple[str, ...]:
    """Return the notices of a difference from rows."""
    notices = []
    if min(found.num_seeds) == 2:
        seeds = "2 pairs of seeds" if len(found.num_seeds) == 1 else "2 seeds"
        notices.append(f"{seeds} estimate the variance over seeds poorly")
    for arm, name in zip(arms, names, strict=True):
        if len(arm.scores) > 1 and (arm.contributions == arm.contributions[0]).all():
            notices.append(f"seeds have no effect in {name} (deterministic?)")
    of_texts: Floats = arms[0].contributions.mean(0) - arms[1].contributions.mean(0)
    row = dominant_text(of_texts) if found.num_texts > 1 and found.text_variance > 0 else None
    if row is not None:
        notices.append(f"one text dominates the variance over texts (row {row + 1})")
    return tuple(notices)


def judge(differences: Mapping[str, Difference], margin: float | None) -> dict[str, Difference]:
    """Give a verdict on every difference of a family, with Holm's correction for the number of arms.

    Args:
        differences: the differences of all arms to the baseline in the primary metric of one task.
        margin: difference that matters, on the internal scale; None if none was declared.

    Returns:
        The differences with verdicts, adjusted p-values, simultaneous intervals and detectable differences.
    """
    contrasts = {name: one.contrast for name, one in differences.items()}
    found = findings(contrasts, margin, LEVEL)
    adjusted = holm([c.p_value() if is_assessed(c) else math.nan for c in contrasts.values()])
    level = simultaneous_level(len(found), LEVEL)
    judged = {}
    for (name, one), p in zip(differences.items(), adjusted, strict=True):
        c = one.contrast
        tested = name in found
        judged[name] = replace(
            one,
            verdict=verdict(found.get(name), margin is not None),
            margin=margin,
            p_adjusted=p,
            together=c.interval(level) if tested else (math.nan, math.nan),
            detectable=detectable_with(c.standard_error, c.df, min(c.num_seeds)) if tested else None,
        )
    return judged
