"""Compare runs: scores, differences with confidence intervals and verdicts, costs and plots."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.terminal import Progress, track
from gpt2_pl.errors import InputError, printable
from gpt2_pl.experiments.archive import unpacked
from gpt2_pl.experiments.claims import Outcome, claim_lines, judge_claims, read_claims
from gpt2_pl.experiments.comparison import Comparison, compare
from gpt2_pl.experiments.figures import plot_names, plots
from gpt2_pl.experiments.latex import latex
from gpt2_pl.experiments.report import as_json, file_name, markdown, page, write_csv
from gpt2_pl.experiments.run import Run, counted_runs
from gpt2_pl.experiments.summary import summary, wrap_lines
from gpt2_pl.filesystem import atomic_write, require_writable
from gpt2_pl.inference.loading import similar_run

RUNS_HELP = "run folders, folders that contain some, or archives of gpt2-pl archive"
_PREPARATIONS = {".search": "search trial", ".pretrain": "pretraining run"}  # by the ending of a sweep's folder


def main(args: list[str]) -> None:
    """Run ``gpt2-pl compare``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: a run, the margin, the baseline or the file of claims is invalid.
        SystemExit: a claim fails (status 1).
    """
    parser = CommandParser(prog="gpt2-pl compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=RUNS_HELP)
    out_help = "folder for report.md, .html, .csv, .json and .tex and the figures (default: no report is written)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out_help)
    baseline_help = "strategy that the others are compared with (default: full, or else the first)"
    parser.add_argument("--baseline", metavar="NAME", help=baseline_help)
    margin_help = "difference in the primary metric that matters, decided before looking: points for a share, percent "
    parser.add_argument("--margin", type=float, metavar="M", help=f"{margin_help}for a perplexity (default: none)")
    add_row_options(parser)
    check_help = "judge the claims of a YAML file; the status is 1 if one fails (default: no claims)"
    parser.add_argument("--check", type=Path, metavar="FILE", help=check_help)
    given = parser.parse_args(args)
    with unpacked(given.runs) as folders:
        _compare_runs(folders, given)


def _compare_runs(folders: list[Path], given: argparse.Namespace) -> None:
    """Compare the runs below folders, and write the report.

    Raises:
        InputError: a run, the margin, the baseline or the file of claims is invalid.
        SystemExit: a claim fails (status 1).
    """
    if given.out is not None:
        require_writable(given.out / "report.md", "out")
    claims = None if given.check is None else read_claims(given.check)
    with Progress("Reading runs", total=2) as progress:
        runs, notes = read_runs(folders, given.runs)
        progress.advance(description=f"Comparing {counted_runs(runs)}")
        comparisons = compare(
            runs,
            given.baseline,
            given.margin,
            allow_missing_rows=given.allow_missing_rows,
            paired_seeds=given.paired_seeds,
        )
    comparisons[0].notes[:0] = notes
    judged = [] if claims is None else judge_claims(claims, comparisons, given.check)
    _print(summary(comparisons, _terminal_width()))
    if given.out is not None:
        _write_files(comparisons, given.out)
        print(printable(f"{given.out}: report.html, .md, .tex, .csv and .json, and figures as .png, .pdf and .svg"))
    if judged:
        print_lines(claim_lines(judged))
    if any(one.outcome is Outcome.FAILS for one in judged):
        raise SystemExit(1)


def add_row_options(parser: CommandParser) -> None:
    """Add the options on which runs and rows are compared with which."""
    paired = "pair runs with the same seed; declare it only if a seed fixes the same data order or weights in both"
    parser.add_argument("--paired_seeds", action="store_true", help=f"{paired} strategies, and before looking")
    text = "compare also if more than 1 %% of the rows are not in all runs; only rows of all runs are compared"
    parser.add_argument("--allow_missing_rows", action="store_true", help=text)


def read_runs(paths: list[Path], shown: list[Path] | None = None) -> tuple[list[Run], list[str]]:
    """Read run folders, and the run folders below folders.

    Trials of searches and pretraining runs below a folder are left out, because a sweep runs them to prepare others.

    Args:
        paths: run folders, and folders that contain some.
        shown: the path that reports show for each of them, such as that of an archive; by default ``paths``.

    Returns:
        The runs, and a note if runs were left out.

    Raises:
        InputError: there is no run folder, or one is invalid.
    """
    folders: dict[Path, str] = {}
    left_out: dict[Path, str] = {}
    for path, name in zip(paths, shown or paths, strict=True):
        found = run_folders(path)
        roles = {folder: role for folder in found if (role := _preparation(folder, path)) is not None}
        if len(roles) == len(found):
            expected = f"a run folder, or a folder with other runs than {_counted(roles.values())}"
            raise InputError(key="RUN", value=str(name), expected=expected)
        folders |= {folder: str(name / folder.relative_to(path)) for folder in found if folder not in roles}
        left_out |= roles
    counted = _counted(role for folder, role in left_out.items() if folder not in folders)
    notes = [f"{counted} are left out, because they prepare other runs"] if counted else []
    return [Run.read(folder, shown) for folder, shown in folders.items()], notes


def _preparation(folder: Path, below: Path) -> str | None:
    """Return what a run below a folder is to the sweep that started it, if it prepares other runs."""
    is_of_sweep = (folder / "sweep.json").is_file()
    names = folder.relative_to(below).parts if is_of_sweep else ()
    return next((_PREPARATIONS[suffix] for name in names if (suffix := Path(name).suffix) in _PREPARATIONS), None)


def _counted(roles: Iterable[str]) -> str:
    """Return how many runs have each role."""
    counts = Counter(roles)
    known = [(role, counts[role]) for role in _PREPARATIONS.values() if counts[role]]
    return " and ".join(f"{count} {role}{'s' * (count > 1)}" for role, count in known)


def print_lines(texts: Iterable[str], indent: int = 0) -> None:
    """Print texts, after a number of spaces, in lines that are as wide as the terminal."""
    _print("\n".join(wrap_lines(texts, _terminal_width(), indent)))


def _terminal_width() -> int:
    """Return the number of columns of the terminal, 80 if the output is no terminal."""
    return shutil.get_terminal_size().columns


def _print(text: str) -> None:
    print(printable(text, keep="\n\t"), flush=True)


def _write_files(comparisons: list[Comparison], out: Path) -> None:
    """Write the report, the plots, the page and the data."""
    links = {
        comparison.task: {name: _image_file(comparison, name) for name in plot_names(comparison)}
        for comparison in comparisons
    }
    with atomic_write(out / "report.md") as file:
        file.write(markdown(comparisons, links))
    drawn = track(comparisons, "Drawing figures", len(comparisons))
    images = {comparison.task: plots(comparison) for comparison in drawn}
    for comparison in comparisons:
        for name, formats in images[comparison.task].items():
            for kind, content in formats.items():
                with atomic_write((out / _image_file(comparison, name)).with_suffix(f".{kind}"), "wb") as file:
                    file.write(content)
    embedded = {task: {name: formats["png"] for name, formats in of_task.items()} for task, of_task in images.items()}
    with atomic_write(out / "report.html") as file:
        file.write(page(comparisons, embedded))
    with atomic_write(out / "report.tex") as file:
        file.write(latex(comparisons))
    with atomic_write(out / "report.json") as file:
        file.write(json.dumps([as_json(comparison) for comparison in comparisons], indent=2))
    with atomic_write(out / "report.csv") as file:
        write_csv(comparisons, csv.writer(file))


def _image_file(comparison: Comparison, name: str) -> str:
    return f"{file_name(comparison.task)}_{name}.png"


def run_folders(path: Path) -> list[Path]:
    """Return a run folder itself, or all run folders below a folder.

    Raises:
        InputError: there are none.
    """
    if not os.path.exists(path):  # unlike Path.exists, it does not raise an error for names that are too long
        raise InputError(f"RUN: there is no folder {path}{similar_run(path)}", key="RUN", value=path)
    if (path / "metrics.json").is_file():
        return [path]
    folders = sorted(file.parent for file in path.glob("**/metrics.json"))
    if not folders:
        raise InputError(f"RUN must be or contain a run folder, with metrics.json, got {path}", key="RUN", value=path)
    return folders
