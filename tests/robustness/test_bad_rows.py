"""Rows, labels and poems of arbitrary values: read exactly, or refused or skipped by the number of the row."""

import json
import re

import datasets
import pytest
from helpers.fuzzing import cells, fuzz, scalars
from helpers.refusals import refusal
from hypothesis import given
from hypothesis import strategies as st

from gpt2_pl.datamodules import IMDB, TextClassification, TextCorpus
from gpt2_pl.datamodules.rows import parse_label
from gpt2_pl.datamodules.sonnets import read_poems
from gpt2_pl.errors import InputError

HEADER = "sentence,sentiment\n"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Put the dataset cache into a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def test_imdb_texts_like_dates_or_numbers_remain_texts(base, tmp_path):
    texts = ["2020-01-01", "2021-02-03", "007", "1e5"]
    for n in (2, 4):
        file = tmp_path / f"{n}.jsonl"
        file.write_text("\n".join(json.dumps({"sentence": text, "sentiment": 1}) for text in texts[:n]))
        data = IMDB(test_file=str(file), tokenizer=str(base))
        data.setup()
        assert [row["sentence"] for row in data.rows["test"]] == texts[:n]


def test_imdb_values_that_are_not_text_are_named_or_skipped(base, tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = ["fine", 3, "0", None, "bad", ["a"]]
    file.write_text("\n".join(json.dumps({"sentence": text, "sentiment": i % 2}) for i, text in enumerate(texts)))
    with pytest.raises(InputError, match=r"rows\.jsonl, row 2: 'sentence' .*got 3"):
        IMDB(test_file=str(file), tokenizer=str(base)).setup()
    data = IMDB(test_file=str(file), tokenizer=str(base), on_invalid_row="skip")
    data.setup()
    assert [data.text("test", i) for i in range(3)] == ["fine", "0", "bad"]
    assert [data.row_number("test", i) for i in range(3)] == [1, 3, 5]
    assert data.encoded["test"].labels.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match=r"'sentence' .*got 3"):
        TextCorpus(train_file=str(file), column="sentence", tokenizer=str(base)).setup()


def test_imdb_row_without_tokens_is_named_or_skipped(base, tmp_path):
    settings = json.loads((base / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "z"}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    file = tmp_path / "rows.csv"
    file.write_text("sentence,sentiment\nfine,1\nzzz,0\nbad,0\n")
    with pytest.raises(InputError, match=r"rows\.csv, row 2: .*'zzz'"):
        IMDB(test_file=str(file), tokenizer=str(tmp_path), on_invalid_row="error").setup()
    data = IMDB(test_file=str(file), tokenizer=str(tmp_path), on_invalid_row="skip")
    with pytest.warns(UserWarning, match=r"1 of 3 rows .*row 2: "):
        data.setup()
    assert [data.row_number("test", i) for i in range(2)] == [1, 3]
    assert data.encoded["test"].labels.tolist() == [1, 0]


# Labels and columns


@fuzz
@given(scalars | st.sampled_from(["0", "1", "1.0", " 1 ", "yes", "no", "-1", "2", "1.5", "inf", "True", "0x1", "-0"]))
def test_parse_label_any_value_is_a_class_or_refused_by_row(value):
    text = "" if value is None else str(value).strip()
    index = re.fullmatch(r"0*([01])(\.0+)?", text, flags=re.ASCII)
    expected = {"no": 0, "yes": 1}.get(text, None if index is None else int(index[1]))
    try:
        assert parse_label({"label": value}, "label", ["no", "yes"], "rows.csv", 7) == expected
    except InputError as error:
        assert expected is None
        assert "rows.csv, row 7" in str(error)


LABELS = [  # names of labels, a value, and its class; None where it is refused
    ("1 2 3 4 0", "4.0", 3), ("1 2 3 4 0", "0.0", 4), ("1 2 3 4 5", 1.0, 0), ("1 2 3 4 5", "0", None),
    ("-1 0 1", "1.0", 2), ("-1 0 1", -1.0, 0), ("-1 0 1", "2", None), ("0.5 1.5", "1.50", 1), ("1 1.0", "1.00", None),
    ("none 1 2", "2.0", 2), ("none 1 2", "0", None), ("no yes", "0_1", None), ("no yes", "\u0967", None),
    ("no yes", "-0", None), ("no yes", "1e0", None), ("no yes", "01", 1), ("1 2", "\u0967", None),
]  # fmt: skip


def test_parse_label_numeric_names_are_not_taken_as_indices():
    for names, value, expected in LABELS:
        arguments = ({"label": value}, "label", names.split(), "rows.csv", 1)
        if expected is None:
            assert "rows.csv, row 1" in str(refusal(parse_label, *arguments)), (names, value)
        else:
            assert parse_label(*arguments) == expected, (names, value)


def test_imdb_invalid_label_in_row_1001_is_named(base, tmp_path):
    file = tmp_path / "rows.csv"
    for label in ("", "3", "-1", "1.5", "nan", "good", "1,", "0x1"):
        file.write_text(HEADER + "good,1\n" * 1000 + f'bad,"{label}"\n' + "good,1\n" * 10)
        data = IMDB(train_file=str(file), val_file=str(file), tokenizer=str(base))
        error = refusal(data.setup, case=label)
        assert "rows.csv, row 1001" in str(error), label
        assert "'sentiment'" in str(error), label


def test_text_classification_missing_or_shared_column_is_refused(base, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("a,b,label\nx,y,1\n")
    for columns, words in (({"a": "c"}, "no column 'c'"), ({"b": "a"}, "a different column to each template field")):
        data = TextClassification(
            test_file=str(file), template="{a} {b}", columns=columns, tokenizer=str(base), on_invalid_row="skip"
        )
        with pytest.raises(InputError, match=words):
            data.setup()


# Poems


@fuzz
@given(st.lists(st.sampled_from(["1", "2", "3", "../4", "a line", "", "0", "1234567", "\u0663"]) | cells, max_size=9))
def test_read_poems_any_lines_are_kept_or_refused(tmp_path, lines):
    file = tmp_path / "poems.txt"
    file.write_text("\n".join(lines), encoding="utf-8", newline="")
    try:
        poems = read_poems(str(file), "data.train_file")
    except InputError as error:
        assert "poems.txt" in str(error)
        return
    written = [line for line in (line.strip() for line in "\n".join(lines).splitlines()) if line]
    kept = [line for poem in poems for line in (str(poem.number), *poem.lines)]
    assert [line.lstrip("0") or "0" for line in written[len(written) - len(kept) :]] == [
        line.lstrip("0") or "0" for line in kept
    ]  # nothing between the first number and the end is lost


@fuzz
@given(st.binary(max_size=40))
def test_read_poems_any_bytes_are_read_or_refused(tmp_path, content):
    file = tmp_path / "poems.txt"
    file.write_bytes(content)
    try:
        read_poems(str(file), "data.train_file")
    except InputError as error:
        assert "poems.txt" in str(error)
