"""Plan an experiment from pilot runs: the smallest difference that seeds and texts can show, and the seeds needed."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from gpt2_pl.commands.compare import RUNS_HELP, add_row_options, print_lines, read_runs
from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.archive import unpacked
from gpt2_pl.experiments.comparison import Comparison, compare
from gpt2_pl.experiments.planning import SEEDS, make_plan, plan_table, plan_title
from gpt2_pl.experiments.report import about

_ABOUT = (
    "Differences that are shown with a chance of 80 % (two-sided test at 5 %, rounded up). The pilot was lucky if the "
    "true standard deviations over seeds are at the upper 80 % bound of the measured ones."
)


def main(args: list[str]) -> None:
    """Run ``gpt2-pl power``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: a run or an option is invalid, or no runs give a plan.
    """
    parser = CommandParser(prog="gpt2-pl power", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=RUNS_HELP)
    difference_help = "difference to be shown: points for a share, percent for a perplexity, else as the score"
    parser.add_argument("--difference", type=float, required=True, metavar="D", help=difference_help)
    parser.add_argument("--metric", metavar="NAME", help="score, such as val/macro_f1 (default: the primary metric)")
    baseline_help = "strategy that the others are compared with (default: full, or else the first)"
    parser.add_argument("--baseline", metavar="NAME", help=baseline_help)
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="planned seeds of each strategy, beside 3, 4, 5, 8, 10 and 15"
    )
    parser.add_argument("--texts", type=int, metavar="M", help="planned number of texts (default: that of the runs)")
    add_row_options(parser)
    given = parser.parse_args(args)
    if not 0 < given.difference < math.inf:
        raise InputError(key="difference", value=given.difference, expected="above 0")
    for key, least in (("seeds", 2), ("texts", 2)):
        if (value := getattr(given, key)) is not None and not least <= value < 2**31:
            raise InputError(key=key, value=value, expected=f"at least {least}")
    with unpacked(given.runs) as paths:
        _plan(paths, given)


def _plan(paths: list[Path], given: argparse.Namespace) -> None:
    """Print the plan of each strategy.

    Raises:
        InputError: a run is invalid, or no runs give a plan.
    """
    runs, notes = read_runs(paths, given.runs)
    comparisons = compare(
        runs, given.baseline, allow_missing_rows=given.allow_missing_rows, paired_seeds=given.paired_seeds
    )
    _require_metric(given.metric, comparisons)
    seeds = SEEDS if given.seeds is None else (*SEEDS, given.seeds)
    num_plans = 0
    for comparison in comparisons:
        score = given.metric or (comparison.primary_metric if comparison.groups else "")
        if score not in comparison.scores():
            continue
        print_lines([f"{comparison.task} by {score}. {about(comparison)}"])
        for group in comparison.groups[1:]:
            try:
                plan = make_plan(comparison, group, score, given.difference, given.texts)
            except InputError as error:
                print_lines([str(error)])
                continue
            print_lines([plan_title(comparison, group, plan, score)])
            print(plan_table(plan, seeds), flush=True)
            print_lines([plan.needed()], indent=2)
            num_plans += 1
    if not num_plans:
        expected = "runs of at least two strategies with at least two seeds each and outcomes of the same rows"
        raise InputError(f"RUN must be {expected}", key="RUN", expected=expected)
    print_lines([_ABOUT, *(f"note: {note}" for note in notes)])


def _require_metric(metric: str | None, comparisons: list[Comparison]) -> None:
    """Check that a score exists in a task.

    Raises:
        InputError: it does not.
    """
    names = list(dict.fromkeys(name for comparison in comparisons for name in comparison.scores() if name))
    if metric is not None and metric not in names:
        raise InputError(key="metric", value=metric, expected=f"one of {', '.join(names) or '(no scores)'}")
