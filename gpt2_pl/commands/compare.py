"""Compare runs: tables, intervals and plots."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.trained_model import similar_run
from gpt2_pl.errors import InputError, printable
from gpt2_pl.experiments.comparison import Comparison, compare
from gpt2_pl.experiments.figures import plot_names, plots
from gpt2_pl.experiments.report import as_json, file_name, markdown, page, write_csv
from gpt2_pl.experiments.run import Run
from gpt2_pl.filesystem import atomic_write, require_writable


def main(args: list[str]) -> None:
    """Compare runs and write report.md, report.html, report.csv, report.json and the plots to a folder."""
    parser = CommandParser(prog="gpt2-pl compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders, or folders that contain some")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    baseline_help = "the strategy that the others are compared with; default: full, or else the first"
    parser.add_argument("--baseline", help=baseline_help)
    given = parser.parse_args(args)
    require_writable(given.out / "report.md", "out")
    folders = [folder for path in given.runs for folder in run_folders(path)]
    comparisons = compare([Run.read(folder) for folder in folders], given.baseline)
    links = {
        comparison.task: {name: _image_file(comparison, name) for name in plot_names(comparison)}
        for comparison in comparisons
    }
    report = markdown(comparisons, links)
    with atomic_write(given.out / "report.md") as file:
        file.write(report)
    print(printable(report, keep="\n\t"), flush=True)
    _write_files(comparisons, given.out)
    print(printable(f"{given.out}: {', '.join(sorted(path.name for path in given.out.iterdir()))}"))


def _write_files(comparisons: list[Comparison], out: Path) -> None:
    """Write the plots, the page and the data."""
    images = {comparison.task: plots(comparison) for comparison in comparisons}
    for comparison in comparisons:
        for name, png in images[comparison.task].items():
            with atomic_write(out / _image_file(comparison, name), "wb") as file:
                file.write(png)
    with atomic_write(out / "report.html") as file:
        file.write(page(comparisons, images))
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
