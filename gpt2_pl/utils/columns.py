"""Columns of tables of predictions: which are written, in which order and with which names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpt2_pl.errors import InputError, require

Pick = Callable[[Sequence[Any]], list[Any]]
"""Function that returns the values of the chosen columns of a row."""


def choose_columns(names: Sequence[str], columns: Sequence[str] | None, key: str) -> tuple[Pick, list[str]]:
    """Return a function that picks the values of chosen columns, and the names of these columns.

    Args:
        names: names of all columns.
        columns: the chosen columns, each with ``=NEW`` if it has a new name; None for all.
        key: option of ``columns``, for error messages.

    Raises:
        InputError: a column does not exist, or two columns have the same name.
    """
    indices, chosen = list(range(len(names))), list(names)
    if columns is not None:
        indices, chosen = [], []
        for column in columns:
            name, _, new = (column, "", "") if column in names else column.rpartition("=")
            meant = f"; did you mean {new}={name}?" if new in names else ""
            require(name in names, key, column, f"one of {', '.join(names)}, with =NEW for a new name{meant}")
            indices.append(names.index(name))
            chosen.append(new or name)
    require(len(set(chosen)) == len(chosen), key, chosen, "different names; rename some with OLD=NEW")
    return lambda values: [values[i] for i in indices], chosen


def check_kept(kept: Sequence[str], written: Sequence[str], key: str) -> None:
    """Check that columns of the input that are copied differ from each other and from the other columns.

    Args:
        kept: names of the copied columns.
        written: names of the other columns of the output.
        key: option of ``kept``, for error messages.

    Raises:
        InputError: a name occurs twice.
    """
    for i, name in enumerate(kept):
        if name in written or name in kept[:i]:
            reason = "is given twice" if name in kept[:i] else "is also a column that is written"
            advice = f"leave it out or rename it in the file; written are {', '.join(written)}"
            raise InputError(f"{key} must be other columns of the file, and {name!r} {reason}: {advice}", key=key)
