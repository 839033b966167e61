"""Claims about strategies, as they are published, judged against runs.

A file of claims states what a text says about the runs, so that a change of the runs or of the text that makes a claim
wrong is noticed:

    claims:
    - {arm: lora, claim: not_worse, margin: 1, task: SentimentClassifier}
    - {arm: linear_probe, claim: worse, sentence: A linear probe is worse than full fine-tuning.}

All claims about one task, score and baseline are one family, for which p-values are corrected (Holm).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.differences import LEVEL
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.statistics.contrast import Contrast
from gpt2_pl.experiments.statistics.verdicts import holm
from gpt2_pl.filesystem import require_file
from gpt2_pl.utils.yaml_json import read_yaml

if TYPE_CHECKING:
    from gpt2_pl.experiments.claims_schema import ClaimNode

_WORDS = {  # claim -> the statement without and with a margin
    "better": ("better than {baseline}", "better than {baseline} by more than {m}"),
    "worse": ("worse than {baseline}", "worse than {baseline} by more than {m}"),
    "not_worse": ("", "not worse than {baseline} by {m} or more"),
    "equivalent": ("", "within {m} of {baseline} in either direction"),
}


class Outcome(Enum):
    """What the runs say about a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"

    @property
    def plural(self) -> str:
        """What several claims do: ``hold``, ``fail`` or ``undecided``."""
        return self.value.removesuffix("s")


class JudgedClaim(NamedTuple):
    """Claim with what the runs say about it.

    Args:
        text: the statement, with the task and the score.
        outcome: whether it holds.
        figures: the difference, its interval and p-value, or why it is undecided.
    """

    text: str
    outcome: Outcome
    figures: str


class _Tested(NamedTuple):
    """A claim, its figures and the p-values of the hypotheses that it is wrong and that it is right."""

    text: str
    figures: str
    p_wrong: float
    p_right: float


def read_claims(file: Path) -> list[ClaimNode]:
    """Read a file of claims.

    Raises:
        InputError: the file is invalid; the message names the file, the key and valid values.
    """
    from gpt2_pl.experiments.claims_schema import ClaimFile
    from gpt2_pl.utils.schema import validate

    content = validate(ClaimFile, read_yaml(require_file(file, "check")), str(file))
    for i, claim in enumerate(content.claims):
        if claim.claim in ("not_worse", "equivalent") and claim.margin is None:
            key = f"claims[{i}].margin"
            raise InputError(f"{key} is missing; the claim {claim.claim} needs one", key=key, source=file)
    return content.claims


def judge_claims(
    claims: Sequence[ClaimNode], comparisons: Sequence[Comparison], source: Path | str = ""
) -> list[JudgedClaim]:
    """Judge claims against runs.

    A claim holds if its contrary is rejected at 2.5 %, one-sided, and fails if it is itself rejected at that level;
    both with Holm's correction for all claims about the same task, score and baseline.

    Args:
        claims: the claims.
        comparisons: the comparisons of the runs.
        source: file of the claims, for error messages.

    Returns:
        The judged claims, in the same order.

    Raises:
        InputError: a claim names a task, strategy or score that the runs do not have.
    """
    tested: list[_Tested] = []
    families: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, claim in enumerate(claims):
        comparison = _find_task(claim, comparisons, f"claims[{i}]", source)
        score = _find_score(claim, comparison, f"claims[{i}]", source)
        arm, baseline = (
            _find_group(name, comparison, f"claims[{i}].{key}", source)
            for key, name in (("arm", claim.arm), ("baseline", claim.baseline or comparison.groups[0].label))
        )
        if arm is baseline:
            raise InputError(key=f"claims[{i}].arm", value=claim.arm, expected="not the baseline", source=source)
        families[comparison.task, score, baseline.label].append(i)
        tested.append(_test(claim, comparison, score, arm, baseline))
    outcomes = [Outcome.UNDECIDED] * len(tested)
    for members in families.values():
        for outcome, which in ((Outcome.HOLDS, "p_wrong"), (Outcome.FAILS, "p_right")):
            adjusted = holm([getattr(tested[i], which) for i in members])
            for i, p in zip(members, adjusted, strict=True):
                outcomes[i] = outcome if p < (1 - LEVEL) / 2 else outcomes[i]
    return [JudgedClaim(one.text, outcome, one.figures) for one, outcome in zip(tested, outcomes, strict=True)]


def claim_lines(judged: Sequence[JudgedClaim]) -> Iterator[str]:
    """Yield a line for every claim, and one that counts them."""
    counts = []
    for one in judged:
        yield f"{one.outcome.value}: {one.text} {one.figures}"
    for outcome, count in ((outcome, sum(one.outcome is outcome for one in judged)) for outcome in Outcome):
        counts.append(f"{count} {outcome.plural if count != 1 else outcome.value}")
    yield f"claims: {', '.join(counts)}"


def _test(claim: ClaimNode, comparison: Comparison, score: str, arm: RunGroup, baseline: RunGroup) -> _Tested:
    unit = comparison.unit(score)
    margin = 0.0 if claim.margin is None else unit.margin(claim.margin)
    amount = unit.format_amount(margin) if margin else ""
    words = _WORDS[claim.claim][bool(margin)].format(baseline=baseline.label, m=amount)
    text = claim.sentence or f"{arm.label} is {words} in {score} on {comparison.task}."
    found = comparison.difference(arm, baseline, score)
    if found is None:
        reason = "of the same seeds " * comparison.is_paired
        return _Tested(text, f"[no usable runs {reason}have {score}]", math.nan, math.nan)
    if not found.is_tested:
        return _Tested(text, f"[{found.line()}; not assessed: {found.reason}]", math.nan, math.nan)
    return _Tested(text, f"[{found.line()}]", *_p_values(claim.claim, found.contrast, margin))


def _p_values(claim: str, contrast: Contrast, margin: float) -> tuple[float, float]:
    """Return the one-sided p-values of the hypotheses that a claim is wrong and that it is right."""
    if claim == "better":
        return contrast.p_above(margin), contrast.p_below(margin)
    if claim == "worse":
        return contrast.p_below(-margin), contrast.p_above(-margin)
    if claim == "not_worse":
        return contrast.p_above(-margin), contrast.p_below(-margin)
    outside = min(contrast.p_above(margin), contrast.p_below(-margin))
    return max(contrast.p_above(-margin), contrast.p_below(margin)), outside


def _find_task(claim: ClaimNode, comparisons: Sequence[Comparison], key: str, source: Path | str) -> Comparison:
    """Return the comparison of the task of a claim.

    Raises:
        InputError: there is no such task, or none is given and there are several.
    """
    tasks = {comparison.task: comparison for comparison in comparisons if comparison.groups}
    if claim.task is None and len(tasks) == 1:
        return next(iter(tasks.values()))
    if claim.task not in tasks:
        expected = f"one of {', '.join(tasks) or '(no runs to compare)'}"
        raise InputError(key=f"{key}.task", value=claim.task, expected=expected, source=source)
    return tasks[claim.task]


def _find_score(claim: ClaimNode, comparison: Comparison, key: str, source: Path | str) -> str:
    """Return the score of a claim, by default the primary metric.

    Raises:
        InputError: the runs do not have it.
    """
    score = claim.metric or comparison.primary_metric
    if score not in comparison.scores():
        expected = f"one of {', '.join(comparison.scores())}"
        raise InputError(key=f"{key}.metric", value=score, expected=expected, source=source)
    return score


def _find_group(name: str, comparison: Comparison, key: str, source: Path | str) -> RunGroup:
    """Return the group with a label or the only one with a strategy.

    Raises:
        InputError: no group has the name, or several have the strategy.
    """
    groups = [group for group in comparison.groups if name in (group.label, group.strategy)]
    if len(groups) != 1:
        expected = f"one of {', '.join(group.label for group in comparison.groups)}"
        raise InputError(key=key, value=name, expected=expected, source=source)
    return groups[0]
