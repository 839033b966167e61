"""Output to a terminal: lines that fit it, and the progress of a command."""

from __future__ import annotations

import shutil
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Self, TextIO, TypeVar

T = TypeVar("T")
_BAR_WIDTH = 20  # characters
_DELAY = 2.0  # seconds until the bar of a command appears


def wrapped(text: str, stream: TextIO | None, end: str = "") -> str:
    """Return a line, broken between words to fit the terminal of a stream; unchanged for a stream without a terminal.

    Args:
        text: a line.
        stream: the stream that it is printed to.
        end: text at the end of every line but the last.
    """
    if stream is None or not stream.isatty() or len(text) < (width := shutil.get_terminal_size().columns):
        return text
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    lines = textwrap.wrap(text, width - 1 - len(end), subsequent_indent="  ", **options)
    return f"{end}\n".join(lines)


class Progress:
    """Progress bar of a command on standard error, with the elapsed and an estimate of the remaining time.

    It appears only on a terminal, and after two seconds, so that a short command has none. It is removed at the end.

    Args:
        description: what is done.
        total: number of units.
    """

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total = description, total
        self._bar: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        """Start to measure the time."""
        if sys.stderr is None or not sys.stderr.isatty():
            return self
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        text, left = TextColumn("{task.description}", markup=False), TextColumn("left")
        columns = (text, BarColumn(_BAR_WIDTH), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), left)
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._bar.add_task(self.description, total=self.total)
        self._timer = threading.Timer(_DELAY, self._bar.start)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            if self._bar.live.is_started:
                self._bar.stop()

    def advance(self, n: int = 1, description: str | None = None) -> None:
        """Add a number of finished units, and describe the next ones."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=n, description=description)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield items with a progress bar; see :class:`Progress`.

    Args:
        items: the items.
        description: what is done.
        total: number of items.
    """
    with Progress(description, total) as progress:
        for item in items:
            yield item
            progress.advance()
