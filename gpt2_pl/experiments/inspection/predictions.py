"""Reading of a run's predictions of every row: class probabilities or numbers."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.errors import InputError, shorten
from gpt2_pl.experiments.error_analysis import Predictions
from gpt2_pl.experiments.statistics.contrast import Floats

MAX_BYTES = 1 << 30
"""Limit of a file of predictions, which is read into memory."""
MAX_CLASSES = 200
SPLITS = ("test", "val")
"""Splits with labels; the first that a run has is inspected."""
_COLUMNS = ("row", "text", "label", "prediction")
_SMALLEST = 5e-7  # half a unit of the last digit: files hold six decimals, so that 0.000000 is any smaller value
_SUM_TOLERANCE = 1e-3  # of the rounded probabilities of a row


@dataclass(frozen=True)
class NumericPredictions:
    """Predicted numbers of labeled rows.

    Args:
        texts: (N,) text of each row.
        labels: (N,) true numbers.
        predictions: (N,) predicted numbers.
        row_numbers: (N,) number of each row in its file.
    """

    texts: Sequence[str]
    labels: Floats
    predictions: Floats
    row_numbers: Sequence[int]

    @property
    def errors(self) -> Floats:
        """(N,) predicted minus true numbers."""
        return self.predictions - self.labels


def predictions_file(folder: Path, split: str | None) -> tuple[Path, str]:
    """Return the file of predictions of a run and its split.

    Args:
        folder: folder of the run.
        split: ``test`` or ``val``; None for the first of :data:`SPLITS` with a file that has labels.

    Raises:
        InputError: there is no such file, or it has no labels.
    """
    unlabeled = None
    for name in SPLITS if split is None else (split,):
        file = folder / f"predictions_{name}.csv"
        if not file.exists():
            continue
        with reading(file) as lines:
            if "label" in next(csv.reader(lines), []):
                return file, name
        unlabeled = file
    if unlabeled is not None:
        raise InputError(f"{unlabeled} has no column label; its rows cannot be inspected", key="RUN", value=folder)
    names = " and no ".join(f"predictions_{name}.csv" for name in (SPLITS if split is None else (split,)))
    raise InputError(f"RUN: {folder} has no {names}", key="RUN", value=folder)


@contextmanager
def reading(file: Path) -> Iterator[Any]:
    """Open a file of predictions; errors of its content name it.

    Raises:
        InputError: it is not a regular file, is larger than :data:`MAX_BYTES`, or its content is invalid.
    """
    csv.field_size_limit(MAX_BYTES)
    if not file.is_file():
        raise InputError(f"{file} must be a regular file", key="RUN", value=file, expected="a regular file")
    if (size := file.stat().st_size) > MAX_BYTES:
        raise InputError(key="size", value=size, expected=f"at most {MAX_BYTES:,} bytes", source=file)
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            yield lines
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"{file} is broken: {reason}", key="RUN", value=file) from None


def read_predictions(file: Path) -> Predictions | NumericPredictions:
    """Read the predictions of labeled rows.

    Probabilities are rounded to six decimals in the file, so that smaller ones count as half of the last digit.

    Args:
        file: ``predictions_SPLIT.csv`` with the columns ``row``, ``text``, ``label``, ``prediction`` and, for each
            class, ``p(CLASS)``.

    Returns:
        Class probabilities, or numbers if the file has no column ``p(CLASS)``.

    Raises:
        InputError: the file is missing, too large or broken, has no rows, or has neither probabilities nor numbers.
    """
    with reading(file) as lines:
        records = csv.reader(lines, strict=True)
        header = next(records, [])
        if missing := [name for name in _COLUMNS if name not in header]:
            raise ValueError(f"it has no column {missing[0]}")
        if len(set(header)) < len(header):
            raise ValueError("its columns must have different names")
        classes = [name for name in header if name.startswith("p(") and name.endswith(")")]
        parse = _read_classes if classes else _read_numbers
        return parse(cells_of(records, header, [*_COLUMNS, *classes]), [name[2:-1] for name in classes])


def cells_of(records: Iterator[list[str]], header: list[str], columns: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the row number and the cells of the other columns of every record.

    Raises:
        ValueError: a record has another number of cells than the header, or its row number is no number.
    """
    indices = [header.index(column) for column in columns]
    for position, record in enumerate(records, start=1):
        if len(record) != len(header):
            raise ValueError(f"row {position} must have {len(header)} values, got {len(record)}")
        number, *cells = (record[i] for i in indices)
        if not (number.isascii() and number.isdigit() and len(number) < 16):
            raise ValueError(f"row {position}: the row number must be a number, got {shorten(number)}")
        yield int(number), cells


def _read_classes(rows: Iterator[tuple[int, list[str]]], names: list[str]) -> Predictions:
    K = len(names)
    if not 2 <= K <= MAX_CLASSES:
        raise ValueError(f"it must have 2 to {MAX_CLASSES} classes, got {K}")
    indices = {name: i for i, name in enumerate(names)}
    texts, numbers, labels, decisions, values = [], array("q"), array("q"), array("q"), array("d")
    for number, (text, label, prediction, *probabilities) in rows:
        for name in (label, prediction):
            if name not in indices:
                raise ValueError(f"row {number}: {shorten(name)} is no class; the classes are {', '.join(names)}")
        p = [float(cell) for cell in probabilities]
        if not all(0.0 <= value <= 1.0 for value in p) or abs(sum(p) - 1.0) > _SUM_TOLERANCE:
            raise ValueError(f"row {number}: probabilities must be in [0, 1] with the sum 1, got {shorten(p)}")
        texts.append(text)
        numbers.append(number)
        labels.append(indices[label])
        decisions.append(indices[prediction])
        values.extend(p)
    _require_rows(texts)
    table = np.maximum(np.frombuffer(values).reshape(-1, K), _SMALLEST)
    return Predictions(texts, np.array(labels), table, names, numbers.tolist(), np.array(decisions))


def _read_numbers(rows: Iterator[tuple[int, list[str]]], _: list[str]) -> NumericPredictions:
    texts, numbers, values = [], array("q"), array("d")
    for number, (text, *cells) in rows:
        for column, cell in zip(("label", "prediction"), cells, strict=True):
            try:
                value = float(cell)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                problem = "without columns p(CLASS), label and prediction must be finite numbers"
                raise ValueError(f"row {number}: {problem}, got {column} {shorten(cell)}")
            values.append(value)
        texts.append(text)
        numbers.append(number)
    _require_rows(texts)
    labels, predictions = np.frombuffer(values).reshape(-1, 2).T
    return NumericPredictions(texts, labels, predictions, numbers.tolist())


def _require_rows(texts: list[str]) -> None:
    if not texts:
        raise ValueError("it has no rows")


def in_order_of(other: Predictions, rows: Predictions, files: tuple[Path, Path]) -> Predictions:
    """Return the predictions of another run with the classes in the order of the first run.

    Args:
        other: predictions of the other run.
        rows: predictions of the first run.
        files: the files of both, for error messages.

    Raises:
        InputError: the runs have other classes, or were evaluated on other rows.
    """
    mine, theirs = files
    if set(other.names) != set(rows.names):
        classes = ", ".join(rows.names)
        raise InputError(key="classes", value=list(other.names), expected=f"those of {mine}: {classes}", source=theirs)
    if len(other.texts) != len(rows.texts):
        expected = f"{len(rows.texts)}, as in {mine}"
        raise InputError(key="number of rows", value=len(other.texts), expected=expected, source=theirs)
    order = [other.names.index(name) for name in rows.names]
    position: NDArray[Any] = np.argsort(order)
    decisions = None if other.decisions is None else position[other.decisions]
    labels = position[other.labels]
    ordered = replace(
        other, labels=labels, probabilities=other.probabilities[:, order], names=rows.names, decisions=decisions
    )
    for i, (text, same_text) in enumerate(zip(rows.texts, other.texts, strict=True)):
        if text != same_text or rows.labels[i] != labels[i]:
            problem = f"row {other.row_numbers[i]} has another text or label than in {mine}"
            raise InputError(f"{theirs}: {problem}; both runs must be evaluated on the same rows", key="RUN")
    return ordered
