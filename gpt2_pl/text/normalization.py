"""Normalization of texts before they are inserted into a template."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from gpt2_pl.errors import require

Step = Literal["lowercase", "space_punctuation"]

STEPS = {
    "lowercase": "letters are converted to lower case",
    "space_punctuation": "a space is put before every . ? , and ', and runs of white space become one space",
}
"""Description of each step."""

_PUNCTUATION = re.compile(r"([.?,'])")
_STEPS: dict[str, Callable[[str], str]] = {
    "lowercase": str.lower,
    "space_punctuation": lambda text: " ".join(_PUNCTUATION.sub(r" \1", text).split()),
}


class Normalizer:
    """Normalizer of the texts of rows: it strips surrounding white space, then applies some steps in order.

    The steps are ``lowercase``, and ``space_punctuation``, which puts a space before every ``.``, ``?``, ``,`` and
    ``'``, and replaces runs of white space by one space.

    Args:
        steps: names of the steps.

    Raises:
        InputError: a step does not exist.
    """

    def __init__(self, steps: Sequence[str] = ()) -> None:
        for step in steps:
            require(step in _STEPS, "data.normalize", step, f"one or several of {', '.join(get_args(Step))}")
        self.steps = list(steps)

    def __call__(self, text: str) -> str:
        """Return the normalized text."""
        text = text.strip()
        for step in self.steps:
            text = _STEPS[step](text)
        return text
