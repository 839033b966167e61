"""Rows with named columns: their sources, and checks of their columns, texts and labels."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gpt2_pl.errors import InputError, shorten

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_BATCH_ROWS = 1000  # number of rows that are decoded at a time

Row = dict[str, Any]


class RowSource(ABC):
    """Source of rows with named columns, which can be read repeatedly.

    Args:
        name: name of the file or dataset, for error messages.
        key: option that named it, for error messages.
        skip_bad: whether invalid rows are skipped instead of raising an error.

    Attributes:
        columns: names of the columns.
        types: Arrow type of each column with a declared type.
        fingerprint: digest of everything that the rows depend on.
    """

    columns: Sequence[str]
    types: Mapping[str, pa.DataType]
    fingerprint: str

    def __init__(self, name: str, key: str, skip_bad: bool = False) -> None:
        self.name, self.key, self.skip_bad, self.types = name, key, skip_bad, {}

    @abstractmethod
    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        """Yield the given columns of each row, or the reason why the row is invalid."""

    def read(self, columns: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
        """Read the given columns of all rows.

        Args:
            columns: names of the columns.

        Yields:
            The number of each row, from 1, and its values by column. If ``skip_bad`` is set, the values of an invalid
            row are replaced by the reason.

        Raises:
            InputError: a row or the source cannot be read, or there are no valid rows.
        """
        number, has_valid_row = 0, False
        for number, row in enumerate(self._rows(columns), start=1):
            if isinstance(row, str):
                row = f"row {number} cannot be read: {row}"
                if not self.skip_bad:
                    raise self.error(f", {row}")
            else:
                has_valid_row = True
            yield number, row
        if not has_valid_row:
            raise self.error(f" has no {'valid ' if number else ''}rows")

    def error(self, reason: str) -> InputError:
        """Return an error whose message is the option and the name of this source, followed by the reason."""
        return InputError(f"{self.key}: {self.name}{reason}", key=self.key)


class Rows(RowSource):
    """Source of rows in memory.

    Args:
        rows: rows with the same columns; at least one.
        name: name of the source, for error messages.
    """

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        super().__init__(name, "data")
        self.rows = rows
        self.columns = list(rows[0])
        self.fingerprint = hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        return ({column: row[column] for column in columns} for row in self.rows)


class HubSplit(RowSource):
    """Source of the rows of a hub dataset's split.

    Args:
        dataset: the split.
        name: name of the dataset and split, for error messages.
        key: option that named the dataset, for error messages.
    """

    def __init__(self, dataset: Dataset, name: str, key: str) -> None:
        super().__init__(name, key)
        self.dataset = dataset
        self.columns = dataset.column_names
        self.types = dict(zip(self.columns, dataset.features.arrow_schema.types, strict=True))
        self.fingerprint = dataset._fingerprint

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        for batch in self.dataset.select_columns(list(columns)).iter(_BATCH_ROWS):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def require_columns(
    source: RowSource,
    texts: Sequence[str],
    label: str | None = None,
    keys: str = "data.columns and data.label_column",
) -> None:
    """Check that a source has columns of text and labels.

    Args:
        source: the rows.
        texts: columns of texts.
        label: column of labels.
        keys: options that select the columns, for error messages.

    Raises:
        InputError: a column is missing or has an invalid type.
    """
    columns = list(source.columns)
    for column in (*texts, *([] if label is None else [label])):
        if column not in columns:
            more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
            names = ", ".join(map(shorten, columns[:20])) or "none"
            reason = f"has no column {shorten(column)}; it has {names}{more}; select columns with {keys}"
            raise InputError(f"{source.name} {reason}", key=keys)
        arrow_type, is_label = source.types.get(column), column not in texts
        if arrow_type is not None and not _is_text_type(arrow_type, allow_numbers=is_label):
            expected = "text or numbers" if is_label else "text"
            reason = f"must be {expected}, got the type {str(arrow_type)[:200]}; select columns with {keys}"
            raise InputError(f"{source.name}: the column {shorten(column)} {reason}", key=keys)


def _is_text_type(arrow_type: pa.DataType, allow_numbers: bool) -> bool:
    """Return whether an Arrow type, or the value type of a dictionary type, is text or, if allowed, numeric."""
    import pyarrow.types as types

    arrow_type = arrow_type.value_type if types.is_dictionary(arrow_type) else arrow_type
    text = (types.is_string, types.is_large_string, types.is_string_view)
    number = (types.is_integer, types.is_floating, types.is_boolean)
    return any(is_type(arrow_type) for is_type in (*text, *(number if allow_numbers else ())))


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
        InputError: the value is neither a class name nor a class index.
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
    raise InputError(message, key=column, source=f"{source}, row {number}")


@lru_cache(maxsize=1024)
def _parse_decimal(text: str) -> Decimal | None:
    """Return the value of a plain decimal number, or None for any other text."""
    return Decimal(text) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None
