"""An inspection as a page that needs no other file, and as CSV tables.

Texts of runs are untrusted: the page shows them as text, and no spreadsheet evaluates them.
"""

from __future__ import annotations

import base64
import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from gpt2_pl.errors import printable
from gpt2_pl.filesystem import atomic_write

MAX_SHOWN = 600
"""Characters of one text on the page."""
_MAX_CELL = 20_000  # characters of one text in a table; spreadsheets accept 32,767
_FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are of full width


class Column(NamedTuple):
    """Column of a table.

    Args:
        heading: its heading.
        kind: ``number``, ``name`` (short text), or ``text``.
    """

    heading: str
    kind: Literal["number", "name", "text"] = "number"


@dataclass(frozen=True)
class Table:
    """Table of texts, as the page shows it.

    Args:
        columns: the columns.
        rows: the cells of each row.
        caption: the caption.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    caption: str = ""


class Pair(NamedTuple):
    """Generated text beside the true text.

    Args:
        heading: heading of both.
        scores: their scores.
        generated, true: lines of the texts.
        given: number of first lines that were the prompt.
        second: lines of the text of a second run; empty without one.
    """

    heading: str
    scores: str
    generated: Sequence[str]
    true: Sequence[str]
    given: int
    second: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """Section of the page.

    Args:
        heading: its heading.
        paragraphs: explanations.
        findings: items of a list.
        png: an image in PNG format.
        image_text: description of the image.
        tables: tables.
        pairs: texts side by side.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    findings: Sequence[str] = ()
    png: bytes | None = None
    image_text: str = ""
    tables: Sequence[Table] = ()
    pairs: Sequence[Pair] = ()

    @property
    def image(self) -> str | None:
        """The image in base64, or None."""
        return None if self.png is None else base64.b64encode(self.png).decode()


@dataclass
class Inspection:
    """Content of an inspection.

    Args:
        title: title of the page.
        facts: what was inspected, and its scores.
        sections: sections of the page.
        tables: rows of the CSV tables by file name, the headings first; numbers are not converted to text.
        summary: lines for the terminal.
    """

    title: str
    facts: Table
    sections: list[Section] = field(default_factory=list)
    tables: dict[str, list[Sequence[object]]] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)


def one_line(text: object, limit: int = MAX_SHOWN) -> str:
    """Return a text as one line of printable characters; longer text ends with an ellipsis."""
    line = " ".join(str(text).split())
    return printable(line if len(line) <= limit else f"{line[:limit].rstrip()} ...")


def spreadsheet_cell(value: object) -> object:
    """Return a cell of a CSV table: numbers as they are, texts escaped so that no spreadsheet evaluates them."""
    if isinstance(value, int | float):
        return value
    line = one_line(value, _MAX_CELL)
    return f"'{line}" if line.startswith(_FORMULA_STARTS) else line


def page(inspection: Inspection) -> str:
    """Return the page in HTML."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("gpt2_pl.experiments", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["line"] = lambda text: one_line(text).replace(" %", "\u00a0%")
    template = environment.get_template("inspection.html.jinja")
    return template.render(title=inspection.title, facts=inspection.facts, sections=inspection.sections)


def write(inspection: Inspection, folder: Path) -> list[str]:
    """Write ``index.html`` and the CSV tables to a folder.

    Returns:
        The names of the files.
    """
    for name, rows in inspection.tables.items():
        with atomic_write(folder / name) as file:
            csv.writer(file).writerows([spreadsheet_cell(value) for value in row] for row in rows)
    with atomic_write(folder / "index.html") as file:
        file.write(page(inspection))
    return ["index.html", *sorted(inspection.tables)]
