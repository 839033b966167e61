"""Inspection of predicted numbers: rows with the largest absolute error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpt2_pl.experiments.inspection.page import Column, Inspection, Section, Table
from gpt2_pl.experiments.inspection.predictions import NumericPredictions
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.contributions import pearson, spearman


def inspect_numbers(run: Run, split: str, rows: NumericPredictions, count: int, created: str) -> Inspection:
    """Inspect the predicted numbers of a run.

    Args:
        run: the run.
        split: split of the rows.
        rows: the predictions.
        count: number of rows that are shown.
        created: date of the page.

    Returns:
        The inspection.
    """
    errors, N = rows.errors, len(rows.labels)
    scores = {
        "mean absolute error": float(np.abs(errors).mean()),
        "root mean squared error": float(np.sqrt(np.square(errors).mean())),
        "mean error (prediction minus label)": float(errors.mean()),
        "Pearson correlation": pearson(rows.labels, rows.predictions)[0],
        "Spearman correlation": spearman(rows.labels, rows.predictions)[0],
    }
    about = {"run": str(run.folder), "task": str(run.record.get("task")), "strategy": run.strategy, "split": split}
    shown = {name: f"{value:.4g}" for name, value in scores.items()}
    lines = {**about, "rows": f"{N:,}", **shown, "page created": created}
    columns = [Column("", "name"), Column("", "name")]
    inspection = Inspection(f"Inspection of {run.folder}", Table(columns, [list(item) for item in lines.items()]))
    inspection.sections = [_rows_section(rows, count, inspection)]
    summary = [f"  {name} {value}" for name, value in shown.items()]
    inspection.summary = [str(run.folder), f"  {about['task']}, {run.strategy}, {split}, {N:,} rows", *summary]
    return inspection


def _rows_section(rows: NumericPredictions, count: int, inspection: Inspection) -> Section:
    errors = rows.errors
    table: list[Sequence[object]] = [["row", "text", "label", "prediction", "error"]]
    cells = []
    for i in np.argsort(-np.abs(errors), kind="stable")[:count]:
        values = [float(rows.labels[i]), float(rows.predictions[i]), float(errors[i])]
        table.append([rows.row_numbers[i], rows.texts[i], *values])
        cells.append([str(rows.row_numbers[i]), rows.texts[i], *(f"{value:.4g}" for value in values)])
    inspection.tables["rows.csv"] = table
    columns = [Column("row"), Column("text", "text"), Column("label"), Column("prediction"), Column("error")]
    caption = f"The {len(cells)} rows with the largest absolute error of {len(rows.labels):,}"
    return Section("Rows with the largest error", tables=[Table(columns, cells, caption)])
