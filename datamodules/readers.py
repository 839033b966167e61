"""Readers of CSV, TSV, JSON lines and Parquet files and of hub datasets; rows are streamed in bounded memory."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.errors import InputError, RunError, shorten
from gpt2_pl.filesystem import require_file, reraise_disk_full

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_MRPC_COLUMN = "#1 String"
_DELIMITERS = ("\t", ",", ";")
_BYTE_ORDER_MARK = "\ufeff"
_MAX_VALUE_CHARACTERS = 1 << 26  # limit of a value in delimited text, exceeded after an unclosed quote
_BATCH_ROWS = 1000  # number of rows that are decoded at a time

Row = dict[str, Any]


class RowSource(ABC):
    """Source of rows with named columns, which can be read repeatedly.

    Args:
        name: name of the file or dataset, for error messages.
        key: option that named it, for error messages.
        skip_bad: whether invalid rows are skipped instead of raising an error.
    """

    def __init__(self, name: str, key: str, skip_bad: bool = False) -> None:
        self.name, self.key, self.skip_bad = name, key, skip_bad

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """Names of the columns."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of everything that the rows depend on."""

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """Arrow type of each column with a declared type."""
        return {}

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
                    raise InputError(f"{self.key}: {self.name}, {row}")
            else:
                has_valid_row = True
            yield number, row
        if not has_valid_row:
            raise InputError(f"{self.key}: {self.name} has no {'valid ' if number else ''}rows")


class Rows(RowSource):
    """Source of rows in memory.

    Args:
        rows: rows with the same columns; at least one.
        name: name of the source, for error messages.
    """

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        super().__init__(name, "data")
        self.rows = rows

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns of the first row."""
        return list(self.rows[0])

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the rows."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

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

    @property
    def columns(self) -> Sequence[str]:
        """Names of the dataset's columns."""
        return self.dataset.column_names

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """Arrow types of the dataset's columns."""
        return dict(zip(self.columns, self.dataset.features.arrow_schema.types, strict=True))

    @property
    def fingerprint(self) -> str:
        """Fingerprint that ``datasets`` computes."""
        return self.dataset._fingerprint

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        for batch in self.dataset.select_columns(list(columns)).iter(_BATCH_ROWS):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


class _File(RowSource):
    """Source of the rows of a local file."""

    def __init__(self, path: Path, key: str, skip_bad: bool) -> None:
        super().__init__(str(path), key, skip_bad)
        self.path = path
        self._status = self._find_status()

    def _find_status(self) -> tuple[int, int, int]:
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _options(self) -> list[Any]:
        """Return JSON-serializable values on which the rows depend in addition to the file's contents."""
        return [type(self).__name__, self.skip_bad]

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the contents and of the reading options, independent of the file's name and modification time."""
        with self.path.open("rb") as file:
            contents = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(json.dumps([contents, *self._options()]).encode()).hexdigest()

    def read(self, columns: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
        """Read the given columns of all rows; see :meth:`RowSource.read`.

        Raises:
            InputError: as in the base class; also if the file has changed since it was opened.
        """
        yield from super().read(columns)
        if self._find_status() != self._status:
            raise InputError(f"{self.key}: {self.name} changed while it was being read; wait until it is complete")

    def _error(self, reason: str) -> InputError:
        return InputError(f"{self.key}: {self.name}{reason}")


class DelimitedText(_File):
    """Source of the rows of a CSV or TSV file: UTF-8 text with a header.

    The delimiter (tab, comma or semicolon) is the one that splits the header into the most columns. Values are not
    converted. An empty line is not a row. A line of blanks is not a row if there are several columns, and an invalid
    row if there is one. A column without a name is called ``Unnamed: i`` after its index i.

    Args:
        path: path of the file.
        key: option that named the file, for error messages.
        skip_bad: whether to skip rows that are not UTF-8 or have more or fewer values than the header.
        quoting: whether double quotes enclose values; defaults to True except for MRPC files.

    Raises:
        InputError: the header is invalid.
    """

    def __init__(self, path: Path, key: str, skip_bad: bool, quoting: bool | None) -> None:
        super().__init__(path, key, skip_bad)
        csv.field_size_limit(_MAX_VALUE_CHARACTERS)
        header, self.delimiter = self._read_header(quoting)
        self.quoting = _MRPC_COLUMN not in header if quoting is None else quoting
        self._columns = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
        if duplicate := _find_duplicate(self._columns):
            raise self._error(f" must have different column names, got {shorten(duplicate)} twice in the header")

    def _options(self) -> list[Any]:
        return [*super()._options(), self.quoting]

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns in the header."""
        return self._columns

    @contextmanager
    def _lines(self) -> Iterator[Iterable[str]]:
        with self.path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield chain([next(file, "").lstrip(_BYTE_ORDER_MARK)], file)

    def _records(self, lines: Iterable[str], delimiter: str, quoting: bool) -> Iterator[list[str]]:
        quotes: Any = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
        return csv.reader(lines, delimiter=delimiter, quoting=quotes, strict=True)

    def _read_header(self, quoting: bool | None) -> tuple[list[str], str]:
        """Return the names in the header and the delimiter that separates most names."""
        candidates: list[tuple[list[str], str]] = []
        for delimiter in _DELIMITERS:
            with self._lines() as lines:
                try:
                    candidates.append((next(self._records(lines, delimiter, quoting is not False)), delimiter))
                except csv.Error:
                    continue  # the delimiter occurs within quotes
        if not candidates:
            raise self._error(": a double quote in the header is not closed")
        names, delimiter = max(candidates, key=lambda pair: len(pair[0]))
        if not _is_utf8(names):
            raise self._error(": the header is not UTF-8 text; save the file as UTF-8")
        if any("\0" in name for name in names):
            raise self._error(": the header contains NUL, as in UTF-16; save the file as UTF-8")
        if not "".join(names).strip():
            raise self._error(": the first line is blank; it must contain the column names")
        return names, delimiter

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        indices = [(column, self._columns.index(column)) for column in columns]
        n_columns, n_rows = len(self._columns), 0
        with self._lines() as lines:
            records = self._records(lines, self.delimiter, self.quoting)
            next(records)  # the header
            while True:
                try:
                    cells = next(records)
                except StopIteration:
                    return
                except csv.Error as error:  # the end of the row is unknown, so that it cannot be skipped
                    option = "data.quoting" if self.key.startswith("data.") else "quoting"
                    raise self._error(
                        f", row {n_rows + 1}: a double quote is not closed ({error}); "
                        f"if quotes are part of the text, set {option} to false"
                    ) from None
                blank = len(cells) == 1 and cells[0] != "" and not cells[0].strip(" \t")
                if not cells or (blank and n_columns > 1):
                    continue
                n_rows += 1
                if not _is_utf8(cells):
                    yield "it is not UTF-8 text"
                elif blank:
                    yield "it is blank"
                elif len(cells) != n_columns:
                    yield f"it must have {n_columns} values, got {len(cells)} (delimiter {self.delimiter!r})"
                else:
                    yield {column: cells[index] for column, index in indices}


def _is_utf8(cells: list[str]) -> bool:
    """Return whether cells were UTF-8: ``surrogateescape`` decodes invalid bytes as lone surrogates."""
    text = "".join(cells)
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _find_duplicate(names: Iterable[str]) -> str | None:
    """Return the first name that occurs more than once, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


class JSONLines(_File):
    """Source of the rows of a JSON lines file or of a JSON array; every row is an object.

    Args:
        path: path of the file.
        key: option that named the file, for error messages.
        skip_bad: whether to skip rows that are not UTF-8 or not an object with unique names.
    """

    @cached_property
    def columns(self) -> Sequence[str]:
        """Names that occur in any row; the complete file is read to find them."""
        names: dict[str, None] = {}
        for _, row in super().read(()):
            if isinstance(row, dict):
                names.update(dict.fromkeys(row))
        return list(names)

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        """Yield the given columns, or all columns if ``columns`` is empty."""
        for row in self._objects():
            if isinstance(row, str) or not columns:
                yield row
            else:
                yield {column: row.get(column) for column in columns}

    def _objects(self) -> Iterator[Row | str]:
        """Yield each row, or the reason why it is not an object with unique names."""
        with self.path.open("rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
            if first.lstrip(_BYTE_ORDER_MARK.encode()).lstrip().startswith(b"["):
                try:
                    values = _parse_json(first + lines.read())
                except ValueError as error:
                    raise self._error(f" cannot be read as a JSON array: {error}") from None
                yield from map(_require_object, values)
                return
            for line in chain([first], lines):
                if not line.strip():
                    continue
                try:
                    value = _parse_json(line)
                    yield _require_object(value)
                except ValueError as error:
                    yield str(error)


def _require_object(value: Any) -> Row | str:
    return value if isinstance(value, dict) else "it is not a JSON object"


def _parse_json(text: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the text is not valid JSON; the message is one line.
    """
    try:
        decoded = text.decode().lstrip(_BYTE_ORDER_MARK)
        value = json.loads(decoded, object_pairs_hook=_reject_duplicate_keys, parse_int=_parse_int)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # lone surrogates raise UnicodeError
    except UnicodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"it has the key {shorten(_find_duplicate(name for name, _ in pairs))} twice")
    return row


def _parse_int(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**63:
        raise ValueError(f"integers must fit in 64 bits, got {len(digits)} digits: {digits[:30]}")
    return value


class ParquetFile(_File):
    """Source of the rows of a Parquet file.

    Args:
        path: path of the file.
        key: option that named the file, for error messages.
        skip_bad: whether to skip rows whose text is not UTF-8.

    Raises:
        InputError: the file cannot be read, has a column twice, or has no rows.
    """

    def __init__(self, path: Path, key: str, skip_bad: bool) -> None:
        super().__init__(path, key, skip_bad)
        with self._open() as file:
            self._types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            if (duplicate := _find_duplicate(file.schema_arrow.names)) is not None:
                raise self._error(f" must have different column names, got {shorten(duplicate)} twice")
            if not file.metadata.num_rows:
                raise self._error(" has no rows")

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns."""
        return list(self._types)

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """Arrow types of the columns."""
        return self._types

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile as Reader

        try:
            with self.path.open("rb") as file:  # pyarrow could interpret a path as a URI
                yield Reader(file)
        except (pa.ArrowException, OSError) as error:
            raise self._error(f" cannot be read as parquet: {(str(error).splitlines() or [''])[0]}") from error

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        with self._open() as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                arrays = [batch.column(batch.schema.names.index(column)) for column in columns]
                try:
                    rows = zip(*(array.to_pylist() for array in arrays), strict=True)
                    yield from (dict(zip(columns, row, strict=True)) for row in rows)
                except UnicodeDecodeError:
                    yield from (_decode_row(dict(zip(columns, row, strict=True))) for row in zip(*arrays, strict=True))


def _decode_row(row: Mapping[str, pa.Scalar]) -> Row | str:
    """Convert Arrow values to Python, or return the reason why the row is invalid."""
    try:
        return {column: value.as_py() for column, value in row.items()}
    except UnicodeDecodeError:
        return "it is not UTF-8 text"


_FORMATS = {".csv": DelimitedText, ".tsv": DelimitedText, ".txt": DelimitedText,
            ".jsonl": JSONLines, ".json": JSONLines, ".parquet": ParquetFile}  # fmt: skip


def read_file(file: str, key: str, quoting: bool | None = None, skip_bad: bool = False) -> RowSource:
    """Open a local file of rows.

    Args:
        file: path of the file, without wildcards; its extension determines the format.
        key: option that named the file, for error messages.
        quoting: whether double quotes enclose values in delimited text; defaults to True except for MRPC files.
        skip_bad: whether to skip invalid rows.

    Returns:
        The source of the file's rows.

    Raises:
        InputError: the file is missing, empty or of unknown format, or its header or schema is invalid.
    """
    path = require_file(file, key)
    source_class = _FORMATS.get(path.suffix.lower())
    if source_class is None:
        raise InputError(f"{key} must be a file with one of the extensions {', '.join(_FORMATS)}, got {file}")
    try:
        with path.open("rb") as contents:
            if not contents.read(1):
                raise InputError(f"{key}: {file} is empty")
        if source_class is DelimitedText:
            return DelimitedText(path, key, skip_bad, quoting)
        return source_class(path, key, skip_bad)
    except OSError as error:
        raise InputError(f"{key}: {file} cannot be read: {error.strerror}") from None


def read_hub(hub_id: str, split: str, key: str, config: str | None = None) -> RowSource:
    """Open a split of a hub dataset.

    Args:
        hub_id: id of the dataset.
        split: name of the split on the hub.
        key: option that named the dataset, for error messages.
        config: configuration of the dataset, if it has several.

    Returns:
        The source of the split's rows.

    Raises:
        InputError: the dataset cannot be loaded.
        RunError: the disk is full.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        with reraise_disk_full(Path(datasets.config.HF_DATASETS_CACHE)):
            dataset = datasets.load_dataset(hub_id, config, split=split)
            return HubSplit(dataset, f"{hub_id} ({split})", key)
    except RunError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{key}: split {split!r} of the hub dataset {hub_id!r} cannot be loaded ({reason}); without a network, "
            "give files: --data.train_file, --data.val_file, --data.test_file"
        ) from error


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
    if missing := [column for column in (*texts, label) if column is not None and column not in columns]:
        more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
        names = ", ".join(map(shorten, columns[:20])) or "none"
        raise InputError(
            f"{source.name} has no column {shorten(missing[0])}; it has {names}{more}; select columns with {keys}"
        )
    for column in (*texts, label):
        if column is not None and (arrow_type := source.types.get(column)) is not None:
            is_label = column not in texts
            if not _is_text_type(arrow_type, allow_numbers=is_label):
                raise InputError(
                    f"{source.name}: the column {shorten(column)} must be text{' or numbers' if is_label else ''}, "
                    f"got the type {str(arrow_type)[:200]}; select columns with {keys}"
                )


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
        raise InputError(f"{source}, row {number}: {column!r} must be a non-empty string, got {shorten(text)}")
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
    raise InputError(
        f"{source}, row {number}: the label in {column!r} must be "
        f"{'' if has_numeric_names else f'0 to {len(names) - 1} or '}one of {', '.join(names)}, got {shorten(value)}"
    )


@lru_cache(maxsize=1024)
def _parse_decimal(text: str) -> Decimal | None:
    """Return the value of a plain decimal number, or None for any other text."""
    return Decimal(text) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None
