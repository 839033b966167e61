"""Tables of rows of a run, their scores, and the contribution of every row to them."""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.statistics.contrast import Floats
from gpt2_pl.experiments.statistics.contributions import (
    class_f1,
    from_confusion,
    from_distinct,
    from_sums,
    pearson,
    spearman,
)
from gpt2_pl.text.metrics import CHRF_ORDER, chrf_of_counts
from gpt2_pl.text.overlap import BLEU_ORDER, bleu_of_counts

Positions = NDArray[np.intp]
"""Indices of rows in a table."""

_OF_ALL = "distinct"  # scores whose counts of a row depend on the other rows
_OF_COUNTS = {"chrf": chrf_of_counts, "bleu": bleu_of_counts}  # scores of sums of counts of every row
_NUM_COUNTS = {"chrf": 3 * CHRF_ORDER, "bleu": 2 + 2 * BLEU_ORDER, _OF_ALL: 3}  # counts of a row
_MAX_CLASSES = 200  # limits the confusion counts, K * K
_CORRELATIONS = {"pearson": pearson, "spearman": spearman}  # metrics of numbers that are no means over rows


@dataclass(frozen=True, eq=False)
class RowScore:
    """A score of a run, computed from its rows.

    Args:
        value: the score of all rows; of a perplexity its logarithm, the loss per token.
        contributions: (N,) contribution of each row, by deletion of the row; see
            :mod:`gpt2_pl.experiments.statistics.contributions`.
        is_binary: the score is the share of rows with a property, so that contributions are 0 or 1.
        is_mean: the score is the mean of its contributions.
    """

    value: float
    contributions: Floats
    is_binary: bool = False
    is_mean: bool = False


@dataclass(frozen=True, eq=False)
class RowScores:
    """Scores of a run in a split, computed from its rows.

    Args:
        digest: digest of the texts and labels of the rows; runs of equal digests were scored on the same rows.
        scores: the scores by name, such as ``val/accuracy``.
        label_shares: share of every class up to the last that occurs, the accuracy of predicting it for every row; None
            for rows without classes or of one class.
    """

    digest: str
    scores: dict[str, RowScore]
    label_shares: list[float] | None = None


Columns = Mapping[str, NDArray[Any]]
"""Values of every row (N, ...), by name."""


@dataclass(frozen=True, eq=False)
class RowTable:
    """Table of rows, from which scores are computed.

    Args:
        digest: digest of the texts and labels of the rows.
        columns: what each row adds to the scores.
        compute: returns the scores of any rows by name, such as ``val/accuracy``.
    """

    digest: str
    columns: Columns
    compute: Callable[[Columns], dict[str, RowScore]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values())))

    def scores(self) -> RowScores:
        """Return the scores of all rows."""
        shares = None
        labels = self.columns.get("label")
        if labels is not None and labels.dtype.kind == "i" and len(np.unique(labels)) > 1:
            shares = (np.bincount(labels) / len(labels)).tolist()
        return RowScores(self.digest, self.compute(self.columns), shares)

    def select(self, positions: Positions, digest: str) -> RowTable:
        """Return the table of some rows, whose digest is ``digest``, without scores that need all rows."""
        columns = {name: column[positions] for name, column in self.columns.items() if not name.startswith(_OF_ALL)}
        return RowTable(digest, columns, self.compute)


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows of a run that are compared, if runs of the same task have different rows.

    Args:
        positions: indices of the rows in the run's table.
        scores: scores of these rows.
        is_all: whether the run has no other rows, so that its recorded scores are those of these rows.
    """

    positions: Positions
    scores: RowScores
    is_all: bool


def read_row_contents(folder: Path, split: str) -> dict[str, bytes]:
    """Read the identity of the rows of a table that :func:`read_row_table` has read.

    Args:
        folder: folder of the run.
        split: ``val`` or ``test``.

    Returns:
        A digest of the text, label and number of tokens of every row in order. The key is the number of the row or
        poem, or its text in a table without numbers; if it is repeated, with the number of the repetition. Rows of one
        cluster are one row, whose key is the cluster.
    """
    name = next(name for name in ("losses", "predictions") if (folder / f"{name}_{split}.csv").is_file())
    keys: Counter[str] = Counter()
    contents: dict[str, list[str]] = defaultdict(list)
    with (folder / f"{name}_{split}.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            number = next(row[column] for column in ("poem", "row", "text") if column in row)
            keys[number] += 1
            unique = number if keys[number] == 1 else f"{number} ({keys[number]})"
            content = [row[column] for column in ("text", "label", "n_tokens") if column in row]
            contents[row.get("cluster", unique)] += [unique, *content] if "cluster" in row else content
    ordered = sorted(contents) if "cluster" in row else contents
    return {key: hashlib.sha256(str(contents[key]).encode()).digest()[:8] for key in ordered}


def read_row_table(folder: Path, split: str, metrics: Sequence[str]) -> RowTable | None:
    """Read the rows of a split from ``losses_SPLIT.csv`` or ``predictions_SPLIT.csv``.

    Args:
        folder: folder of the run.
        split: ``val`` or ``test``.
        metrics: names of the metrics of the run's task; columns of these names are outcomes of rows.

    Returns:
        The rows; None if there is no file, or it has no labels.

    Raises:
        InputError: the file is invalid.
    """
    csv.field_size_limit(sys.maxsize)
    for name, read in (("losses", _read_losses), ("predictions", _read_predictions)):
        if (file := folder / f"{name}_{split}.csv").is_file():
            try:
                return read(file, split, metrics)
            except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
                raise InputError(f"{file} is broken: {' '.join(str(error).split())[:200]}") from None
    return None


def _read_losses(file: Path, split: str, metrics: Sequence[str]) -> RowTable:
    """Read the losses of every poem or context; rows of one cluster are added up to one row."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows:
        raise ValueError("it has no rows")
    number = "poem" if "poem" in rows[0] else "row"
    keys = [(row[number], row["n_tokens"], *([row["text"]] if "text" in row else [])) for row in rows]
    n_tokens = [float(int(row["n_tokens"])) for row in rows]
    if min(n_tokens) < 0 or sum(n_tokens) == 0:
        raise ValueError("its numbers of tokens must be at least 0, and one of them above 0")
    columns = {}
    if "loss" in rows[0]:  # reference baselines of generated texts have none
        columns["loss"] = np.array([(float(row["loss"]), n) for row, n in zip(rows, n_tokens, strict=True)])
    for name in metrics:
        num_counts = next((n for key, n in _NUM_COUNTS.items() if name.startswith(key)), None)
        if num_counts is not None and f"{name}_counts" in rows[0]:
            columns[name] = np.array([_counts(row[f"{name}_counts"], num_counts) for row in rows])
        elif name in rows[0] and name not in columns:
            columns[name] = np.array([(float(row[name]), 1.0) if row[name] != "" else (0.0, 0.0) for row in rows])
    if "cluster" in rows[0]:
        _, cluster = np.unique([row["cluster"] for row in rows], return_inverse=True)
        columns = {name: _sums(values, cluster) for name, values in columns.items() if not name.startswith(_OF_ALL)}
    return RowTable(hashlib.sha256(str(keys).encode()).hexdigest()[:12], columns, partial(_loss_scores, split))


def _counts(cell: str, num_counts: int) -> list[float]:
    """Return the counts of a row; an empty cell is that of a row that the score leaves out, and has zeros."""
    if cell == "":
        return [0.0] * num_counts
    counts = [float(int(count)) for count in str(cell).split()]
    if len(counts) != num_counts:
        raise ValueError(f"a row must have {num_counts} counts, got {len(counts)}")
    return counts


def _sums(values: Floats, cluster: NDArray[np.intp]) -> Floats:
    """Return the sums (C, F) of values (N, F) over the rows of each of C clusters."""
    sums = np.zeros((cluster.max() + 1, values.shape[1]))
    np.add.at(sums, cluster, values)
    return sums


def _loss_scores(split: str, columns: Columns) -> dict[str, RowScore]:
    """Return loss and perplexity per token, BLEU, chrF, distinct-n, and the means of other columns."""
    scores = {}
    for name, sums in columns.items():
        of_counts = next((of_counts for key, of_counts in _OF_COUNTS.items() if name.startswith(key)), None)
        if of_counts is not None:
            scores[name] = RowScore(*from_sums(sums, of_counts))
        elif name.startswith(_OF_ALL):
            scores[name] = RowScore(*from_distinct(sums))
        elif name == "loss" or (sums[:, 1] != 1).any():
            with np.errstate(invalid="ignore", divide="ignore"):  # a run may diverge
                scores[name] = RowScore(*from_sums(sums, _ratio))
        else:
            scores[name] = _mean(sums[:, 0])
    if "loss" in scores:
        scores["perplexity"] = scores["loss"]
    return {f"{split}/{name}": score for name, score in scores.items()}


def _ratio(sums: Floats) -> Floats:
    """Return the ratios (...) of sums (..., 2): a loss per token, or a mean."""
    ratios: Floats = sums[..., 0] / sums[..., 1]
    return ratios


def _read_predictions(file: Path, split: str, metrics: Sequence[str]) -> RowTable | None:
    with file.open(encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines)
        names = list(table.fieldnames or ())
        if not {"text", "label", "prediction"} <= set(names):
            return None
        if len(set(names)) < len(names):
            raise ValueError("its columns must have different names")
        classes = {name[2:-1]: i for i, name in enumerate(name for name in names if name.startswith("p("))}
        outcomes = [] if classes else [name for name in names if name in metrics]
        correlations = [] if classes else [name for name in _CORRELATIONS if name in metrics]
        if correlations:
            outcomes = list(dict.fromkeys(["label", "prediction", *outcomes]))
        digest, values = hashlib.sha256(), []
        for row in table:
            digest.update(f"{row['text']}\0{row['label']}\0".encode())
            if outcomes:
                values.append([float(row[name]) for name in outcomes])
            elif 2 <= len(classes) <= _MAX_CLASSES:
                values.append([classes[row["label"]], classes[row["prediction"]]])
            else:
                raise ValueError(f"it must have 2 to {_MAX_CLASSES} classes, got {len(classes)}")
    if not values:
        raise ValueError("it has no rows")
    columns = dict(zip(outcomes or ("label", "prediction"), np.array(values).T, strict=True))
    compute = partial(_number_scores, split, correlations) if outcomes else partial(_class_scores, split, len(classes))
    return RowTable(digest.hexdigest()[:12], columns, compute)


def _number_scores(split: str, correlations: Sequence[str], columns: Columns) -> dict[str, RowScore]:
    """Return the means of outcomes, and correlations of labels and predictions."""
    outcomes = [name for name in columns if not (correlations and name in ("label", "prediction"))]
    scores = {name: _mean(columns[name]) for name in outcomes}
    with np.errstate(invalid="ignore", over="ignore"):  # a run may diverge
        found = {name: _CORRELATIONS[name](columns["label"], columns["prediction"]) for name in correlations}
    scores |= {name: RowScore(*one) for name, one in found.items()}
    return {f"{split}/{name}": score for name, score in scores.items()}


def _class_scores(split: str, num_classes: int, columns: Columns) -> dict[str, RowScore]:
    scores = classification_scores(columns["label"], columns["prediction"], num_classes)
    return {f"{split}/{name}": score for name, score in scores.items()}


def _mean(values: Floats) -> RowScore:
    return RowScore(float(values.mean()), values, bool(np.isin(values, (0.0, 1.0)).all()), is_mean=True)


def regression_scores(labels: Floats, predictions: Floats) -> dict[str, RowScore]:
    """Return the mean squared error as loss, the mean absolute error, and the correlations of Pearson and Spearman.

    Args:
        labels: (N,) true numbers.
        predictions: (N,) predicted numbers.

    Returns:
        The scores by name.
    """
    errors = predictions - labels
    scores = {"loss": _mean(np.square(errors)), "mae": _mean(np.abs(errors))}
    return scores | {name: RowScore(*score(labels, predictions)) for name, score in _CORRELATIONS.items()}


def classification_scores(
    labels: NDArray[np.integer], predictions: NDArray[np.integer], num_classes: int
) -> dict[str, RowScore]:
    """Return accuracy, macro F1 and, for two classes, F1 of class 1.

    As in torchmetrics, macro F1 is the mean over the classes that occur as a label or a prediction. The deletion of a
    row does not change these classes; the F1 of a class without rows is 0.

    Args:
        labels: (N,) true classes.
        predictions: (N,) predicted classes.
        num_classes: number of classes K, at least 2.

    Returns:
        The scores by name.
    """
    seen = np.union1d(labels, predictions)

    def macro_f1(counts: Floats) -> Floats:
        means: Floats = class_f1(counts)[..., seen].mean(-1)
        return means

    scores = {
        "accuracy": _mean((labels == predictions).astype(float)),
        "macro_f1": RowScore(*from_confusion(labels, predictions, num_classes, macro_f1)),
    }
    if num_classes == 2:
        f1 = from_confusion(labels, predictions, num_classes, lambda counts: class_f1(counts)[..., 1])
        scores["f1"] = RowScore(*f1)
    return scores
