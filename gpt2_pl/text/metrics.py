"""Scores of generated text: diversity, repetition, and the report's own ones under their own names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

Words = Sequence[object]  # words, or token ids

_VOWELS = "aeiouy"
_SEED_PAIRS = [*((i, i + 1) for i in range(0, 14, 2)), (0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11)]


def words(text: str) -> list[str]:
    """The words of a text, in lower case; apostrophes within a word belong to it."""
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())


def ngrams(tokens: Words, n: int) -> list[tuple[object, ...]]:
    """All runs of n tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[Words], n: int) -> float:
    """distinct-n (Li et al. 2016): different n-grams over all n-grams, of all texts together."""
    grams = [gram for tokens in texts for gram in ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def seq_rep(tokens: Words, n: int) -> float:
    """seq-rep-n (Welleck et al. 2020): the share of a text's n-grams that it has had before."""
    grams = ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """sacrebleu's corpus chrF (Popović 2015) with its default settings, from 0 to 100; white space does not count.

    Args:
        texts: to be scored.
        references: the true text of each.
    """
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(texts, [references]).score


def chrf_signature() -> str:
    """The settings and version of sacrebleu's corpus chrF, as a score is to be reported with."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    metric.corpus_score(["text"], [["text"]])  # which counts the references
    return str(metric.get_signature())


def seed_perplexity(text: str) -> float:
    """exp of the entropy of a text's own words. No model is asked: it says nothing of a language model."""
    counts = Counter(words(text))
    n = sum(counts.values())
    return math.exp(-sum(c / n * math.log(c / n) for c in counts.values())) if n else 0.0


def seed_distinct(text: str) -> float:
    """Different words over all words of one text."""
    said = words(text)
    return len(set(said)) / len(said) if said else 0.0


def seed_rhyme(lines: Sequence[str]) -> float:
    """The share of 13 pairs of lines whose last words end alike from the last vowel letter on."""
    ends = [_suffix(line) for line in lines]
    pairs = [(i, j) for i, j in _SEED_PAIRS if j < len(ends)]
    return sum(ends[i] is not None and ends[i] == ends[j] for i, j in pairs) / len(_SEED_PAIRS)


def _suffix(line: str) -> str | None:
    said = words(line)
    if not said:
        return None
    at = max(said[-1].rfind(vowel) for vowel in _VOWELS)
    return said[-1][at:] if at >= 0 else said[-1]
