"""Prompts in words: one template turns a row's columns into the text the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING

from gpt2_pl.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Template:
    """A text with ``{field}`` where a row's columns go, such as ``Review: {sentence} Sentiment:``.

    Args:
        text: the template; ``{{`` and ``}}`` stand for braces.

    Raises:
        InputError: no field, a field without a name, or broken braces.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(text)]
        except ValueError as error:
            raise InputError(f"template {text!r}: {error}") from None
        self.text = text
        self.fields = list(dict.fromkeys(name for name, _, _ in parts if name is not None))
        if not self.fields:
            raise InputError(f"template {text!r} has no field; write one as {{sentence}}")
        for name, spec, conversion in parts:
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise InputError(f"template {text!r}: a field is a plain column name, such as {{sentence}}")

    def fill(self, row: Mapping[str, str]) -> str:
        """The text of one row; white space around a field's value is dropped."""
        return self.text.format(**{field: row[field].strip() for field in self.fields})

    def encode(self, rows: Sequence[Mapping[str, str]], tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
        """Token ids of each row's text, at most ``max_length`` long.

        What is too long loses words of its fields, the longest field first, and never a part of the template.

        Raises:
            InputError: the template alone is longer than ``max_length``.
        """
        encodings = tokenizer.encode_batch([self.fill(row) for row in rows])
        return [
            encoding.ids if len(encoding) <= max_length else self._truncated(row, tokenizer, max_length)
            for row, encoding in zip(rows, encodings, strict=True)
        ]

    def _truncated(self, row: Mapping[str, str], tokenizer: Tokenizer, max_length: int) -> list[int]:
        # Fields are cut as text, at the ends of their tokens, and the whole is encoded again: the tokens of a
        # truncated row are those of a text that could have stood there.
        texts = {field: row[field].strip() for field in self.fields}
        ends = {
            field: [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
            for field, text in texts.items()
        }
        keep = {field: len(end) for field, end in ends.items()}
        while True:
            cut = {field: texts[field][: ends[field][n - 1]] if (n := keep[field]) else "" for field in self.fields}
            ids = tokenizer.encode(self.fill(cut)).ids
            excess = len(ids) - max_length
            if excess <= 0:
                return ids
            if not any(keep.values()):
                raise InputError(f"template {self.text!r} alone takes {len(ids)} tokens; max_length is {max_length}")
            longest = max(keep, key=keep.__getitem__)
            second = max((n for field, n in keep.items() if field != longest), default=0)
            keep[longest] -= max(1, min(excess, keep[longest] - second))
