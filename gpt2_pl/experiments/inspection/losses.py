"""Inspection of the losses of a language model's contexts: the highest, and those in which two runs differ most."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.inspection.page import Column, Inspection, Section, Table
from gpt2_pl.experiments.inspection.predictions import cells_of, reading
from gpt2_pl.experiments.run import Run


class RowLoss(NamedTuple):
    """Loss of a context or a poem.

    Args:
        number: its number.
        num_tokens: number of its targets.
        loss: mean loss of its targets, in nats.
        text: start of its text; empty if the table has none.
        generated: generated text; empty if the table has none.
        references: its references, as the table has them.
    """

    number: int
    num_tokens: int
    loss: float
    text: str = ""
    generated: str = ""
    references: str = ""


def has_losses(file: Path) -> bool:
    """Return whether a file exists and has a column of losses; the table of a reference baseline has none."""
    if not file.exists():
        return False
    with reading(file) as lines:
        return "loss" in next(csv.reader(lines), [])


def read_losses(file: Path) -> list[RowLoss]:
    """Read a run's table of losses, ``losses_SPLIT.csv``.

    Rows without targets are left out.

    Raises:
        InputError: the file is missing, too large or broken, or has no rows.
    """
    with reading(file) as lines:
        records = csv.reader(lines, strict=True)
        header = next(records, [])
        number = "poem" if "poem" in header else "row"
        texts = [name for name in ("text", "generated", "references") if name in header]
        columns = [number, "n_tokens", "loss", *texts]
        if missing := [name for name in columns if name not in header]:
            raise ValueError(f"it has no column {missing[0]}")
        found = [
            RowLoss(i, int(n), float(loss) / int(n), **dict(zip(texts, cells, strict=True)))
            for i, (n, loss, *cells) in cells_of(records, header, columns)
            if int(n) > 0
        ]
        if not found:
            raise ValueError("it has no rows")
        return found


def inspect_losses(
    runs: Sequence[Run], split: str, tables: Sequence[Sequence[RowLoss]], count: int, created: str
) -> Inspection:
    """Inspect the contexts of one run, the highest loss first, or of two, the largest difference first.

    Args:
        runs: one or two runs.
        split: split of the contexts.
        tables: losses of each run.
        count: number of contexts that are shown.
        created: date of the page.

    Returns:
        The inspection.

    Raises:
        InputError: the runs were evaluated on other contexts.
    """
    rows = tables[0]
    keys = [[(row.number, row.num_tokens, row.text) for row in table] for table in tables]
    if keys.count(keys[0]) < len(keys):
        message = f"{runs[1].folder} was evaluated on other contexts of {split} than {runs[0].folder}"
        raise InputError(message, key="RUN", value=runs[1].folder)
    losses = np.array([[row.loss for row in table] for table in tables])
    num_tokens = np.array([row.num_tokens for row in rows])
    means = (losses * num_tokens).sum(1) / num_tokens.sum()
    differences = losses[-1] - losses[0]
    order = np.argsort(-(losses[0] if len(runs) == 1 else np.abs(differences)), kind="stable")
    names = ["loss"] if len(runs) == 1 else ["loss (first)", "loss (second)", "second minus first"]
    texts = {"text": [row.text for row in rows]}
    if any(row.generated for of_run in tables for row in of_run):
        for i, of_run in enumerate(tables):
            texts[f"generated{' (second)' * i}"] = [row.generated for row in of_run]
        texts["references"] = [row.references for row in rows]
    table: list[Sequence[object]] = [["row", "tokens", *names, *texts]]
    cells = []
    for i in order[:count].tolist():
        values = losses[:, i].tolist() + ([float(differences[i])] if len(runs) > 1 else [])
        row, shown = rows[i], [of_row[i] for of_row in texts.values()]
        table.append([row.number, row.num_tokens, *values, *shown])
        cells.append([str(row.number), str(row.num_tokens), *(f"{value:.3f}" for value in values), *shown])
    kind = "with the highest loss" if len(runs) == 1 else "on which the losses differ most"
    facts = [[f"run{' (second)' * i}", str(run.folder)] for i, run in enumerate(runs)]
    facts += [["task", str(runs[0].record.get("task"))], ["split", split], ["rows", f"{len(rows):,}"]]
    facts += [[f"loss per token{' (second)' * i}", f"{mean:.4f}, perplexity {np.exp(mean):.2f}"]
              for i, mean in enumerate(means)]  # fmt: skip
    columns = [Column("", "name"), Column("", "name")]
    title = f"Inspection of {' and '.join(str(run.folder) for run in runs)}"
    inspection = Inspection(title, Table(columns, [*facts, ["page created", created]]))
    inspection.tables["rows.csv"] = table
    headings = [Column("row"), Column("tokens"), *map(Column, names), *(Column(name, "text") for name in texts)]
    caption = f"{len(cells)} of {len(rows):,} rows"
    explanation = "Losses are means over the predicted tokens of a row, in nats. The text is the start of the row."
    inspection.sections = [Section(f"Rows {kind}", [explanation], tables=[Table(headings, cells, caption)])]
    inspection.summary = [f"{name}: {value}" for name, value in facts]
    if len(runs) > 1:
        lower = int((differences < 0).sum())
        inspection.summary.append(f"lower loss in the second run: {lower:,} of {len(rows):,} rows")
    return inspection
