"""Rows of a file, of standard input or of the command line, with the texts that a model reads."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from gpt2_pl.datamodules.readers import FileRows, read_file
from gpt2_pl.datamodules.rows import Row, RowSource, parse_text, require_columns
from gpt2_pl.errors import InputError, require
from gpt2_pl.filesystem import reraise_disk_full

STANDARD_STREAM, STANDARD_INPUT = "-", "standard input"  # as an argument, and in error messages


class InputRow(NamedTuple):
    """A row without a label.

    Args:
        number: its number in the source, from 1.
        texts: its texts by template field.
        kept: values of the columns that are copied to the output.
    """

    number: int
    texts: dict[str, str]
    kept: tuple[object, ...]


class GivenTexts(RowSource):
    """Source of rows that are in memory, such as those of the command line.

    Args:
        rows: texts of each row by template field.
        name: name of the source, for error messages.
    """

    def __init__(self, rows: Sequence[Mapping[str, str]], name: str) -> None:
        super().__init__(name, name)
        self.given, self.columns = rows, list(rows[0])

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        for row in self.given:
            yield {column: row[column] for column in columns}


class TextLines(FileRows):
    """Source of the lines of a UTF-8 text file, each of them a row; blank lines are not rows.

    Args:
        file: path of the file.
        key: option that named the file, for error messages.
        column: name of the column of the lines.
    """

    def __init__(self, file: str, key: str, column: str) -> None:
        super().__init__(file, key)
        self.columns = [column]

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        with self.path.open("rb") as file:
            for line in file:
                try:
                    text = line.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
                except UnicodeDecodeError:
                    yield "it is not UTF-8 text"
                    continue
                if text.strip():
                    yield dict.fromkeys(columns, text)


@contextmanager
def open_input(file: str, quoting: bool | None = None, lines_of: str | None = None) -> Iterator[RowSource]:
    """Open a file of rows, or standard input for ``-``, which is copied to a temporary file.

    Standard input has the format of JSON lines if it begins with a brace or bracket, else that of CSV or TSV.

    Args:
        file: path of the file, or ``-``.
        quoting: whether double quotes enclose values in delimited text; defaults to True except for MRPC files.
        lines_of: name of the column if every line of the file is a text; None for a file with columns.

    Yields:
        The rows.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    if file != STANDARD_STREAM:
        yield TextLines(file, "input", lines_of) if lines_of is not None else read_file(file, "input", quoting)
        return
    with copied_input("input", ".csv" if lines_of is None else ".txt") as copy:
        source: RowSource
        source = TextLines(copy, "input", lines_of) if lines_of is not None else read_file(copy, "input", quoting)
        source.name = STANDARD_INPUT
        yield source


@contextmanager
def copied_input(key: str, extension: str, json_start: str = "{[") -> Iterator[str]:
    """Copy standard input to a temporary file, which can be read several times; error messages do not name the copy.

    Args:
        key: option that named standard input, for error messages.
        extension: extension of the file, if it does not have JSON lines.
        json_start: characters with which JSON lines begin.

    Yields:
        Path of the file.

    Raises:
        InputError: standard input is empty.
    """
    with TemporaryDirectory(prefix="gpt2_pl.") as folder:
        copy = Path(folder) / "input"
        with reraise_disk_full(copy), copy.open("wb") as target:
            shutil.copyfileobj(sys.stdin.buffer, target)
        with copy.open("rb") as copied:
            start = copied.read(1 << 16).decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
        require(bool(start), key, STANDARD_STREAM, "text on standard input, which is empty")
        copy = copy.rename(copy.with_suffix(".jsonl" if start[0] in json_start else extension))
        try:
            yield str(copy)
        except InputError as error:
            raise InputError(str(error).replace(str(copy), STANDARD_INPUT), key=error.key) from None


def select_columns(source: RowSource, columns: Mapping[str, Sequence[str]], keep: Sequence[str] = ()) -> dict[str, str]:
    """Return the column of each template field: the first one that exists of its possible names.

    Args:
        source: the rows.
        columns: possible names of the column of each template field.
        keep: further columns, which must exist.

    Raises:
        InputError: a column is missing.
    """
    existing = source.columns
    selected = {field: next((name for name in names if name in existing), names[0]) for field, names in columns.items()}
    require_columns(source, list(selected.values()), keys="data.columns in training")
    require_columns(source, keep, keys="--keep")
    return selected


def read_rows(
    source: RowSource, columns: Mapping[str, str], skip: bool, keep: Sequence[str] = ()
) -> Iterator[InputRow | None]:
    """Yield the rows of a source.

    Args:
        source: the rows.
        columns: column of each template field.
        skip: whether to yield None for an invalid row instead of raising an error.
        keep: columns whose values are kept.

    Raises:
        InputError: a row is invalid.
    """
    for number, row in source.read(list(dict.fromkeys([*columns.values(), *keep])), skip):
        valid: InputRow | None = None
        try:
            if not isinstance(row, str):
                texts = {key: parse_text(row, column, source.name, number) for key, column in columns.items()}
                valid = InputRow(number, texts, tuple(row[column] for column in keep))
        except InputError:
            if not skip:
                raise
        yield valid
