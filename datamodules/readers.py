"""Rows of CSV, TSV, JSON lines and Parquet files and of hub datasets, read one after the other in bounded memory."""

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
_LONGEST_VALUE = 1 << 26  # characters of a value in delimited text; a quote that is not closed makes longer ones
_BATCH = 1000  # rows that are decoded at a time

Row = dict[str, Any]


class RowSource(ABC):
    """Rows with named columns, which can be read any number of times.

    Args:
        name: the file or dataset, for messages.
        key: the option that named it, for messages.
        skip_bad: whether rows that cannot be read are left out instead of being an error.
    """

    def __init__(self, name: str, key: str, skip_bad: bool = False) -> None:
        self.name, self.key, self.skip_bad = name, key, skip_bad

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """The names of the columns."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of everything that the rows depend on."""

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """The type of each column whose values all have one."""
        return {}

    @abstractmethod
    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        """Yield some columns of each row, or why the row cannot be read."""

    def read(self, columns: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
        """Read some columns of all rows.

        Yields:
            The number of each row, from 1, and its values by column; where rows that cannot be read are left out, the
            reason in place of the values.

        Raises:
            InputError: a row or the whole source cannot be read, or there are no rows.
        """
        number, usable = 0, False
        for number, row in enumerate(self._rows(columns), start=1):
            if isinstance(row, str):
                row = f"row {number} cannot be read: {row}"
                if not self.skip_bad:
                    raise InputError(f"{self.key}: {self.name}, {row}")
            else:
                usable = True
            yield number, row
        if not usable:
            raise InputError(f"{self.key}: {self.name} has no rows{' that can be read' if number else ''}")


class Rows(RowSource):
    """Rows in memory.

    Args:
        rows: each with the same columns.
        name: for messages.
    """

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        super().__init__(name, "data")
        self.rows = rows

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the first row."""
        return list(self.rows[0])

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the rows."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        return ({column: row[column] for column in columns} for row in self.rows)


class HubSplit(RowSource):
    """A split of a hub dataset.

    Args:
        dataset: the split.
        name: for messages.
        key: the option that named it.
    """

    def __init__(self, dataset: Dataset, name: str, key: str) -> None:
        super().__init__(name, key)
        self.dataset = dataset

    @property
    def columns(self) -> Sequence[str]:
        """The names of the dataset's columns."""
        return self.dataset.column_names

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """The types of the dataset's columns."""
        return dict(zip(self.columns, self.dataset.features.arrow_schema.types, strict=True))

    @property
    def fingerprint(self) -> str:
        """The fingerprint that ``datasets`` gives."""
        return self.dataset._fingerprint

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        for batch in self.dataset.select_columns(list(columns)).iter(_BATCH):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


class _File(RowSource):
    """A local file; its contents decide its fingerprint, whatever its name and its time."""

    def __init__(self, path: Path, key: str, skip_bad: bool) -> None:
        super().__init__(str(path), key, skip_bad)
        self.path = path
        self._status = self._find_status()

    def _find_status(self) -> tuple[int, int, int]:
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _options(self) -> list[Any]:
        """What the rows depend on beside the file's contents, as JSON can express it."""
        return [type(self).__name__, self.skip_bad]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the contents and of how they are read."""
        with self.path.open("rb") as file:
            contents = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(json.dumps([contents, *self._options()]).encode()).hexdigest()

    def read(self, columns: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
        """Read some columns of all rows, as every source does.

        Raises:
            InputError: as every source; also where the file was written to since it was opened.
        """
        yield from super().read(columns)
        if self._find_status() != self._status:
            raise InputError(f"{self.key}: {self.name} changed while it was being read; wait until it is complete")

    def _error(self, reason: str) -> InputError:
        return InputError(f"{self.key}: {self.name}{reason}")


class DelimitedText(_File):
    """CSV or TSV: UTF-8 text with a header, separated by the delimiter that gives the most columns.

    Values are the text they are. An empty line is not a row. A line of blanks is not a row where there are several
    columns, and a bad one where there is one column. Columns without a name are ``Unnamed: 0``, ``Unnamed: 1``, ...,
    by their place.

    Args:
        path: the file.
        key: the option that named it.
        skip_bad: leave out rows that are not UTF-8 or have more or fewer values than the header.
        quoting: whether double quotes enclose values; by default in every file but MRPC's.
    """

    def __init__(self, path: Path, key: str, skip_bad: bool, quoting: bool | None) -> None:
        super().__init__(path, key, skip_bad)
        csv.field_size_limit(_LONGEST_VALUE)
        header, self.delimiter = self._read_header(quoting)
        self.quoting = _MRPC_COLUMN not in header if quoting is None else quoting
        self._columns = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
        if twice := _repeated(self._columns):
            raise self._error(f" names a column twice in its header: {shorten(twice)}")

    def _options(self) -> list[Any]:
        return [*super()._options(), self.quoting]

    @property
    def columns(self) -> Sequence[str]:
        """The names in the header."""
        return self._columns

    @contextmanager
    def _lines(self) -> Iterator[Iterable[str]]:
        with self.path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield chain([next(file, "").lstrip(_BYTE_ORDER_MARK)], file)

    def _records(self, lines: Iterable[str], delimiter: str, quoting: bool) -> Iterator[list[str]]:
        quotes: Any = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
        return csv.reader(lines, delimiter=delimiter, quoting=quotes, strict=True)

    def _read_header(self, quoting: bool | None) -> tuple[list[str], str]:
        """The names in the header, and which delimiter gives the most of them."""
        found: list[tuple[list[str], str]] = []
        for delimiter in _DELIMITERS:
            with self._lines() as lines:
                try:
                    found.append((next(self._records(lines, delimiter, quoting is not False)), delimiter))
                except csv.Error:
                    continue  # a delimiter within quotes
        if not found:
            raise self._error(": a double quote opens a name in the header and does not close it")
        names, delimiter = max(found, key=lambda pair: len(pair[0]))
        if not _is_text(names):
            raise self._error(": the header is not UTF-8 text; save the file as UTF-8")
        if any("\0" in name for name in names):
            raise self._error(": the header holds NUL; is it UTF-16? Save the file as UTF-8")
        if not "".join(names).strip():
            raise self._error(": its first line is blank; it must name the columns")
        return names, delimiter

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        places = [(column, self._columns.index(column)) for column in columns]
        n_columns, n_rows = len(self._columns), 0
        with self._lines() as lines:
            records = self._records(lines, self.delimiter, self.quoting)
            next(records)  # the header
            while True:
                try:
                    cells = next(records)
                except StopIteration:
                    return
                except csv.Error as error:  # where the row ends is not known, so it cannot be left out
                    option = "data.quoting" if self.key.startswith("data.") else "quoting"
                    raise self._error(
                        f", row {n_rows + 1}: a double quote opens a value and does not close it ({error}); "
                        f"where quotes are part of the text, give {option} false"
                    ) from None
                blank = len(cells) == 1 and cells[0] != "" and not cells[0].strip(" \t")
                if not cells or (blank and n_columns > 1):
                    continue
                n_rows += 1
                if not _is_text(cells):
                    yield "it is not UTF-8 text"
                elif blank:
                    yield "it is blank"
                elif len(cells) != n_columns:
                    counts = f"it has {len(cells)} values, and the header {n_columns}"
                    yield f"{counts} (delimiter {self.delimiter!r})"
                else:
                    yield {column: cells[place] for column, place in places}


def _is_text(cells: list[str]) -> bool:
    """Whether cells hold no bytes that are not UTF-8, which ``surrogateescape`` makes halves of surrogate pairs."""
    text = "".join(cells)
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


class JSONLines(_File):
    """JSON lines, each an object, or one JSON array of objects. Every value is what Python's ``json`` makes of it.

    Args:
        path: the file.
        key: the option that named it.
        skip_bad: leave out rows that are not UTF-8 or not an object whose names are unique.
    """

    @cached_property
    def columns(self) -> Sequence[str]:
        """All names that occur, for which the whole file is read."""
        found: dict[str, None] = {}
        for _, row in super().read(()):
            if isinstance(row, dict):
                found.update(dict.fromkeys(row))
        return list(found)

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        """Yield some columns, or all where none are named."""
        for row in self._objects():
            if isinstance(row, str) or not columns:
                yield row
            else:
                yield {column: row.get(column) for column in columns}

    def _objects(self) -> Iterator[Row | str]:
        """Yield each row, or why it is not an object with unique names."""
        with self.path.open("rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
            if first.lstrip(_BYTE_ORDER_MARK.encode()).lstrip().startswith(b"["):
                try:
                    values = _parse(first + lines.read())
                except ValueError as error:
                    raise self._error(f" cannot be read as a JSON array: {error}") from None
                yield from (value if isinstance(value, dict) else "it is no JSON object" for value in values)
                return
            for line in chain([first], lines):
                if not line.strip():
                    continue
                try:
                    value = _parse(line)
                    yield value if isinstance(value, dict) else "it is no JSON object"
                except ValueError as error:
                    yield str(error)


def _parse(text: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is none, with one line that says why.
    """
    try:
        whole = text.decode().lstrip(_BYTE_ORDER_MARK)
        value = json.loads(whole, object_pairs_hook=_reject_duplicate_keys, parse_int=_parse_int)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are not text
    except UnicodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"it has {shorten(_repeated(name for name, _ in pairs))} twice")
    return found


def _parse_int(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**63:
        raise ValueError(f"it has a number beyond 64 bits, of {len(digits)} digits: {digits[:30]}")
    return value


class ParquetFile(_File):
    """A Parquet file.

    Args:
        path: the file.
        key: the option that named it.
        skip_bad: leave out rows whose text is not UTF-8.
    """

    def __init__(self, path: Path, key: str, skip_bad: bool) -> None:
        super().__init__(path, key, skip_bad)
        with self._open() as file:
            self._types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            if (twice := _repeated(file.schema_arrow.names)) is not None:
                raise self._error(f" names a column twice: {shorten(twice)}")
            if not file.metadata.num_rows:
                raise self._error(" has no rows")

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns."""
        return list(self._types)

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """The types of the columns."""
        return self._types

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile as Reader

        try:
            with self.path.open("rb") as file:  # a name would be read as an address
                yield Reader(file)
        except (pa.ArrowException, OSError) as error:
            raise self._error(f" cannot be read as parquet: {(str(error).splitlines() or [''])[0]}") from error

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        with self._open() as file:
            for batch in file.iter_batches(_BATCH, columns=list(columns)):
                found = [batch.column(batch.schema.names.index(column)) for column in columns]
                try:
                    rows = zip(*(values.to_pylist() for values in found), strict=True)
                    yield from (dict(zip(columns, row, strict=True)) for row in rows)
                except UnicodeDecodeError:
                    yield from (_decoded(dict(zip(columns, row, strict=True))) for row in zip(*found, strict=True))


def _decoded(row: Mapping[str, pa.Scalar]) -> Row | str:
    try:
        return {column: value.as_py() for column, value in row.items()}
    except UnicodeDecodeError:
        return "it is not UTF-8 text"


_FORMATS = {".csv": DelimitedText, ".tsv": DelimitedText, ".txt": DelimitedText,
            ".jsonl": JSONLines, ".json": JSONLines, ".parquet": ParquetFile}  # fmt: skip


def read_file(file: str, key: str, quoting: bool | None = None, skip_bad: bool = False) -> RowSource:
    """Open a local file of rows, by its name: no character of it stands for others.

    Args:
        file: its path; the ending says the format.
        key: the option that held it, for error messages.
        quoting: whether double quotes in delimited text enclose values; by default in every file but MRPC's.
        skip_bad: leave rows out that cannot be read.

    Raises:
        InputError: no such file, another format, no contents, or a header that cannot be read.
    """
    path = require_file(file, key)
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{key}: {file} does not end in one of {', '.join(_FORMATS)}")
    try:
        with path.open("rb") as contents:
            if not contents.read(1):
                raise InputError(f"{key}: {file} is empty")
        return kind(path, key, skip_bad, quoting) if kind is DelimitedText else kind(path, key, skip_bad)
    except OSError as error:
        raise InputError(f"{key}: {file} cannot be read: {error.strerror}") from None


def read_hub(hub_id: str, split: str, key: str, config: str | None = None) -> RowSource:
    """Open one split of a hub dataset, in one of its configurations where it has several.

    Raises:
        InputError: the dataset cannot be had.
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
            f"{key}: the hub's dataset {hub_id!r}, split {split!r}, cannot be had ({reason}); without a network, "
            "give files: --data.train_file, --data.val_file, --data.test_file"
        ) from error


def require_columns(
    source: RowSource,
    texts: Sequence[str],
    label: str | None = None,
    keys: str = "data.columns and data.label_column",
) -> None:
    """Check that a source has columns, and that each is of a type that can hold text or labels.

    Args:
        source: the rows.
        texts: columns of texts.
        label: column of labels.
        keys: the options that chose them, for error messages.

    Raises:
        InputError: naming the source and its columns, or the column and its type.
    """
    columns = list(source.columns)
    if missing := [column for column in (*texts, label) if column is not None and column not in columns]:
        more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
        names = ", ".join(map(shorten, columns[:20])) or "none"
        raise InputError(
            f"{source.name} has no column {shorten(missing[0])}; it has {names}{more} ({keys} say which to read)"
        )
    for column in (*texts, label):
        if column is not None and (kind := source.types.get(column)) is not None:
            wanted = "text" if column in texts else "text or numbers"
            if not _can_hold(kind, numbers=column not in texts):
                raise InputError(
                    f"{source.name}: the column {shorten(column)} is of type {str(kind)[:200]}; it must hold {wanted} "
                    f"({keys} say which to read)"
                )


def _can_hold(kind: pa.DataType, numbers: bool) -> bool:
    """Whether values of an Arrow type are text, or also numbers; those that are written once in a dictionary too."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    text = (types.is_string, types.is_large_string, types.is_string_view)
    number = (types.is_integer, types.is_floating, types.is_boolean)
    return any(is_kind(kind) for is_kind in (*text, *(number if numbers else ())))


def parse_text(row: Mapping[str, Any], column: str, source: str, number: int) -> str:
    """The text in a column of row ``number`` (from 1, the header not counted).

    Raises:
        InputError: it is missing, not text, or blank.
    """
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{source}, row {number}: {column!r} is {shorten(text)}; it must hold text")
    return text


def parse_label(row: Mapping[str, Any], column: str, names: Sequence[str], source: str, number: int) -> int:
    """The class index in a column of row ``number``, given as one of the class names or as an index.

    Where a name is a number, a number is a name, of equal value (``4.0`` is ``4``), and never an index.

    Raises:
        InputError: neither of them.
    """
    value = row[column]
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if text in names:
        return names.index(text)
    numbers = [_decimal(name) for name in names]
    numbered = any(number is not None for number in numbers)
    if (given := _decimal(text)) is not None:
        among: Sequence[Any] = numbers if numbered else range(len(names))
        if among.count(given) == 1 and (numbered or text[0] != "-"):
            return among.index(given)
    raise InputError(
        f"{source}, row {number}: the label in {column!r} is {shorten(value)}; "
        f"it must be {'' if numbered else f'0 to {len(names) - 1} or '}one of {', '.join(names)}"
    )


@lru_cache(maxsize=1024)
def _decimal(text: str) -> Decimal | None:
    """The number that plain digits say; None for any other text."""
    return Decimal(text) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None
