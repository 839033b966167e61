"""Normalizer against a loop over characters, and in the data."""

import pytest
from helpers.refusals import refusal

from gpt2_pl.datamodules import QuoraPairs
from gpt2_pl.text.normalization import Normalizer
from gpt2_pl.text.tokenizer import load_tokenizer

TEXTS = ["", "  A b ", "It's 3.5, isn't it?", "a\t\nb  .c", "É?!", "don 't"]


def spaced(text):
    """Insert spaces before the characters . ? , ' and keep single spaces between words, one character at a time."""
    words, word = [], ""
    for character in f"{text} ":
        if character.isspace():
            words, word = [*words, word], ""
        elif character in ".?,'":
            words, word = [*words, word], character
        else:
            word += character
    return " ".join(word for word in words if word)


@pytest.mark.parametrize("text", TEXTS)
def test_normalizer_steps_equal_a_loop_over_characters(text):
    assert Normalizer()(text) == text.strip()
    assert Normalizer(["lowercase"])(text) == text.strip().lower()
    assert Normalizer(["space_punctuation"])(text) == spaced(text)
    assert Normalizer(["lowercase", "space_punctuation"])(text) == spaced(text.lower())


def test_normalizer_unknown_step_is_refused():
    assert "lowercase, space_punctuation" in str(refusal(Normalizer, ["lower"]))


def test_data_normalize_changes_tokens_and_duplicates_but_not_the_written_texts(base, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("sentence1,sentence2,is_duplicate\n" + "".join(f"{a},b?,1\n" for a in ("A  x.", "a x .", "C", "d")))
    settings = {"train_file": str(file), "tokenizer": str(base), "template": "{sentence1} | {sentence2} Ok:"}
    data = QuoraPairs(normalize=["lowercase", "space_punctuation"], val_fraction=0.25, split_seed=3, **settings)
    data.setup("fit")
    texts = [data.text("train", i) for i in range(len(data.rows["train"]))]
    (val,) = (data.text("val", i) for i in range(1))
    tokenizer = load_tokenizer(base)
    for split in ("train", "val"):
        for i, row in enumerate(data.rows[split]):
            filled = f"{spaced(row['sentence1'].lower())} | b ? Ok:"
            assert data.encoded[split].row(i).tolist() == tokenizer.encode(filled).ids
    assert {*texts, val} <= {"A  x. | b?", "a x . | b?", "C | b?", "d | b?"}
    same = {"A  x. | b?", "a x . | b?"}
    assert len(texts) == (2 if val in same else 3)  # a training row that equals a validation row is dropped
    assert val not in same or not same & set(texts)
