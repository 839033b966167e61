"""Display of predictions on a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gpt2_pl.errors import printable

if TYPE_CHECKING:
    from gpt2_pl.inference.input_rows import InputRow
    from gpt2_pl.inference.predictor import Prediction

_SHOWN_CLASSES = 5  # number of classes of a text that are displayed


def show(predicted: Iterable[tuple[InputRow, Prediction]], labels: Sequence[str]) -> int:
    """Print the predictions of texts, with a bar for the probability of each class, and return their number.

    Args:
        predicted: rows with their predictions.
        labels: names of the classes.
    """
    n = 0
    for row, prediction in predicted:
        print(one_line(" | ".join(row.texts.values())))
        for line in describe(prediction, labels):
            print(f"  {line}")
        n += 1
    return n


def terminal_width() -> int:
    """Return the number of columns of the terminal, from 20 to 80."""
    return max(20, min(80, shutil.get_terminal_size().columns))


def one_line(text: str, width: int | None = None) -> str:
    """Return a text as one line, shortened to a width; defaults to that of the terminal, 80 at most."""
    line, limit = printable(" ".join(text.split())), terminal_width() if width is None else width
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def describe(prediction: Prediction, labels: Sequence[str]) -> list[str]:
    """Return the lines that display a prediction: the number, or the most probable classes, the predicted one first.

    Args:
        prediction: the prediction.
        labels: names of the classes.
    """
    if prediction.class_index is None:
        return [f"{prediction.value:g}"]
    order = sorted(range(len(labels)), key=lambda i: (i != prediction.class_index, -prediction.probabilities[i]))
    shown = order[:_SHOWN_CLASSES]
    names = [one_line(labels[i], 30) for i in shown]
    width = max(map(len, names))
    room = max(4, terminal_width() - width - 12)
    lines = []
    for i, name in zip(shown, names, strict=True):
        probability = prediction.probabilities[i]
        lines.append(f"{name:{width}}  {probability:.4f}  {'█' * round(probability * room)}".rstrip())
    if len(order) > len(shown):
        lines.append(f"and {len(order) - len(shown)} more classes")
    return lines
