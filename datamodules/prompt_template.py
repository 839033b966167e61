"""Prompts in words: one template turns a row's columns into the text the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING

from gpt2_pl.errors import InputError, shorten

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


class Template:
    """A text with ``{field}`` where a row's columns go, such as ``Review: {sentence} Sentiment:``.

    Args:
        text: the template; ``{{`` and ``}}`` stand for braces.

    Raises:
        InputError: no field, a field without a name, or broken braces.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise InputError(f"template {text!r}: {error}") from None
        self.text = text
        self._parts = [(literal, name) for literal, name, _, _ in parts]  # a field follows its literal
        self.fields = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.fields:
            raise InputError(f"template {text!r} has no field; write one as {{sentence}}")
        for _, name, spec, conversion in parts:
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise InputError(f"template {text!r}: a field is a plain column name, such as {{sentence}}")

    def fill(self, row: Mapping[str, str]) -> str:
        """The text of one row; white space around a field's value is dropped."""
        return self.text.format(**{field: row[field].strip() for field in self.fields})

    def encode(self, rows: Sequence[Mapping[str, str]], tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
        """Return the token ids of each row's text, at most ``max_length``.

        A text that is too long loses words of its fields, the longest field first, and never a part of the template. A
        row with a field that has no token, because a normalizer deletes its characters or because the vocabulary lacks
        them, has no ids.

        Raises:
            InputError: the template leaves no room for text.
        """
        encodings = tokenizer.encode_batch([self.fill(row) for row in rows])
        return [self._ids(row, found, tokenizer, max_length) for row, found in zip(rows, encodings, strict=True)]

    def no_token(self, row: Mapping[str, str]) -> str:
        """Return the message for a row to which :meth:`encode` gives no token ids."""
        texts = ", ".join(shorten(row[field]) for field in self.fields)
        return f"the tokenizer gives no token for {'one of the texts' if len(self.fields) > 1 else 'the text'} {texts}"

    def _ids(self, row: Mapping[str, str], encoding: Encoding, tokenizer: Tokenizer, max_length: int) -> list[int]:
        if not self._covers_fields(row, encoding):
            return []
        return encoding.ids if len(encoding) <= max_length else self._truncated(row, tokenizer, max_length)

    def _covers_fields(self, row: Mapping[str, str], encoding: Encoding) -> bool:
        """Return whether the text of every field has a token."""
        start = 0
        for literal, field in self._parts:
            start += len(literal)
            if field is not None:
                end = start + len(row[field].strip())
                if start == end or (
                    encoding.char_to_token(start) is None
                    and not any(first < end and last > start for first, last in encoding.offsets)
                ):
                    return False
                start = end
        return True

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
            if not any(keep.values()):
                raise InputError(
                    f"template {self.text!r} alone takes {len(ids)} tokens; max_length is {max_length}, which leaves "
                    "no room for text"
                )
            if excess <= 0:
                return ids
            longest = max(keep, key=keep.__getitem__)
            second = max((n for field, n in keep.items() if field != longest), default=0)
            keep[longest] -= max(1, min(excess, keep[longest] - second))
