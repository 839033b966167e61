"""Plots of confusion matrices.

The functions import matplotlib when they are called, because the import takes a third of a second.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TICKS = 30  # class names on an axis
MAX_CELLS = 20  # largest number of classes for which counts are written into the cells
MIN_FONT = 5.0  # points
LONGEST_LABEL = 20  # characters of a class name
_POINTS_PER_INCH = 72.0


def plain(text: object, limit: int = 60) -> str:
    """Return untrusted text in the form that matplotlib draws literally: escaped, on one line, without formulas.

    Args:
        text: the text; other objects are converted by ``str``.
        limit: the largest number of characters; longer text ends with an ellipsis.
    """
    line = printable(" ".join(str(text).split()))
    line = line if len(line) <= limit else f"{line[: limit - 1]}\u2026"
    return line.replace("$", r"\$")


@contextmanager
def drawing() -> Iterator[None]:
    """Draw figures independently of the user's matplotlib settings, and suppress warnings about missing glyphs."""
    import matplotlib

    logger = logging.getLogger("matplotlib")
    level = logger.level
    settings: Any = {"text.usetex": False, "text.parse_math": True, "svg.hashsalt": "gpt2_pl"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def confusion_figure(counts: NDArray[Any], names: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix whose cells are coloured by their share of the true class.

    The number of drawn elements is bounded for any number of classes K: with more than ``MAX_CELLS`` classes no counts
    are written into the cells, and with more than ``MAX_TICKS`` only every n-th class is named.

    Args:
        counts: (K, K), number of rows by true class and predicted class.
        names: K class names.
        title: title of the figure.
    """
    from matplotlib.figure import Figure

    K = len(counts)
    figure = Figure(figsize=(7.0, 6.0), dpi=100)
    axes = figure.add_axes((0.25, 0.3, 0.6, 0.63))  # Automatic margins would take longer than drawing.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    figure.colorbar(image, cax=figure.add_axes((0.88, 0.3, 0.03, 0.63)), label="share of the true class")
    step = -(-K // MAX_TICKS)
    ticks = list(range(0, K, step))
    labels = [plain(names[i], LONGEST_LABEL) for i in ticks]
    width = 0.6 * 7.0 * _POINTS_PER_INCH / K  # of a cell, in points
    font = max(MIN_FONT, min(9.0, 0.8 * width * step))
    is_vertical = max(map(len, labels)) * 0.6 * font > width * step
    axes.set_xticks(ticks, labels, rotation=90 if is_vertical else 0, fontsize=font)
    axes.set_yticks(ticks, labels, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true", title=plain(title))
    digits = len(str(int(counts.max(initial=0))))
    font = min(11.0, width / (0.65 * digits))
    if font >= MIN_FONT and K <= MAX_CELLS:
        for (i, j), count in np.ndenumerate(counts):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(count)), ha="center", va="center", color=color, fontsize=font)
    return figure


def confusion_image(counts: NDArray[Any], names: Sequence[str], title: str) -> NDArray[np.uint8]:
    """Return a confusion matrix as pixels (600, 700, 3), from 0 to 255; see :func:`confusion_figure`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with drawing():
        canvas = FigureCanvasAgg(confusion_figure(counts, names, title))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(image: NDArray[Any]) -> bytes:
    """Return an image (H, W, 3), from 0 to 255, in PNG format."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, image, format="png")
    return file.getvalue()
