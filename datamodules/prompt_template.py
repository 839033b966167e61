"""Prompt templates, which format the columns of a row as one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from string import Formatter
from typing import TYPE_CHECKING

import numpy as np

from gpt2_pl.errors import InputError, shorten
from gpt2_pl.text.normalization import Normalizer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True)
class Truncation:
    """Counts of texts that are longer than the maximum and are truncated.

    Args:
        n_texts: number of texts.
        n_truncated: number of truncated texts.
        kept: number of tokens that are left of the truncated texts.
        lost: number of tokens that are removed from them.
    """

    n_texts: int = 0
    n_truncated: int = 0
    kept: int = 0
    lost: int = 0

    @classmethod
    def of(cls, lengths: ArrayLike, lost: ArrayLike) -> Truncation:
        """Count texts.

        Args:
            lengths: (N,) number of tokens of each text after truncation.
            lost: (N,) number of tokens removed from each text; 0 for a complete text.
        """
        lengths, lost = np.asarray(lengths, dtype=int), np.asarray(lost, dtype=int)
        return cls(len(lost), int((lost > 0).sum()), int(lengths[lost > 0].sum()), int(lost.sum()))

    def __add__(self, other: Truncation) -> Truncation:
        return Truncation(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def sentence(self, max_length: int, texts: str = "texts") -> str:
        """Return the sentence that says how many texts are truncated, at least one, and how much of them is lost.

        Args:
            max_length: maximum number of tokens of a text.
            texts: what the texts are called.
        """
        verb, whose = ("is", "its") if self.n_truncated == 1 else ("are", "their")
        share = self.lost / (self.kept + self.lost)
        amount = "less than 1 %" if share < 0.01 else f"{100 * share:.0f} %"
        return (
            f"{self.n_truncated:,} of {self.n_texts:,} {texts} {verb} longer than {max_length:,} tokens "
            f"(data.max_length) and {verb} truncated: {amount} of {whose} tokens are lost"
        )


class Template:
    """Prompt template with one ``{field}`` per column, such as ``Review: {sentence} Sentiment:``.

    Args:
        text: the template, in the syntax of ``str.format``; ``{{`` and ``}}`` are literal braces.
        normalize: steps of :class:`~gpt2_pl.text.normalization.Normalizer`, which the values of the fields pass.

    Attributes:
        fields: names of the fields, without duplicates, in order of occurrence.

    Raises:
        InputError: the template has no field, a field is not a plain name, braces do not match, or a step does not
            exist.
    """

    def __init__(self, text: str, normalize: Sequence[str] = ()) -> None:
        self.normalizer = Normalizer(normalize)
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise InputError(f"template {text!r}: {error}", key="template") from None
        self.text = text
        self._parts = [(literal, name) for literal, name, _, _ in parts]  # literal text and the field after it
        self.fields = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.fields:
            raise InputError(key="template", value=text, expected="text with a field, such as {sentence}")
        for _, name, spec, conversion in parts:
            if name is not None and (not name.isidentifier() or spec or conversion):
                message = f"template {text!r}: a field must be a plain column name, such as {{sentence}}"
                raise InputError(message, key="template")

    def fill(self, row: Mapping[str, str]) -> str:
        """Return the text of one row; values are normalized, and stripped of surrounding white space."""
        return self.text.format(**{field: self.normalizer(row[field]) for field in self.fields})

    def encode(self, rows: Sequence[Mapping[str, str]], tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
        """Return the token ids of each row's text, truncated to ``max_length``.

        Truncation shortens the values of the longest field first and keeps the template's own text. A row has no ids
        if one of its fields has no token, because the normalizer deletes its characters or the vocabulary lacks them.

        Args:
            rows: values of the fields, per row.
            tokenizer: encodes the texts.
            max_length: maximum number of tokens of a row.

        Returns:
            Token ids of each row; an empty list for a row with a field without tokens.

        Raises:
            InputError: the template leaves no room for text.
        """
        return self.encode_or_truncate(rows, tokenizer, max_length)[0]

    def encode_or_truncate(
        self, rows: Sequence[Mapping[str, str]], tokenizer: Tokenizer, max_length: int
    ) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of each row's text as :meth:`encode` does, and how many tokens are removed from it."""
        ids: list[list[int]] = []
        lost: list[int] = []
        for row, encoding in zip(rows, tokenizer.encode_batch([self.fill(row) for row in rows]), strict=True):
            has_tokens = self._covers_fields(row, encoding)
            is_truncated = has_tokens and len(encoding) > max_length
            whole = encoding.ids if has_tokens else []
            ids.append(self._truncate(row, tokenizer, max_length) if is_truncated else whole)
            lost.append(len(whole) - len(ids[-1]))
        return ids, lost

    def no_token(self, row: Mapping[str, str]) -> str:
        """Return the error message for a row without token ids."""
        texts = ", ".join(shorten(row[field]) for field in self.fields)
        return f"the tokenizer gives no token for {'one of the texts' if len(self.fields) > 1 else 'the text'} {texts}"

    def _covers_fields(self, row: Mapping[str, str], encoding: Encoding) -> bool:
        """Return whether the value of every field has a token."""
        start = 0
        for literal, field in self._parts:
            start += len(literal)
            if field is not None:
                end = start + len(self.normalizer(row[field]))
                if start == end or (
                    encoding.char_to_token(start) is None
                    and not any(first < end and last > start for first, last in encoding.offsets)
                ):
                    return False
                start = end
        return True

    def _truncate(self, row: Mapping[str, str], tokenizer: Tokenizer, max_length: int) -> list[int]:
        # Values are cut as text, at the end of one of their tokens, and the filled template is encoded again.
        # Cutting token ids instead could produce a sequence that no text is encoded to.
        texts = {field: self.normalizer(row[field]) for field in self.fields}
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
