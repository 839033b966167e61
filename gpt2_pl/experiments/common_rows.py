"""Runs of one task that can be compared, and the rows that all of them have."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.rows import Positions, read_row_contents
from gpt2_pl.experiments.run import Run

MAX_LOST = 0.01
"""Share of the rows that may be dropped without being asked for."""
SPLITS = ("val", "test")
_MAX_LISTED = 6  # runs in a note


@dataclass(frozen=True, eq=False)
class CommonRows:
    """Rows that runs have in common.

    Args:
        ids: the rows, in the order of most runs.
        positions: for each digest of a table, the indices of the rows in the table.
        num_total: number of rows that any of the runs has.
        lacking: for the path of each run that lacks rows of others, their number.
        other: for the path of each run of other data the reason: a row has another text or label than in most runs,
            or no row is the same. The numbers do not include these runs.
    """

    ids: tuple[str, ...]
    positions: dict[str, Positions]
    num_total: int
    lacking: dict[str, int]
    other: dict[str, str]

    @property
    def num_dropped(self) -> int:
        """Number of rows that not all runs have."""
        return self.num_total - len(self.ids)

    def note(self, split: str) -> str:
        """Return how many rows are dropped, and which runs lack rows."""
        listed = [f"{folder} lacks {count:,}" for folder, count in self.lacking.items()]
        more = [f"{len(listed) - _MAX_LISTED} more runs lack some"] if len(listed) > _MAX_LISTED else []
        rows = f"{self.num_dropped:,} of {self.num_total:,} rows of {split}"
        verb = "is" if self.num_dropped == 1 else "are"
        return f"{rows} {verb} dropped, because not all runs have them: {', '.join([*listed[:_MAX_LISTED], *more])}"


def comparable_runs(
    runs: Sequence[Run], split: str, notes: list[str], allow_missing_rows: bool
) -> tuple[list[Run], dict[str, Any], int]:
    """Return the runs with the most common data and base, which are compared on the rows that all of them have.

    Args:
        runs: finished runs of one task, at least one.
        split: the split that is compared.
        notes: list to which notes on runs that are left out, and on dropped rows, are added.
        allow_missing_rows: permit that more than :data:`MAX_LOST` of the rows are dropped.

    Returns:
        The runs, the properties that all of them share, and the number of rows of the split that are dropped.

    Raises:
        InputError: too many rows are missing.
    """
    keys = {id(run): json.dumps(run.comparison_key(split), sort_keys=True) for run in runs}
    trained = [run for run in runs if not run.record.get("reference")] or runs
    (most_common, _), *_ = Counter(keys[id(run)] for run in trained).most_common(1)
    shared = json.loads(most_common)
    comparable = []
    for run in runs:
        run.kept = {}
        if keys[id(run)] == most_common:
            comparable.append(run)
        else:
            other = [name for name, value in json.loads(keys[id(run)]).items() if value != shared[name]]
            difference = f"other {', '.join(other)} than most ({_described(run, split, other[0])})"
            notes.append(f"{run.path} is left out: {difference}")
    rows = find_common_rows(comparable, split)
    if rows is not None:
        notes += [f"{folder} is left out: {reason}" for folder, reason in rows.other.items()]
        comparable = [run for run in comparable if run.path not in rows.other]
        _require_few_lost(rows, split, allow_missing_rows)
        _keep(comparable, split, rows, notes)
    _keep_in_other_splits(comparable, split, notes, allow_missing_rows)
    if (scored := comparable[0].compared_rows(split)) is not None:
        shared |= {"rows": len(next(iter(scored.scores.values())).contributions), "texts": scored.digest}
    return comparable, shared, 0 if rows is None else rows.num_dropped


def _keep_in_other_splits(runs: Sequence[Run], split: str, notes: list[str], allow_missing_rows: bool) -> None:
    """Compare runs on common rows also in the split that is only described, if they have nearly all in common."""
    for other in SPLITS:
        rows = None if other == split else find_common_rows(runs, other)
        if rows is None or rows.other or not rows.ids:
            continue
        if allow_missing_rows or rows.num_dropped <= MAX_LOST * rows.num_total:
            _keep(runs, other, rows, notes)


def _described(run: Run, split: str, name: str) -> str:
    """Return the value of a property that runs must share; that of a base is its folder, if known, and its digest."""
    value, folder = run.comparison_key(split)[name], (run.record.get("base") or {}).get("path")
    return f"{folder}, {value}" if name == "base" and folder is not None else str(value)


def find_common_rows(runs: Sequence[Run], split: str) -> CommonRows | None:
    """Find the rows that runs have in common.

    Returns:
        The rows; None if all runs have the same rows in the same order, or a run has no table of the split.
    """
    if not all(split in run.row_scores for run in runs):
        return None
    digests = Counter(run.row_scores[split].digest for run in runs)
    if len(digests) < 2:
        return None
    contents: dict[str, dict[str, bytes]] = {}
    for run in runs:
        digest = run.row_scores[split].digest
        if digest not in contents:
            contents[digest] = read_row_contents(run.folder, split)
    most = contents[digests.most_common(1)[0][0]]
    reasons = {digest: _reason(rows, most) for digest, rows in contents.items()}
    same = {digest: rows for digest, rows in contents.items() if not reasons[digest]}
    every = set().union(*same.values())
    of_runs = [(run.path, run.row_scores[split].digest) for run in runs]
    ids = tuple(row for row in most if all(row in rows for rows in same.values()))
    places = {digest: {row: i for i, row in enumerate(rows)} for digest, rows in same.items()}
    return CommonRows(
        ids=ids,
        positions={digest: np.array([place[row] for row in ids], np.intp) for digest, place in places.items()},
        num_total=len(every),
        lacking={
            folder: len(every) - len(same[digest])
            for folder, digest in of_runs
            if digest in same and len(same[digest]) < len(every)
        },
        other={folder: reasons[digest] for folder, digest in of_runs if reasons[digest]},
    )


def _reason(rows: dict[str, bytes], most: dict[str, bytes]) -> str:
    """Return why rows are of other data than those of most runs; empty if they are not."""
    changed = next((row for row in most if row in rows and rows[row] != most[row]), None)
    if changed is not None:
        return f"other texts than most (row {changed})"
    return "" if rows.keys() & most.keys() else "other rows than most"


def _require_few_lost(rows: CommonRows, split: str, allow_missing_rows: bool) -> None:
    """Check that runs have nearly all rows in common.

    Raises:
        InputError: they have none, or more than :data:`MAX_LOST` of all rows are lost and that is not allowed.
    """
    if not rows.ids:
        raise InputError(f"RUN: no row of {split} is in all runs; compare fewer runs", key="RUN")
    if rows.num_dropped > MAX_LOST * rows.num_total and not allow_missing_rows:
        limit = f"at most {100 * MAX_LOST:.0f} % may be missing unless --allow_missing_rows is given"
        which = ", ".join(f"{folder} lacks {count:,}" for folder, count in [*rows.lacking.items()][:_MAX_LISTED])
        got = f"{rows.num_dropped:,} of {rows.num_total:,} rows of {split} are not in all runs"
        raise InputError(f"RUN: {got} ({which}); {limit}", key="RUN")


def _keep(runs: Sequence[Run], split: str, rows: CommonRows, notes: list[str]) -> None:
    """Compare runs on the rows that they have in common."""
    digest = hashlib.sha256("\n".join([split, *rows.ids]).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    for run in runs:
        run.keep_rows(split, rows.positions[run.row_scores[split].digest], digest)
    if rows.num_dropped:
        notes.append(rows.note(split))
