"""Prompt templates, which format the columns of a row as one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING

from gpt2_pl.errors import InputError, shorten

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Template:
    """Prompt template with one ``{field}`` per column, such as ``Review: {sentence} Sentiment:``.

    Args:
        text: the template, in the syntax of ``str.format``; ``{{`` and ``}}`` are literal braces.

    Attributes:
        fields: names of the fields, without duplicates, in order of occurrence.

    Raises:
        InputError: the template has no field, a field is not a plain name, or braces do not match.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise InputError(f"template {text!r}: {error}", key="template") from None
        self.text = text
        self.fields = list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))
        if not self.fields:
            raise InputError(key="template", value=text, expected="text with a field, such as {sentence}")
        for _, name, spec, conversion in parts:
            if name is not None and (not name.isidentifier() or spec or conversion):
                message = f"template {text!r}: a field must be a plain column name, such as {{sentence}}"
                raise InputError(message, key="template")

    def fill(self, row: Mapping[str, str]) -> str:
        """Return the text of one row; values are stripped of surrounding white space."""
        return self.text.format(**{field: row[field].strip() for field in self.fields})

    def encode(self, rows: Sequence[Mapping[str, str]], tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
        """Return the token ids of each row's text, truncated to ``max_length``.

        Truncation shortens the values of the longest field first and keeps the template's own text.

        Args:
            rows: values of the fields, per row.
            tokenizer: encodes the texts.
            max_length: maximum number of tokens of a row.

        Raises:
            InputError: the template leaves no room for text, or the tokenizer gives no token for a text.
        """
        ids: list[list[int]] = []
        texts = [self.fill(row) for row in rows]
        for row, text, encoding in zip(rows, texts, tokenizer.encode_batch(texts), strict=True):
            if not encoding.ids:
                raise InputError(f"the tokenizer gives no token for the text {shorten(text)}", key="data.tokenizer")
            ids.append(encoding.ids if len(encoding) <= max_length else self._truncate(row, tokenizer, max_length))
        return ids

    def _truncate(self, row: Mapping[str, str], tokenizer: Tokenizer, max_length: int) -> list[int]:
        # Values are cut as text, at the end of one of their tokens, and the filled template is encoded again.
        # Cutting token ids instead could produce a sequence that no text is encoded to.
        texts = {field: row[field].strip() for field in self.fields}
        ends = {
            field: [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
            for field, text in texts.items()
        }
        keep = {field: len(end) for field, end in ends.items()}
        while True:
            values = {field: texts[field][: ends[field][n - 1]] if (n := keep[field]) else "" for field in self.fields}
            ids = tokenizer.encode(self.fill(values)).ids
            excess = len(ids) - max_length
            if not any(keep.values()):
                taken = f"the template {self.text!r} alone takes {len(ids)} tokens"
                raise InputError(f"max_length must leave room for text, got {max_length}; {taken}", key="max_length")
            if excess <= 0:
                return ids
            longest = max(keep, key=keep.__getitem__)
            second = max((n for field, n in keep.items() if field != longest), default=0)
            keep[longest] -= max(1, min(excess, keep[longest] - second))
