"""Data files of arbitrary bytes: read as Python's csv and json modules do, or refused with an error that names them."""

import csv
import gzip
import io
import json
import math

import datasets
import pytest
from helpers.fuzzing import cells, fuzz, scalars
from helpers.refusals import refusal
from hypothesis import given
from hypothesis import strategies as st

from gpt2_pl.datamodules.readers import read_file
from gpt2_pl.datamodules.sonnets import read_poems
from gpt2_pl.errors import InputError

HEADER = "sentence,sentiment\n"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Put the dataset cache into a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def read(folder, name, content, skip_bad=False, **options):
    """Return the rows of a file and the reasons for skipped rows by number, or None if the file is refused by name."""
    file = folder / name
    file.write_bytes(content)
    try:
        source = read_file(str(file), "data.train_file", **options)
        found, again = (list(source.read(source.columns, skip_bad)) for _ in range(2))
    except InputError as error:
        assert name in str(error)
        assert "data.train_file" in str(error)
        return None
    assert repr(found) == repr(again)
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    skipped = {number: row for number, row in found if isinstance(row, str)}
    return [row for number, row in found if number not in skipped], skipped


def by_csv(content, delimiter):
    """Return the rows of Python's csv module without blank lines, or None if the text is invalid or ragged."""
    try:
        text = content.decode("utf-8-sig")
        header, *records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except (ValueError, csv.Error):
        return None
    blank = [record for record in records if len(record) == 1 and record[0] and not record[0].strip(" \t")]
    if blank and len(header) == 1:
        return None
    records = [record for record in records if record and record not in blank]
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
    if not all(len(record) == len(names) for record in records):
        return None
    return [dict(zip(names, record, strict=True)) for record in records]


# Delimited text

tables = st.lists(st.tuples(cells.map(lambda text: f"{text}x"), cells), min_size=1, max_size=5)


@fuzz
@given(tables, st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_read_file_csv_writer_output_is_read_back(tmp_path, rows, delimiter, end, marked):
    out = io.StringIO(newline="")
    table = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    table.writerows([("sentence", 'the "label",\n;'), *rows])
    content = out.getvalue().encode("utf-8-sig" if marked else "utf-8")
    found, skipped = read(tmp_path, "rows.csv", content)
    assert found == by_csv(content, delimiter)
    assert [tuple(row.values()) for row in found] == rows
    assert not skipped


@fuzz
@given(tables, st.sampled_from(",;\t"), st.sampled_from(["utf-8", "utf-16", "latin-1", "cp1252"]), st.data())
def test_read_file_damaged_csv_equals_csv_module_or_is_refused(tmp_path, rows, delimiter, encoding, data):
    lines = [delimiter.join(("sentence", "label")), *(delimiter.join(row) for row in rows)]
    content = bytearray("\n".join(lines).encode(encoding, errors="replace"))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b'"', b"\0", b"\xff", b"\n\n", b"\r", delimiter.encode(), b" ", b'""', b"\xef\xbb\xbf"])
        )
    found = read(tmp_path, "rows.csv", bytes(content))
    if found is not None:
        assert found[0] in [by_csv(bytes(content), delimiter) for delimiter in ",;\t"]


@fuzz
@given(st.binary(max_size=60), st.sampled_from([".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet"]))
def test_read_file_arbitrary_bytes_equal_csv_module_or_are_refused(tmp_path, content, ending):
    found = read(tmp_path, f"rows{ending}", content)
    if found is not None:
        assert ending != ".parquet"
        if not ending.startswith(".json"):
            assert found[0] in [by_csv(content, delimiter) for delimiter in ",;\t"]


@fuzz
@given(st.lists(st.sampled_from(["good,1", "bad", "a,b,c", "\xff,1", ' ,"', "", "fine,0"]), min_size=1, max_size=8))
def test_read_file_skip_bad_omits_bad_rows_and_keeps_numbers(tmp_path, lines):
    content = (HEADER + "\n".join(lines)).encode("latin-1")
    found = read(tmp_path, "rows.csv", content, skip_bad=True, quoting=False)
    numbered = dict(enumerate((line for line in lines if line), start=1))
    good = {n: line.split(",") for n, line in numbered.items() if line.count(",") == 1 and "\xff" not in line}
    if not good:
        assert found is None
        return
    assert [list(row.values()) for row in found[0]] == list(good.values())
    assert found[1].keys() == numbered.keys() - good.keys()


BAD_CSV = [  # contents of a file, and a part of the message
    ((HEADER + "good,1\n").encode("utf-16"), "UTF-8"),
    ((HEADER + "good,1\n").encode("utf-16-be"), "NUL"),
    ("sätze,wert\ngut,1\n".encode("latin-1"), "UTF-8"),
    (gzip.compress(HEADER.encode(), mtime=0), "UTF-8"),
    (b"\nsentence,sentiment\ngood,1\n", "blank"),
    (b'"sentence,sentiment\ngood,1\n', "quote"),
    (HEADER.encode() + b"x" * 1_000_000 + b"\n", "row 1"),
    (b"sentence,sentence\na,b\n", "'sentence' twice"),
]


def rows_of(file, skip_bad=False):
    return list(read_file(str(file), "data.train_file").read(["sentence"], skip_bad))


def test_read_file_invalid_csv_is_refused_with_the_reason(tmp_path):
    file = tmp_path / "rows.csv"
    for content, words in BAD_CSV:
        file.write_bytes(content)
        error = refusal(rows_of, file, case=content)
        assert str(file) in str(error), content[:50]
        assert words in str(error), content[:50]


def test_read_file_blank_row_of_single_column_is_refused_or_reported(tmp_path):
    for blank in (b"   ", b" \t ", b'" "'):
        content = b"sentence\na\n" + blank + b"\n\nb\n\n"
        assert read(tmp_path, "rows.csv", content) is None
        found, skipped = read(tmp_path, "rows.csv", content, skip_bad=True)
        assert [row["sentence"] for row in found] == ["a", "b"]
        assert list(skipped) == [2]
    found, skipped = read(tmp_path, "rows.csv", b"sentence,label\na,1\n   \n\nb,0\n")
    assert (len(found), skipped) == (2, {})


def test_read_file_line_of_a_megabyte_is_read(tmp_path):
    for name, content in (
        ("rows.csv", HEADER + "x" * 1_000_000 + ",1\ny,0\n"),
        ("rows.jsonl", json.dumps({"sentence": "x" * 1_000_000}) + '\n{"sentence": "y"}\n'),
    ):
        found, _ = read(tmp_path, name, content.encode())
        assert [len(row["sentence"]) for row in found] == [1_000_000, 1]


def test_read_file_truncated_parquet_is_refused(tmp_path, capfd):
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"sentence": "a" * 50, "sentiment": 1}] * 50).to_parquet(file)
    whole = file.read_bytes()
    capfd.readouterr()
    for n in (4, 20, len(whole) // 2, len(whole) - 1):
        assert read(tmp_path, "rows.parquet", whole[:n]) is None
    assert capfd.readouterr().err == ""


def test_read_file_and_read_poems_invalid_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(HEADER.encode()))
    for name in ("folder.csv", "x" * 400 + ".csv", "~nobody/rows.csv", "a\0b.csv", "rows.csv.gz"):
        assert "data.train_file" in str(refusal(read_file, name, "data.train_file")), name
        if not name.endswith(".gz"):
            assert "data.train_file" in str(refusal(read_poems, name, "data.train_file")), name


# JSON lines

values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner)
)
objects = st.dictionaries(st.sampled_from(["sentence", "label", "type", "message", "date"]), values, max_size=4)


def same(a, b):
    """Return whether two values are equal in type and value, NaN included."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@fuzz
@given(
    st.lists(st.dictionaries(st.sampled_from(["sentence", "label", "type", "date"]), scalars, min_size=1), min_size=1),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.sampled_from(["lines", "array"]),
)
def test_read_file_json_equals_the_json_module(tmp_path, rows, ascii_only, end, how):
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = end.join(lines) + end if how == "lines" else f"[{','.join(lines)}]"
    found, skipped = read(tmp_path, "rows.jsonl", text.encode())
    names = dict.fromkeys(name for row in rows for name in row)
    assert not skipped
    assert all(map(same, found, [{name: row.get(name) for name in names} for row in rows]))
    assert len(found) == len(rows)


@fuzz
@given(st.lists(objects, min_size=1, max_size=4), st.data())
def test_read_file_damaged_json_equals_json_module_or_is_refused(tmp_path, rows, data):
    content = bytearray("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b'"', b"\0", b"\xff", b"\n", b"\r", b"{", b"]", b"9" * 30, b"\\ud800", b",", b" "])
        )
    found = read(tmp_path, "rows.jsonl", bytes(content))
    if found is None:
        return
    expected = [json.loads(line) for line in bytes(content).split(b"\n") if line.strip()]
    if len(expected) == 1 and isinstance(expected[0], list):
        (expected,) = expected
    names = dict.fromkeys(name for row in expected for name in row)
    assert all(map(same, found[0], [{name: row.get(name) for name in names} for row in expected]))
    assert len(found[0]) == len(expected)


BAD_LINES = [  # a line of JSON, and a part of the message
    (b"[1, 2]", "object"),
    (b'"text"', "object"),
    (b'{"sentence": "a", "sentence": "b"}', "'sentence' twice"),
    (b'{"sentence": "a\\ud800"}', "UTF-8"),
    (b'{"sentence": "a\xff"}', "UTF-8"),
    (b'{"sentence": ' + b"[" * 5000 + b"]" * 5000 + b"}", "deep"),
    (b'{"sentence": "a", "label": ' + b"9" * 5000 + b"}", "digits"),
    (b'{"sentence": "a"', "row 3"),
]


def test_read_file_invalid_json_line_is_named_or_skipped(tmp_path):
    file = tmp_path / "rows.jsonl"
    for line, words in BAD_LINES:
        file.write_bytes(b'{"sentence": "fine"}\n\n{"sentence": "fine"}\n' + line + b"\n")
        error = refusal(rows_of, file, case=line)
        assert "rows.jsonl, row 3" in str(error), line[:50]
        assert words in str(error), line[:50]
        rows = rows_of(file, skip_bad=True)
        assert rows[:2] == [(1, {"sentence": "fine"}), (2, {"sentence": "fine"})], line[:50]
        assert [(number, type(row)) for number, row in rows[2:]] == [(3, str)], line[:50]
