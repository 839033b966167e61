"""Rows with named columns: their sources, and checks of their columns, texts and labels."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from gpt2_pl.errors import InputError, shorten

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 1000  # number of rows that are decoded at a time

Row = dict[str, Any]
T = TypeVar("T")


class RowSource(ABC):
    """Source of rows with named columns, which can be read repeatedly.

    Args:
        name: name of the file or dataset, for error messages.
        key: option that named it, for error messages.

    Attributes:
        columns: names of the columns.
        fingerprint: digest of everything that the rows depend on.
    """

    columns: Sequence[str]
    fingerprint: str

    def __init__(self, name: str, key: str) -> None:
        self.name, self.key = name, key

    @abstractmethod
    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        """Yield the given columns of each row, or the reason why the row is invalid."""

    def read(self, columns: Sequence[str], skip_bad: bool = False) -> Iterator[tuple[int, Row | str]]:
        """Read the given columns of all rows.

        Args:
            columns: names of the columns.
            skip_bad: whether invalid rows are skipped instead of raising an error.

        Yields:
            The number of each row, from 1, and its values by column. If ``skip_bad`` is set, the values of an invalid
            row are replaced by the reason.

        Raises:
            InputError: a row or the source cannot be read, or there are no valid rows.
        """
        number, has_valid_row = 0, False
        row: Row | str = ""
        for number, row in enumerate(self._rows(columns), start=1):
            if isinstance(row, str):
                row = f"row {number} cannot be read: {row}"
                if not skip_bad:
                    raise self.error(f", {row}")
            else:
                has_valid_row = True
            yield number, row
        if not has_valid_row:
            raise self.error(f" has no valid rows; {row}" if number else " has no rows")

    def error(self, reason: str) -> InputError:
        """Return an error whose message is the option and the name of this source, followed by the reason."""
        return InputError(f"{self.key}: {self.name}{reason}", key=self.key)


class DatasetRows(RowSource):
    """Source of the rows of a dataset, from the hub or in memory.

    Args:
        dataset: the dataset.
        name: its name, for error messages.
        key: option that named it, for error messages.
    """

    def __init__(self, dataset: Dataset, name: str, key: str) -> None:
        super().__init__(name, key)
        self.dataset = dataset
        self.columns = dataset.column_names
        self.fingerprint = dataset._fingerprint

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        for table in self.dataset.select_columns(list(columns)).with_format("arrow").iter(BATCH_ROWS):
            yield from table.to_pylist()


def require_columns(
    source: RowSource, required: Sequence[str], keys: str = "data.columns and data.label_column"
) -> None:
    """Check that a source has some columns.

    Args:
        source: the rows.
        required: the columns.
        keys: options that select the columns, for error messages.

    Raises:
        InputError: a column is missing.
    """
    columns = list(source.columns)
    for column in required:
        if column not in columns:
            more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
            names = ", ".join(map(shorten, columns[:20])) or "none"
            reason = f"has no column {shorten(column)}; it has {names}{more}; select columns with {keys}"
            raise InputError(f"{source.name} {reason}", key=keys)


def batches(items: Iterable[T], size_of: Callable[[T], int], max_items: int, max_size: int) -> Iterator[list[T]]:
    """Yield lists of consecutive items.

    Args:
        items: the items.
        size_of: size of an item, such as its number of characters.
        max_items: maximum number of items in a list.
        max_size: maximum size of a list with more than one item.
    """
    batch: list[T] = []
    size = 0
    for item in items:
        if batch and (len(batch) == max_items or size + size_of(item) > max_size):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += size_of(item)
    if batch:
        yield batch


def parse_text(row: Mapping[str, Any], column: str, source: str, number: int) -> str:
    """Return the text in a column of a row.

    Args:
        row: values by column.
        column: column of the text.
        source: name of the source, for error messages.
        number: number of the row, from 1 without the header, for error messages.

    Raises:
        InputError: the value is missing, not text, or blank.
    """
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        message = f"{column!r} must be a non-empty string, got {shorten(text)}"
        raise InputError(message, key=column, source=f"{source}, row {number}")
    return text


class LabelError(InputError):
    """Error of a label that is neither the name nor the index of a class."""


def parse_label(row: Mapping[str, Any], column: str, names: Sequence[str], source: str, number: int) -> int:
    """Return the class index of the label in a column of a row.

    A label is a class name or a class index. If some class names are numbers, a numeric label is the class name with
    equal value (``4.0`` equals ``4``) and never an index.

    Args:
        row: values by column.
        column: column of the label.
        names: class names in the order of their indices.
        source: name of the source, for error messages.
        number: number of the row, from 1 without the header, for error messages.

    Raises:
        LabelError: the value is neither a class name nor a class index.
    """
    value = row[column]
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if text in names:
        return names.index(text)
    numeric_names = [_parse_decimal(name) for name in names]
    has_numeric_names = any(name is not None for name in numeric_names)
    if (label := _parse_decimal(text)) is not None:
        candidates: Sequence[Any] = numeric_names if has_numeric_names else range(len(names))
        if candidates.count(label) == 1 and (has_numeric_names or text[0] != "-"):
            return candidates.index(label)
    expected = f"{'' if has_numeric_names else f'0 to {len(names) - 1} or '}one of {', '.join(names)}"
    message = f"the label in {column!r} must be {expected}, got {shorten(value)}"
    raise LabelError(message, key=column, source=f"{source}, row {number}")


def parse_number(row: Mapping[str, Any], column: str, limits: tuple[float, float], source: str, number: int) -> float:
    """Return the number in a column of a row.

    Args:
        row: values by column.
        column: column of the number.
        limits: smallest and largest valid number.
        source: name of the source, for error messages.
        number: number of the row, from 1 without the header, for error messages.

    Raises:
        InputError: the value is not a number, or is out of range.
    """
    value = row[column]
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    low, high = limits
    if not low <= parsed <= high:  # not a number compares false
        message = f"the label in {column!r} must be a number in [{low:g}, {high:g}], got {shorten(value)}"
        raise InputError(message, key=column, source=f"{source}, row {number}")
    return parsed


@lru_cache(maxsize=1024)
def _parse_decimal(text: str) -> Decimal | None:
    """Return the value of a plain decimal number, or None for any other text."""
    return Decimal(text) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None
