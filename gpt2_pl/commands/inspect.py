"""Inspect where a run errs: worst rows, confusions, calibration, slices; or where two runs disagree."""

from __future__ import annotations

import argparse
import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.terminal import Progress
from gpt2_pl.errors import InputError, printable
from gpt2_pl.experiments.error_analysis import Predictions
from gpt2_pl.experiments.inspection.calibration import Calibration, calibrate, store_temperature
from gpt2_pl.experiments.inspection.classification import inspect_classifier
from gpt2_pl.experiments.inspection.page import Inspection, write
from gpt2_pl.experiments.inspection.predictions import (
    SPLITS,
    in_order_of,
    predictions_file,
    read_predictions,
)
from gpt2_pl.experiments.inspection.regression import inspect_numbers
from gpt2_pl.experiments.inspection.summary import Subject
from gpt2_pl.experiments.run import Run
from gpt2_pl.filesystem import require_writable
from gpt2_pl.inference.loading import similar_run

if TYPE_CHECKING:
    from gpt2_pl.datamodules.rows import RowSource

_MAX_ROWS = 5000  # of one list on the page
_MAX_VALUES = 20  # of a column, each a slice
_WIDTH = 80  # of the terminal


def main(args: list[str]) -> None:
    """Inspect one or two runs, and write index.html and tables to a folder."""
    parser = CommandParser(prog="gpt2-pl inspect", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run; two to compare their rows")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--split", choices=("val", "test"), help="split of the rows (default: test if it has labels, else val)"
    )
    parser.add_argument("--rows", type=int, default=50, metavar="N", help="number of rows in each list")
    slice_help = "also the rows whose text matches a regular expression; can be given several times"
    parser.add_argument("--slice", action="append", metavar="NAME=REGEX", default=None, help=slice_help)
    data_help = "data file of the rows, or of the true poems (default: that of the run's configuration)"
    parser.add_argument("--data", metavar="FILE", help=data_help)
    column_help = "column of the data file, whose values are slices; can be given several times"
    parser.add_argument("--column", action="append", metavar="NAME", default=None, help=column_help)
    options = parser.parse_args(args)
    if not 1 <= options.rows <= _MAX_ROWS:
        raise InputError(key="rows", value=options.rows, expected=f"in [1, {_MAX_ROWS:,}]")
    if len(options.runs) > 2:
        raise InputError(key="RUN", value=len(options.runs), expected="one or two run folders")
    patterns = _patterns(options.slice or ())
    require_writable(options.out / "index.html", "out")
    with Progress("Inspecting rows", total=2) as progress:
        inspection, note = _inspect(patterns, options)
        progress.advance(description="Writing the page")
        names = write(inspection, options.out)
    for line in map(printable, inspection.summary):
        print(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4]} ...")
    notes = [note] if note else []
    for line in (*notes, f"{options.out}: {', '.join(names)}"):
        print(textwrap.fill(printable(line), _WIDTH, subsequent_indent="  ", break_long_words=False))


def _inspect(patterns: Mapping[str, str], options: argparse.Namespace) -> tuple[Inspection, str | None]:
    """Inspect the rows, poems or contexts of the runs; also return where the temperature was stored."""
    runs = [_read_run(folder) for folder in options.runs]
    created = time.strftime("%Y-%m-%d %H:%M %Z")
    if (split := _text_split(runs[0], options.split, "poems_{}.txt")) is not None:
        return _inspect_poems(runs, split, options, created), None
    if (split := _text_split(runs[0], options.split, "losses_{}.csv")) is not None:
        return _inspect_contexts(runs, split, options, created), None
    return _inspect_rows(runs, patterns, options, created)


def _read_run(folder: Path) -> Run:
    if not os.path.isdir(folder):  # unlike Path.is_dir, it does not raise an error for names that are too long
        raise InputError(f"RUN: there is no folder {folder}{similar_run(folder)}", key="RUN", value=folder)
    return Run.read(folder)


def _patterns(slices: Sequence[str]) -> dict[str, str]:
    """Return the regular expressions by name.

    Raises:
        InputError: one has no name or no expression.
    """
    patterns = {}
    for text in slices:
        name, _, pattern = text.partition("=")
        if not name.strip() or not pattern:
            raise InputError(key="slice", value=text, expected="NAME=REGEX")
        patterns[name.strip()] = pattern
    return patterns


# Rows


def _inspect_rows(
    runs: Sequence[Run], patterns: Mapping[str, str], options: argparse.Namespace, created: str
) -> tuple[Inspection, str | None]:
    """Inspect the predictions of one or two runs; also return where the temperature was stored."""
    files, splits = zip(*(predictions_file(run.folder, options.split) for run in runs), strict=True)
    if len(set(splits)) > 1:
        raise InputError(f"{files[0]} and {files[1]} are of different splits; give --split", key="split")
    split, predictions = splits[0], [read_predictions(file) for file in files]
    first = predictions[0]
    if not isinstance(first, Predictions):
        _refuse_for_numbers(runs, options)
        return inspect_numbers(runs[0], split, first, options.rows, created), None
    subjects = [Subject(runs[0], split, first)]
    for run, other in zip(runs[1:], predictions[1:], strict=True):
        if not isinstance(other, Predictions):
            raise InputError(f"{files[1]} has no columns p(CLASS), in contrast to {files[0]}", key="RUN")
        subjects.append(Subject(run, split, in_order_of(other, first, (files[0], files[1]))))
    columns = _columns(subjects[0], options)
    calibration = _calibration(subjects[0])
    inspection = inspect_classifier(subjects, calibration, options.rows, columns, patterns, created)
    return inspection, store_temperature(runs[0].folder, calibration)


def _refuse_for_numbers(runs: Sequence[Run], options: argparse.Namespace) -> None:
    given = {"RUN (a second one)": len(runs) > 1, "slice": options.slice, "column": options.column}
    for key, value in given.items():
        if value:
            message = f"{key} requires predictions with class probabilities, columns p(CLASS)"
            raise InputError(f"{message}, and {runs[0].folder} has numbers", key=key)


def _calibration(subject: Subject) -> Calibration:
    if subject.split == "val":
        return calibrate(subject.rows, subject.rows, is_validation=True)
    file = subject.run.folder / "predictions_val.csv"
    validation = read_predictions(file) if file.exists() else None
    if not isinstance(validation, Predictions) or list(validation.names) != list(subject.rows.names):
        validation = None
    return calibrate(subject.rows, validation, is_validation=False)


def _columns(subject: Subject, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the values of the given columns of the data file for every row, joined by row number.

    Raises:
        InputError: the file or a column is missing, a column has too many values, or a row is missing or has another
            text than the run's predictions.
    """
    if not options.column:
        return {}
    from gpt2_pl.datamodules.readers import read_file

    quoting = _data_settings(subject.run).get("quoting")
    quoting = quoting if isinstance(quoting, bool) else None
    file, key = options.data, "data"
    if file is None:
        file, key = _configured_file(subject.run, subject.split)
    source = read_file(file, key, quoting)
    for column in options.column:
        if column not in source.columns:
            expected = f"one of {', '.join(map(str, list(source.columns)[:20]))}"
            raise InputError(key="column", value=column, expected=expected, source=file)
    rows = _joined(subject, source, options.column)
    columns = {column: [str(row[column]) for row in rows] for column in options.column}
    for column, values in columns.items():
        if (n := len(set(values))) > _MAX_VALUES:
            expected = f"a column with at most {_MAX_VALUES} different values"
            message = f"column must be {expected}, got {column} with {n:,}"
            raise InputError(message, key="column", value=column, expected=expected, source=file)
    return columns


def _joined(subject: Subject, source: RowSource, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of the data file in the order of the predictions; texts must be equal if their columns are known.

    Raises:
        InputError: a row is missing or has another text.
    """
    texts = _text_columns(subject.run, source.columns)
    wanted = set(subject.rows.row_numbers)
    read = source.read(list(dict.fromkeys([*columns, *texts])), skip_bad=True)
    by_number = {number: row for number, row in read if number in wanted and not isinstance(row, str)}
    rows = []
    for number, text in zip(subject.rows.row_numbers, subject.rows.texts, strict=True):
        row = by_number.get(number)
        if row is None or (texts and " | ".join(str(row[name]).strip() for name in texts) != text):
            problem = "is missing or invalid" if row is None else "has another text"
            message = f"row {number} of {subject.run.folder}'s predictions {problem} there"
            raise InputError(f"{message}; give the {subject.split} file", key="data", source=source.name)
        rows.append(row)
    return rows


def _text_columns(run: Run, columns: Sequence[str]) -> list[str]:
    """Return the columns of a data file that are the texts of a run's rows; none if the run record does not name them.

    A run record has the possible names of the column of every template field.
    """
    known = (run.record.get("data") or {}).get("columns")
    candidates = known.values() if isinstance(known, dict) else ()
    names = [candidate if isinstance(candidate, list) else [] for candidate in candidates]
    found = [next((name for name in some if name in columns), None) for some in names]
    return [name for name in found if name is not None] if None not in found else []


def _data_settings(run: Run) -> dict[str, Any]:
    settings = (run.settings.get("data") or {}).get("init_args")
    return settings if isinstance(settings, dict) else {}


def _configured_file(run: Run, split: str) -> tuple[str, str]:
    """Return the data file of a split in a run's configuration, and its key.

    Raises:
        InputError: the configuration has none, or a list of files, or the file is not there.
    """
    settings = _data_settings(run)
    key = f"{split}_file"
    if split == "val" and settings.get(key) is None:
        key = "train_file"  # validation rows are a fraction of it
    file = settings.get(key)
    if not isinstance(file, str):
        problem = f"data.{key} is no single file; give the file of the {split} rows with --data"
        raise InputError(problem, key="data", source=run.folder / "config.yaml")
    if not os.path.exists(file):
        source = run.folder / "config.yaml"
        raise InputError(f"there is no file {file}; give it with --data", key=f"data.{key}", source=source)
    return file, f"data.{key}"


# Generated poems and contexts


def _text_split(run: Run, split: str | None, file: str) -> str | None:
    """Return the split of a file of a run, whose name has {} for it; None without one, or if there are predictions."""
    splits = SPLITS if split is None else (split,)
    if any((run.folder / f"predictions_{name}.csv").exists() for name in splits):
        return None
    found = [name for name in splits if (run.folder / file.format(name)).exists()]
    return found[0] if found else None


def _refuse_slices(runs: Sequence[Run], options: argparse.Namespace, what: str) -> None:
    if options.slice or options.column:
        key = "slice" if options.slice else "column"
        raise InputError(f"--slice and --column require predictions, and {runs[0].folder} has {what}", key=key)


def _inspect_contexts(runs: Sequence[Run], split: str, options: argparse.Namespace, created: str) -> Inspection:
    from gpt2_pl.experiments.inspection.losses import inspect_losses, read_losses

    _refuse_slices(runs, options, "losses of contexts")
    tables = [read_losses(run.folder / f"losses_{split}.csv") for run in runs]
    return inspect_losses(runs, split, tables, options.rows, created)


def _inspect_poems(runs: Sequence[Run], split: str, options: argparse.Namespace, created: str) -> Inspection:
    _refuse_slices(runs, options, "poems")
    from gpt2_pl.datamodules.sonnets import read_poems
    from gpt2_pl.experiments.inspection.poems import inspect_poems, inspect_two, match

    run = runs[0]
    file, key = (options.data, "data") if options.data is not None else _configured_file(run, split)
    true = read_poems(file, key)
    matched = [match(read_poems(str(one.folder / f"poems_{split}.txt"), "RUN"), true, file) for one in runs]
    num_given = _data_settings(run).get("prompt_lines", 3)
    if not isinstance(num_given, int) or num_given < 0:
        expected = "a number of lines"
        raise InputError(key="data.prompt_lines", value=num_given, expected=expected, source=run.folder / "config.yaml")
    if len(runs) == 1:
        return inspect_poems(run, split, matched[0], num_given, options.rows, created)
    seconds = {poem.number: poem for poem, _ in matched[1]}
    if seconds.keys() != {poem.number for poem, _ in matched[0]}:
        message = f"{runs[1].folder} must have the poems of {run.folder}, poems_{split}.txt"
        raise InputError(message, key="RUN", value=runs[1].folder)
    poems = [(poem, seconds[poem.number], other) for poem, other in matched[0]]
    losses = [_poem_losses(one.folder / f"losses_{split}.csv") for one in runs]
    return inspect_two(runs, split, poems, losses, num_given, options.rows, created)


def _poem_losses(file: Path) -> dict[int, float]:
    """Return the loss per token of every poem; empty for references, which have none."""
    from gpt2_pl.experiments.inspection.losses import has_losses, read_losses

    return {row.number: row.loss for row in read_losses(file)} if has_losses(file) else {}
