"""Output of commands: files and standard output, as CSV, TSV or JSON lines."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from gpt2_pl.errors import printable
from gpt2_pl.filesystem import atomic_write

DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": None}  # by the extension of the output file; None for JSON lines
STANDARD_OUTPUT = Path("-")


class _Terminal:
    """Text stream that escapes control characters, which texts from files could send to a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        return self.stream.write(printable(text.replace("\r\n", "\n"), keep="\n\t"))


@contextmanager
def open_output(out: Path) -> Iterator[Any]:
    """Open an output file, which appears when it is complete, or standard output for ``-``.

    Args:
        out: the file.

    Yields:
        The text stream.
    """
    if out == STANDARD_OUTPUT:
        yield _Terminal(sys.stdout) if sys.stdout.isatty() else sys.stdout
    else:
        with atomic_write(out) as file:
            yield file


@contextmanager
def row_writer(
    out: Path, names: Sequence[str], as_json: bool = False
) -> Iterator[Callable[[Sequence[object]], object]]:
    """Open an output file and provide a function that writes the values of a row to it.

    Args:
        out: the file; its extension determines the format. ``-`` is standard output, in CSV.
        names: names of the columns.
        as_json: whether standard output has JSON lines.

    Yields:
        A function of the values in the order of the columns.
    """
    delimiter = (None if as_json else ",") if out == STANDARD_OUTPUT else DELIMITERS[out.suffix.lower()]
    with open_output(out) as file:
        if delimiter is None:
            yield lambda values: file.write(json_line(dict(zip(names, values, strict=True))))
        else:
            table = csv.writer(file, delimiter=delimiter, lineterminator="\n" if out == STANDARD_OUTPUT else "\r\n")
            table.writerow(names)
            yield table.writerow


def json_line(content: dict[str, Any]) -> str:
    """Return a JSON object on one line, with the line end; dates and decimal numbers are strings, as in CSV."""
    return json.dumps(content, ensure_ascii=False, default=str) + "\n"
