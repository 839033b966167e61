"""BLEU, chrF and ROUGE-L of several references against sacrebleu and brute force."""

import itertools
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from gpt2_pl.experiments.statistics.contributions import from_sums
from gpt2_pl.text.metrics import chrf_of_counts, words
from gpt2_pl.text.overlap import best_chrf_counts, bleu, bleu_counts, bleu_of_counts, chrf, rouge_l, signatures

WORDS = ["the", "airport", "of", "Aarhus", "serves", "Denmark", "is", "25.0", "metres", ",", "high", "city"]


def corpus(seed, n=12):
    """Return texts with one to four references each; some texts are empty, short, or equal to a reference."""
    draw = random.Random(seed)
    sentence = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 14))) + draw.choice([".", " .", ""])  # noqa: E731
    references = [[sentence() for _ in range(draw.randint(1, 4))] for _ in range(n)]
    texts = [draw.choice([sentence(), draw.choice(of_text), draw.choice(of_text)[:20]]) for of_text in references]
    return ["", *texts[1:]], references


def streams(references):
    most = max(map(len, references))
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]


@pytest.mark.parametrize("seed", range(4))
def test_counts_without_a_row_give_sacrebleus_score_of_the_other_rows(seed):
    texts, references = corpus(seed)
    for metric, corpus_score, count, score in (
        (BLEU(), bleu, bleu_counts, bleu_of_counts),
        (CHRF(), chrf, best_chrf_counts, chrf_of_counts),
    ):
        counts = np.array([count(text, refs) for text, refs in zip(texts, references, strict=True)], dtype=float)
        value, contributions = from_sums(counts, score)
        assert value == pytest.approx(metric.corpus_score(texts, streams(references)).score, abs=1e-9)
        assert corpus_score(texts, references) == pytest.approx(value, abs=1e-9)
        for i in range(len(texts)):
            others = [(text, refs) for j, (text, refs) in enumerate(zip(texts, references, strict=True)) if j != i]
            rest = metric.corpus_score([text for text, _ in others], streams([refs for _, refs in others])).score
            assert contributions[i] == pytest.approx(len(texts) * value - (len(texts) - 1) * rest, abs=1e-6)


def test_bleu_of_few_matches_is_smoothed_as_by_sacrebleu():
    for text, reference in (
        ("the city", "the city"),
        ("the high city", "the city high"),
        ("of the high airport of Denmark", "the city serves the high airport"),
        ("high", "city"),
        ("", "city"),
        ("the airport of the city of Aarhus", "the airport is high and of"),
    ):
        expected = BLEU().corpus_score([text], [[reference]]).score
        assert bleu_of_counts(np.array(bleu_counts(text, [reference]), dtype=float)) == pytest.approx(expected)
        assert bleu([text], [[reference]]) == pytest.approx(expected)


def test_signatures_name_the_number_of_references():
    found = signatures([["a", "b"], ["c", "d"]])
    assert found["bleu"].startswith("nrefs:2|case:mixed|eff:no|tok:13a")
    assert found["chrf"].startswith("nrefs:2|case:mixed|eff:yes|nc:6")
    assert "nrefs:var" in signatures([["a", "b"], ["c"]])["bleu"]


def longest_common_subsequence(a, b):
    """Return the length of the longest subsequence of a that is one of b, by trying all."""
    for n in range(len(a), 0, -1):
        for positions in itertools.combinations(range(len(a)), n):
            rest = iter(b)
            if all(a[i] in rest for i in positions):
                return n
    return 0


@pytest.mark.parametrize("seed", range(3))
def test_rouge_l_equals_brute_force(seed):
    texts, references = corpus(seed, 8)
    for text, refs in zip(texts, references, strict=True):
        scores = []
        for reference in refs:
            a, b = words(text), words(reference)
            common = longest_common_subsequence(a, b)
            precision, recall = (common / len(x) if x else 0.0 for x in (a, b))
            scores.append(2 * precision * recall / (precision + recall) if common else 0.0)
        assert rouge_l(text, refs) == pytest.approx(max(scores))
    assert rouge_l("A high, HIGH city.", ["a high high city"]) == 1.0
