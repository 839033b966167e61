"""Words that moved a decision: how a prediction changes if a part of the text is left out (occlusion).

Zeiler and Fergus (2014, https://arxiv.org/abs/1311.2901) occluded parts of images. Li, Monroe and Jurafsky (2016,
https://arxiv.org/abs/1612.08220) erase words, and measure the change of the model's score. It needs no gradient, so
that every classifier and regressor has it, and its numbers are predictions that anyone can repeat by typing the text
without the word. Words that act only together, such as two words of praise of which one suffices, get small numbers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from gpt2_pl.errors import InputError

if TYPE_CHECKING:
    from gpt2_pl.inference.predictor import Prediction, Predictor
    from gpt2_pl.inference.prompts import Text

MAX_PARTS = 64  # of a text, each of which takes a forward pass
MAX_TOKENS = 12_288  # of all these passes together
_WORD = re.compile(r"\S+")


class PartEffect(NamedTuple):
    """Effect of a part of a text on a prediction.

    Args:
        field: template field of the part.
        start: index of its first character in the text of the field.
        end: index after its last character.
        effect: decrease of the probability of the predicted class, or of the predicted number, without the part.
        without: prediction for the text without the part.
    """

    field: str
    start: int
    end: int
    effect: float
    without: Prediction


def occlude(predictor: Predictor, text: Text, max_parts: int = MAX_PARTS) -> tuple[Prediction, list[PartEffect]]:
    """Predict for a text, and for the text without each of its words.

    Words are separated by white space. In a text of many words, neighbouring words are left out together. A part is
    not listed if nothing remains of its field without it.

    Args:
        predictor: a classifier or regressor.
        text: as one of :meth:`~gpt2_pl.inference.predictor.Predictor.predict`.
        max_parts: maximum number of parts; fewer for a long text, so that all texts together have at most 12,288
            tokens. Every field has at least one.

    Returns:
        The prediction for the text, and the effects of its parts in order.

    Raises:
        InputError: as in :meth:`~gpt2_pl.inference.predictor.Predictor.predict`.
    """
    predictor.require_prediction()
    (row,) = predictor.prompt.rows([text])
    (full,), _ = predictor.prompt.encode([row], predictor.tokenizer)
    if not full:
        raise InputError(predictor.prompt.no_token(row), source="text 1")
    spans = parts(row, min(max_parts, max(1, MAX_TOKENS // len(full))))
    rows = [row | {field: _without(row[field], start, end)} for field, start, end in spans]
    kept = [i for i, (field, *_) in enumerate(spans) if rows[i][field].strip()]
    ids, _ = predictor.prompt.encode([rows[i] for i in kept], predictor.tokenizer) if kept else ([], 0)
    left_out = [(spans[i], row_ids) for i, row_ids in zip(kept, ids, strict=True) if row_ids]
    prediction, *others = predictor.predict_ids([full, *(row_ids for _, row_ids in left_out)], batch_size=MAX_PARTS)
    return prediction, [
        PartEffect(*span, _score(prediction, prediction) - _score(other, prediction), other)
        for (span, _), other in zip(left_out, others, strict=True)
    ]


def parts(row: dict[str, str], max_parts: int) -> list[tuple[str, int, int]]:
    """Divide the texts of a row into words, or into groups of neighbouring words of equal number.

    Args:
        row: text of each field.
        max_parts: maximum number of parts, except that every field has one.

    Returns:
        The field, the index of the first character and the index after the last character of each part.
    """
    words = {field: [match.span() for match in _WORD.finditer(text)] for field, text in row.items()}
    size, limit = 1, max(max_parts, len(row))
    while sum(-(-len(spans) // size) for spans in words.values()) > limit:
        size += 1
    return [
        (field, spans[i][0], spans[min(i + size, len(spans)) - 1][1])
        for field, spans in words.items()
        for i in range(0, len(spans), size)
    ]


def _without(text: str, start: int, end: int) -> str:
    """Return a text without a part and the white space behind it."""
    return text[:start] + text[end:].lstrip()


def _score(prediction: Prediction, predicted: Prediction) -> float:
    """Return the number of a prediction, or its probability of the class of another one."""
    if predicted.class_index is None:
        return float(prediction.value)
    return prediction.probabilities[predicted.class_index]
