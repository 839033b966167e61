"""Scores of generated text: overlap with references, diversity and repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence

Words = Sequence[object]  # words, or token ids


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
