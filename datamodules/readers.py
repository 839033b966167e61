"""Readers of CSV, TSV, JSON lines and Parquet files and of hub datasets; rows are streamed in bounded memory."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gpt2_pl.datamodules.rows import BATCH_ROWS, DatasetRows, Row, RowSource
from gpt2_pl.errors import InputError, RunError, shorten
from gpt2_pl.filesystem import require_file, reraise_disk_full

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile as ParquetReader

_MRPC_COLUMN = "#1 String"
_DELIMITERS = ("\t", ",", ";")
_BYTE_ORDER_MARK = "\ufeff"
_MAX_VALUE_CHARACTERS = 1 << 26  # limit of a value in delimited text, exceeded after an unclosed quote


class FileRows(RowSource):
    """Source of the rows of a local file, which must not change while it is read.

    Args:
        file: path of the file, without wildcards.
        key: option that named the file, for error messages.
        quoting: whether double quotes enclose values in delimited text.

    Raises:
        InputError: the file is missing or cannot be read.
    """

    def __init__(self, file: str, key: str, quoting: bool | None = None) -> None:
        self.path, self.quoting = require_file(file, key), quoting
        super().__init__(str(self.path), key)
        self._status = self._find_status()
        if self.path.stat().st_size == 0:
            raise self.error(" is empty")

    def _find_status(self) -> tuple[int, int, int]:
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]  # computed on first use
        """SHA-256 of the contents and of the way in which they are read, independent of the file's name and time."""
        with self.path.open("rb") as file:
            contents = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(json.dumps([contents, type(self).__name__, self.quoting]).encode()).hexdigest()

    def read(self, columns: Sequence[str], skip_bad: bool = False) -> Iterator[tuple[int, Row | str]]:
        """Read the given columns of all rows; see :meth:`RowSource.read`.

        Raises:
            InputError: as in the base class; also if the file has changed since this object was created.
        """
        yield from super().read(columns, skip_bad)
        if self._find_status() != self._status:
            raise self.error(" changed while it was being read; wait until it is complete")

    def _require_unique(self, names: Sequence[str], where: str = "") -> None:
        """Check that all columns have different names."""
        if (duplicate := _find_duplicate(names)) is not None:
            raise self.error(f" must have different column names, got {shorten(duplicate)} twice{where}")


class DelimitedText(FileRows):
    """Source of the rows of a CSV or TSV file: UTF-8 text with a header.

    The delimiter (tab, comma or semicolon) is the one that splits the header into the most columns. Values are not
    converted. An empty line is not a row. A line of blanks is not a row if there are several columns, and an invalid
    row if there is one. A column without a name is called ``Unnamed: i`` after its index i.

    Args:
        file: path of the file, without wildcards.
        key: option that named the file, for error messages.
        quoting: whether double quotes enclose values; defaults to True except for MRPC files.

    Raises:
        InputError: the file is missing or cannot be read, or its header is invalid.
    """

    def __init__(self, file: str, key: str, quoting: bool | None = None) -> None:
        super().__init__(file, key, quoting is not False)
        csv.field_size_limit(_MAX_VALUE_CHARACTERS)
        header, self.delimiter = self._read_header()
        if quoting is None:
            self.quoting = _MRPC_COLUMN not in header
        self.columns = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
        self._require_unique(self.columns, " in the header")

    @contextmanager
    def _records(self, delimiter: str) -> Iterator[Iterator[list[str]]]:
        """Open the file as cells of each record, the header included."""
        quoting: Any = csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE
        with self.path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = chain([next(file, "").lstrip(_BYTE_ORDER_MARK)], file)
            yield csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)

    def _read_header(self) -> tuple[list[str], str]:
        """Return the names in the header and the delimiter that separates most names."""
        candidates: list[tuple[list[str], str]] = []
        for delimiter in _DELIMITERS:
            with self._records(delimiter) as records:
                try:
                    candidates.append((next(records), delimiter))
                except csv.Error:
                    continue  # the delimiter occurs within quotes
        if not candidates:
            raise self.error(": a double quote in the header is not closed")
        names, delimiter = max(candidates, key=lambda pair: len(pair[0]))
        if not _is_utf8(names):
            raise self.error(": the header is not UTF-8 text; save the file as UTF-8")
        if any("\0" in name for name in names):
            raise self.error(": the header contains NUL, as in UTF-16; save the file as UTF-8")
        if not "".join(names).strip():
            raise self.error(": the first line is blank; it must contain the column names")
        return names, delimiter

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        indices = [(column, self.columns.index(column)) for column in columns]
        n_columns, n_rows = len(self.columns), 0
        with self._records(self.delimiter) as records:
            next(records)  # the header
            try:
                for cells in records:
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
            except csv.Error as error:  # the end of the row is unknown, so that it cannot be skipped
                option = "data.quoting" if self.key.startswith("data.") else "quoting"
                advice = f"if quotes are part of the text, set {option} to false"
                raise self.error(f", row {n_rows + 1}: a double quote is not closed ({error}); {advice}") from None


def _is_utf8(cells: list[str]) -> bool:
    """Return whether cells were UTF-8: ``surrogateescape`` decodes invalid bytes as lone surrogates."""
    text = "".join(cells)
    return text.isascii() or not re.search("[\udc80-\udcff]", text)


def _find_duplicate(names: Iterable[str]) -> str | None:
    """Return the first name that occurs more than once, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


class JSONLines(FileRows):
    """Source of the rows of a JSON lines file or of a JSON array; every row is an object with unique names."""

    @cached_property
    def columns(self) -> Sequence[str]:  # type: ignore[override]  # read on first use
        """Names that occur in any row; the complete file is read to find them."""
        names: dict[str, None] = {}
        for _, row in self.read((), skip_bad=True):
            if isinstance(row, dict):
                names.update(dict.fromkeys(row))
        return list(names)

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        """Yield the given columns, or all columns if ``columns`` is empty."""
        with self.path.open("rb") as file:
            for value in self._values(file):
                if isinstance(value, dict):
                    yield {column: value.get(column) for column in columns} if columns else value
                else:
                    yield str(value) if isinstance(value, ValueError) else "it is not a JSON object"

    def _values(self, file: BinaryIO) -> Iterable[Any]:
        """Return the value of each row, or a ValueError with the reason why it is invalid."""
        first = next((line for line in file if line.strip()), b"")
        if not first.lstrip(_BYTE_ORDER_MARK.encode()).lstrip().startswith(b"["):
            return (_parse_json(line) for line in chain([first], file) if line.strip())
        values = _parse_json(first + file.read())
        if isinstance(values, ValueError):
            raise self.error(f" cannot be read as a JSON array: {values}")
        return values


def _parse_json(text: bytes) -> Any:
    """Return a JSON value, or a ValueError with a reason of one line if the text is invalid."""
    try:
        decoded = text.decode().lstrip(_BYTE_ORDER_MARK)
        value = json.loads(decoded, object_pairs_hook=_reject_duplicate_keys)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # lone surrogates raise UnicodeError
        return value
    except UnicodeError:
        return ValueError("it is not UTF-8 text")
    except RecursionError:
        return ValueError("it is nested too deeply")
    except ValueError as error:
        return error


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"it has the key {shorten(_find_duplicate(name for name, _ in pairs))} twice")
    return row


class ParquetFile(FileRows):
    """Source of the rows of a Parquet file.

    Args:
        file: path of the file, without wildcards.
        key: option that named the file, for error messages.
        quoting: not used.

    Raises:
        InputError: the file is missing or cannot be read, or has a column twice.
    """

    def __init__(self, file: str, key: str, quoting: bool | None = None) -> None:
        super().__init__(file, key)
        with self._open() as reader:
            self.columns = reader.schema_arrow.names
        self._require_unique(self.columns)

    @contextmanager
    def _open(self) -> Iterator[ParquetReader]:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile as ParquetReader

        try:
            with self.path.open("rb") as file:  # pyarrow could interpret a path as a URI
                yield ParquetReader(file)
        except (pa.ArrowException, OSError) as error:
            raise self.error(f" cannot be read as parquet: {(str(error).splitlines() or [''])[0]}") from error

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        with self._open() as reader:
            for batch in reader.iter_batches(BATCH_ROWS, columns=list(columns)):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError:
                    rows = [_decode_row(batch.slice(i, 1)) for i in range(len(batch))]
                yield from rows


def _decode_row(batch: pa.RecordBatch) -> Row | str:
    """Convert a batch of one row to Python, or return the reason why the row is invalid."""
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return "it is not UTF-8 text"


_FORMATS: dict[str, type[DelimitedText | JSONLines | ParquetFile]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), DelimitedText),
    **dict.fromkeys((".jsonl", ".json"), JSONLines),
    ".parquet": ParquetFile,
}


def read_file(file: str, key: str, quoting: bool | None = None) -> RowSource:
    """Open a local file of rows.

    Args:
        file: path of the file, without wildcards; its extension determines the format.
        key: option that named the file, for error messages.
        quoting: whether double quotes enclose values in delimited text; defaults to True except for MRPC files.

    Returns:
        The source of the file's rows.

    Raises:
        InputError: the file is missing or of unknown format, or its header or schema is invalid.
    """
    source_class = _FORMATS.get(Path(file).suffix.lower())
    if source_class is None:
        raise InputError(key=key, value=file, expected=f"a file with one of the extensions {', '.join(_FORMATS)}")
    return source_class(file, key, quoting)


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
            return DatasetRows(dataset, f"{hub_id} ({split})", key)
    except RunError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{key}: split {split!r} of the hub dataset {hub_id!r} cannot be loaded ({reason}); without a network, "
            "give files: --data.train_file, --data.val_file, --data.test_file",
            key=key,
        ) from error
