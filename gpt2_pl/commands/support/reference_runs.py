"""Folders of reference baselines, as runs leave them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_pl.experiments.run import Run
from gpt2_pl.filesystem import atomic_write

_SHARED = ("task", "configs", "monitor", "mode", "primary", "metrics", "base", "data", "device", "processes")

Cells = tuple[Sequence[str], Iterable[Sequence[object]]]
"""Columns and rows of a table."""


def reference_record(
    run: Run, name: str, scores: Mapping[str, float], cost: Mapping[str, float], seed: int | None = None
) -> dict[str, Any]:
    """Return the run record of a reference: its own scores and costs, and the task, data and base of the run.

    Args:
        run: the run whose data the reference predicts.
        name: name of the reference.
        scores: its scores, such as ``test/chrf``.
        cost: its costs, such as ``seconds``.
        seed: seed of a random reference; None for a deterministic one.
    """
    return {
        "status": "finished",
        "reference": name,
        **({} if seed is None else {"seed": seed}),
        **{key: run.record[key] for key in _SHARED if key in run.record},
        "scores": {**scores, "best_epoch": 1},
        "epochs": [{"epoch": 1, **scores}],
        "parameters": {"trainable": 0, "total": 0, "layers": []},
        **cost,
    }


def write_reference(
    folder: Path, run: Run, record: Mapping[str, Any], tables: Mapping[str, Cells], texts: Mapping[str, str]
) -> None:
    """Write the folder of a reference.

    Args:
        folder: the folder, which must not exist.
        run: the run whose data the reference predicts.
        record: the run record of the reference.
        tables: tables of rows by file name.
        texts: generated texts by file name.
    """
    folder.mkdir(parents=True)
    for name, (columns, rows) in tables.items():
        with atomic_write(folder / name) as file:
            csv.writer(file).writerows([columns, *rows])
    for name, text in texts.items():
        with atomic_write(folder / name) as file:
            file.write(text)
    with atomic_write(folder / "config.yaml") as file:
        file.write((run.folder / "config.yaml").read_text(encoding="utf-8"))
    with atomic_write(folder / "metrics.json") as file:
        json.dump(record, file, indent=2)
