"""Metrics of generated text: overlap with references, diversity and repetition."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CHRF_ORDER, _CHRF_BETA = 6, 2  # longest character n-grams of chrF, and the weight of its recall
Words = Sequence[object]  # words or token ids


def words(text: str) -> list[str]:
    """Split a text into words in lower case; apostrophes within a word are part of it."""
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())


def ngrams(tokens: Words, n: int) -> list[tuple[object, ...]]:
    """Return all n-grams of a sequence, in order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[Words], n: int) -> float:
    """Compute distinct-n (Li et al. 2016).

    Args:
        texts: words or token ids of each text.
        n: length of the n-grams.

    Returns:
        Number of distinct n-grams divided by the number of n-grams, over all texts together; 0 without n-grams.
    """
    grams = [gram for tokens in texts for gram in ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_counts(texts: Sequence[Words], n: int) -> list[tuple[int, int, int]]:
    """Return what each text adds to the counts from which :func:`distinct` is computed, for all texts or without one.

    Args:
        texts: words or token ids of each text.
        n: length of the n-grams.

    Returns:
        For each text the number of its n-grams, of those distinct ones that no earlier text has, and of those distinct
        ones that no other text has.
    """
    grams = [ngrams(tokens, n) for tokens in texts]
    num_texts = Counter(gram for of_text in grams for gram in set(of_text))
    seen: set[object] = set()
    counts = []
    for of_text in grams:
        kinds = set(of_text)
        counts.append((len(of_text), len(kinds - seen), sum(num_texts[gram] == 1 for gram in kinds)))
        seen |= kinds
    return counts


def seq_rep(tokens: Words, n: int) -> float:
    """Compute seq-rep-n (Welleck et al. 2020), the fraction of repeated n-grams of a text.

    Args:
        tokens: words or token ids of one text.
        n: length of the n-grams.

    Returns:
        ``1 - distinct n-grams / all n-grams``; 0 without n-grams.
    """
    grams = ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """Compute the corpus chrF (Popović 2015) with the default settings of sacrebleu, which ignore whitespace.

    Args:
        texts: the texts to score.
        references: one reference for each text.

    Returns:
        The score, from 0 to 100.
    """
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(texts, [references]).score


def chrf_counts(text: str, reference: str) -> list[int]:
    """Return what a text adds to the counts from which :func:`chrf` is computed.

    Args:
        text: the text to score.
        reference: its reference.

    Returns:
        For every length from 1 to :data:`CHRF_ORDER` the number of character n-grams of the text, of the reference, and
        of both. As in sacrebleu, n-grams of a text whose reference is too short to have any do not count.
    """
    characters, of_reference = ("".join(part.split()) for part in (text, reference))
    counts: list[int] = []
    for n in range(1, CHRF_ORDER + 1):
        found, expected = (Counter(ngrams(part, n)) for part in (characters, of_reference))
        counts += [found.total() if expected else 0, expected.total(), (found & expected).total()]
    return counts


def chrf_of_counts(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute chrF (...) from sums of :func:`chrf_counts` (..., 18) over texts."""
    found, expected, matches = np.moveaxis(counts.reshape(*counts.shape[:-1], CHRF_ORDER, 3), -1, 0)
    is_counted = (found > 0) & (expected > 0)
    orders = np.maximum(is_counted.sum(-1), 1)
    precision = np.where(is_counted, matches / np.maximum(found, 1), 0.0).sum(-1) / orders
    recall = np.where(is_counted, matches / np.maximum(expected, 1), 0.0).sum(-1) / orders
    weight = _CHRF_BETA**2
    denominator = weight * precision + recall
    scores: NDArray[np.float64] = 100 * (1 + weight) * precision * recall / np.where(denominator > 0, denominator, 1.0)
    return scores


def chrf_signature() -> str:
    """Return sacrebleu's signature of :func:`chrf`: its settings and version, to be reported with a score."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    metric.corpus_score(["text"], [["text"]])  # sets the number of references in the signature
    return str(metric.get_signature())
