"""Overlap of generated texts with one or more references each: BLEU, chrF and ROUGE-L.

What each text adds to a corpus score is a list of counts, so that the score without any text can be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.text.metrics import chrf_counts, chrf_of_counts, words

BLEU_ORDER = 4
"""Longest word n-grams of BLEU."""

References = Sequence[Sequence[str]]
"""References of every text, one or more each."""


def bleu(texts: Sequence[str], references: References) -> float:
    """Compute corpus BLEU (Papineni et al. 2002) with the default settings of sacrebleu (Post 2018).

    Args:
        texts: the texts to score.
        references: the references of each text.

    Returns:
        The score, from 0 to 100.
    """
    from sacrebleu.metrics import BLEU

    return float(BLEU(force=True).corpus_score(texts, _streams(references)).score)


def bleu_counts(text: str, references: Sequence[str]) -> list[int]:
    """Return what a text adds to the counts from which :func:`bleu` is computed.

    Args:
        text: the text to score.
        references: its references.

    Returns:
        The number of tokens of the text and of the reference with the nearest length, and for every n up to
        :data:`BLEU_ORDER` the number of n-grams that also occur in a reference, then the number of all n-grams.
    """
    from sacrebleu.metrics import BLEU

    score = BLEU(force=True).corpus_score([text], _streams([references]))
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def bleu_of_counts(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute BLEU (...) from sums of :func:`bleu_counts` (..., 10) over texts.

    As in sacrebleu, the k-th precision without a match is that of 2^-k matches (smoothing 3 of Chen and Cherry 2014).
    """
    length, of_references = counts[..., 0], counts[..., 1]
    matches, total = counts[..., 2 : 2 + BLEU_ORDER], counts[..., 2 + BLEU_ORDER :]
    is_missed = (matches == 0) & (total > 0)
    smoothed = np.where(is_missed, 0.5 ** is_missed.cumsum(-1), matches) / np.maximum(total, 1)
    with np.errstate(divide="ignore"):
        precision = np.exp(np.log(smoothed).mean(-1))
    brevity = np.exp(np.minimum(1 - of_references / np.maximum(length, 1), 0.0))
    scores: NDArray[np.float64] = 100 * brevity * np.where(matches.sum(-1) > 0, precision, 0.0)
    return scores


def chrf(texts: Sequence[str], references: References) -> float:
    """Compute corpus chrF like :func:`gpt2_pl.text.metrics.chrf`, with the best of several references of each text.

    Args:
        texts: the texts to score.
        references: the references of each text.

    Returns:
        The score, from 0 to 100.
    """
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(texts, _streams(references)).score)


def best_chrf_counts(text: str, references: Sequence[str]) -> list[int]:
    """Return :func:`~gpt2_pl.text.metrics.chrf_counts` of a text and the reference with the highest chrF."""
    counts = [chrf_counts(text, reference) for reference in references]
    return counts[int(chrf_of_counts(np.array(counts, dtype=float)).argmax())]


def signatures(references: References) -> dict[str, str]:
    """Return sacrebleu's signatures of :func:`bleu` and :func:`chrf`, to be reported with the scores.

    Args:
        references: the references of the scored texts.
    """
    from sacrebleu.metrics import BLEU, CHRF

    found = {}
    for name, metric in {"bleu": BLEU(force=True), "chrf": CHRF()}.items():
        metric.corpus_score([""] * len(references), _streams(references))  # sets the number of references
        found[name] = str(metric.get_signature())
    return found


def _streams(references: References) -> list[list[Any]]:
    """Return the references as sacrebleu reads them: a list of the first ones, of the second ones, and so on.

    A text with fewer references than others has None in their places, which sacrebleu permits but does not annotate.
    """
    most = max(map(len, references))
    return [[of_text[i] if i < len(of_text) else None for of_text in references] for i in range(most)]


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Compute the ROUGE-L F-measure of a text (Lin 2004), the highest over its references.

    Args:
        text: the text to score.
        references: its references.

    Returns:
        2 P R / (P + R), where P and R are the length of the longest common subsequence of words divided by the number
        of words of the text and of the reference; words are those of :func:`~gpt2_pl.text.metrics.words`.
    """
    of_text = words(text)
    scores = []
    for reference in references:
        of_reference = words(reference)
        common = _common_subsequence(of_text, of_reference)
        scores.append(2 * common / max(len(of_text) + len(of_reference), 1))
    return max(scores)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two sequences, in O(len(a) len(b))."""
    best = [0] * (len(b) + 1)  # best[j]: of the part of a that was read and the first j elements of b
    for x in a:
        previous = 0
        for j, y in enumerate(b, start=1):
            longest = previous + 1 if x == y else max(best[j], best[j - 1])
            previous, best[j] = best[j], longest
    return best[-1]
