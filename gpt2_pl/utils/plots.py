"""Pictures. Import matplotlib only through this module's functions: it takes a third of a second."""

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

MAX_TICKS = 30  # class names along an axis
MAX_CELLS = 20  # classes up to which counts are written into cells
MIN_FONT = 5.0  # points
LONGEST_LABEL = 20  # characters of a class name
_POINTS = 72.0  # an inch


def plain(text: object, limit: int = 60) -> str:
    """A text of others as matplotlib draws it literally: on one line, no formula, of at most ``limit`` characters."""
    line = printable(" ".join(str(text).split()))
    line = line if len(line) <= limit else f"{line[: limit - 1]}\u2026"
    return line.replace("$", r"\$")


@contextmanager
def drawing() -> Iterator[None]:
    """Within, figures are drawn the same whatever the user's settings, and characters that no font has in silence."""
    import matplotlib

    logger = logging.getLogger("matplotlib")
    level = logger.level
    with matplotlib.rc_context({"text.usetex": False, "text.parse_math": True}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def confusion_figure(counts: NDArray[Any], names: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix, each row coloured by the shares of its predictions.

    Cost and size do not depend on the number of classes: of more than ``MAX_CELLS`` counts are not written into the
    cells, and of more than ``MAX_TICKS`` some names are left out.

    Args:
        counts: (K, K) of rows by true class and predicted class.
        names: K class names.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    K = len(counts)
    figure = Figure(figsize=(7.0, 6.0), dpi=100)
    axes = figure.add_axes((0.25, 0.3, 0.6, 0.63))  # fixed: to find the best margins takes longer than to draw
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    figure.colorbar(image, cax=figure.add_axes((0.88, 0.3, 0.03, 0.63)), label="share of the true class")
    step = -(-K // MAX_TICKS)
    ticks = list(range(0, K, step))
    labels = [plain(names[i], LONGEST_LABEL) for i in ticks]
    width = 0.6 * 7.0 * _POINTS / K  # of a cell, in points
    font = max(MIN_FONT, min(9.0, 0.8 * width * step))
    upright = max(map(len, labels)) * 0.6 * font > width * step
    axes.set_xticks(ticks, labels, rotation=90 if upright else 0, fontsize=font)
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
    """A confusion matrix as pixels (600, 700, 3); see :func:`confusion_figure`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with drawing():
        canvas = FigureCanvasAgg(confusion_figure(counts, names, title))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(picture: NDArray[Any]) -> bytes:
    """A picture (H, W, 3), from 0 to 255, as a PNG file."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, picture, format="png")
    return file.getvalue()
