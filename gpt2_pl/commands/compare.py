"""compare: runs side by side, as tables and plots."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from gpt2_pl.commands.support.parser import CommandParser, similar_run
from gpt2_pl.errors import InputError, printable
from gpt2_pl.experiments.comparison import Comparison, compare
from gpt2_pl.experiments.report import (
    IN_SHORT,
    PAGE,
    as_json,
    file_name,
    html_table,
    markdown,
    page,
    plot_names,
    plots,
    short_rows,
    table_lines,
    write_csv,
)
from gpt2_pl.experiments.run import Run
from gpt2_pl.filesystem import atomic_write, require_file, require_writable
from gpt2_pl.utils.yaml_json import read_yaml


def main(args: list[str]) -> None:
    """Compare runs and write report.md, report.html, report.csv, report.json and the plots into a folder."""
    parser = CommandParser(prog="gpt2-pl compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="runs' folders, or folders above them")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--baseline", help="the strategy that differences are to; by default full, or else the first")
    parser.add_argument("--markdown", type=Path, help="the Markdown report's own place, instead of OUT/report.md")
    parser.add_argument("--preface", type=Path, help="a Markdown file that the report begins with")
    parser.add_argument(
        "--elsewhere", type=Path, help="a YAML file of others' figures: by task, a list of {what, figures, source}"
    )
    given = parser.parse_args(args)
    require_writable(given.out / "report.md", "out")
    if given.markdown is not None:
        require_writable(given.markdown, "markdown")
    preface = _read(given.preface, "preface")
    elsewhere = _elsewhere(given.elsewhere)
    folders = [folder for path in given.runs for folder in run_folders(path)]
    comparisons = compare([Run.read(folder) for folder in folders], given.baseline)
    report = given.markdown or given.out / "report.md"
    folder = Path(os.path.relpath(given.out, report.parent))
    text = [preface]
    if any(comparison.groups for comparison in comparisons):
        text.append("\n".join(["## In short", "", *table_lines(*short_rows(comparisons)), "", IN_SHORT, ""]))
    for comparison in comparisons:
        links = {name: (folder / _picture(comparison, name)).as_posix() for name in plot_names(comparison)}
        text.append(markdown(comparison, links, elsewhere.get(comparison.task, [])))
    with atomic_write(report) as file:
        file.write("\n".join(filter(None, text)))
    print(printable("\n".join(filter(None, text)), keep="\n\t"), flush=True)
    _write_rest(comparisons, elsewhere, given.out)
    print(printable(f"{given.out}: {', '.join(sorted(path.name for path in given.out.iterdir()))}"))


def _write_rest(comparisons: list[Comparison], elsewhere: dict[str, list[dict[str, str]]], out: Path) -> None:
    """Plots, page and data."""
    pages = []
    if any(comparison.groups for comparison in comparisons):
        pages.append(f"<h2>In short</h2>\n{html_table(*short_rows(comparisons))}\n<p>{IN_SHORT}</p>")
    for comparison in comparisons:
        pictures = plots(comparison)
        for name, picture in pictures.items():
            with atomic_write(out / _picture(comparison, name), "wb") as file:
                file.write(picture)
        pages.append(page(comparison, pictures, elsewhere.get(comparison.task, [])))
    for name, content in (
        ("report.html", PAGE.format(body="\n".join(pages))),
        ("report.json", json.dumps([as_json(comparison) for comparison in comparisons], indent=2)),
    ):
        with atomic_write(out / name) as file:
            file.write(content)
    with atomic_write(out / "report.csv") as file:
        write_csv(comparisons, csv.writer(file))


def _picture(comparison: Comparison, name: str) -> str:
    return f"{file_name(comparison.task)}_{name}.png"


def _read(path: Path | None, key: str) -> str:
    try:
        return "" if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: {path} cannot be read: {error}") from None


def _elsewhere(path: Path | None) -> dict[str, list[dict[str, str]]]:
    """Figures from elsewhere, by task."""
    content = ({} if path is None else read_yaml(require_file(path, "elsewhere"))) or {}
    good = isinstance(content, dict) and all(isinstance(rows, list) for rows in content.values())
    rows = [row for rows in content.values() for row in rows] if good else [None]
    if not all(isinstance(row, dict) and row.keys() == {"what", "figures", "source"} for row in rows):
        raise InputError(f"elsewhere: {path} must give every task a list of {{what, figures, source}}")
    return content


def run_folders(path: Path) -> list[Path]:
    """The run that a folder is, or all runs below it.

    Raises:
        InputError: there is none.
    """
    try:
        if (path / "metrics.json").is_file():
            return [path]
        found = sorted(file.parent for file in path.glob("**/metrics.json"))
    except OSError as error:
        raise InputError(f"{str(path)[:500]} cannot be read: {error.strerror}") from None
    if not found:
        if not path.exists():
            raise InputError(f"RUN: there is no folder {path}{similar_run(path)}")
        raise InputError(f"{path} is no run's folder and has none below it (one has metrics.json)")
    return found


# What runs say of themselves is text, whatever they say
