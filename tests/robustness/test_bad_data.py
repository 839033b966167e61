"""Data files of arbitrary bytes: read as Python's csv and json modules do, or refused with an error that names them."""

import csv
import gzip
import io
import json
import math
import re
from datetime import timedelta

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2_pl.datamodules import IMDB, TextClassification, TextCorpus
from gpt2_pl.datamodules.readers import parse_label, read_file
from gpt2_pl.datamodules.sonnets import read_poems
from gpt2_pl.errors import InputError

fuzz = settings(
    max_examples=60,
    deadline=timedelta(seconds=5),
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HEADER = "sentence,sentiment\n"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Put the dataset cache into a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def read(folder, name, content, **options):
    """Return the rows of a file and the reasons for skipped rows by number, or None if the file is refused by name."""
    file = folder / name
    file.write_bytes(content)
    try:
        source = read_file(str(file), "data.train_file", **options)
        found, again = (list(source.read(source.columns)) for _ in range(2))
    except InputError as error:
        assert name in str(error)
        assert "data.train_file" in str(error)
        assert len(str(error).splitlines()) == 1
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

cells = st.text(st.sampled_from("ab é日\"\t,;\n\r\0\x1c\x85\u2028'#\\"), max_size=6)
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((HEADER + "good,1\n").encode("utf-16"), "the header is not UTF-8 text"),
        ((HEADER + "good,1\n").encode("utf-16-be"), "NUL"),
        ("sätze,wert\ngut,1\n".encode("latin-1"), "the header is not UTF-8 text"),
        (gzip.compress(HEADER.encode(), mtime=0), "the header is not UTF-8 text"),
        (b"\nsentence,sentiment\ngood,1\n", "the first line is blank"),
        (b'"sentence,sentiment\ngood,1\n', "a double quote in the header is not closed"),
        (HEADER.encode() + b"x" * 1_000_000 + b"\n", "row 1 cannot be read: it must have 2 values, got 1"),
        (b"sentence,sentence\na,b\n", "'sentence' twice in the header"),
    ],
)
def test_read_file_invalid_csv_is_refused_with_the_reason(content, words, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        list(read_file(str(file), "data.train_file").read(["sentence"]))


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


@pytest.mark.parametrize("name", ["folder.csv", "x" * 400 + ".csv", "~nobody/rows.csv", "a\0b.csv", "rows.csv.gz"])
def test_read_file_and_read_poems_invalid_path_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(HEADER.encode()))
    with pytest.raises(InputError, match=r"data\.train_file"):
        read_file(name, "data.train_file")
    if not name.endswith(".gz"):
        with pytest.raises(InputError, match=r"data\.train_file"):
            read_poems(name, "data.train_file")


# JSON lines

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(["2020-01-01", "2020-01-01 10:00:00", "007", "1e5", "NaN", "null", "true", ""])
)
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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[1, 2]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"3", "not a JSON object"),
        (b'{"sentence": "a", "sentence": "b"}', "has the key 'sentence' twice"),
        (b'{"sentence": "a\\ud800"}', "not UTF-8"),
        (b'{"sentence": "a\xff"}', "not UTF-8"),
        (b'{"sentence": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b'{"sentence": "a", "label": ' + b"9" * 25 + b"}", "must fit in 64 bits"),
        (b'{"sentence": "a", "label": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"sentence": "a"', "row 3 cannot be read"),
    ],
    ids=range(10),
)
def test_read_file_invalid_json_line_is_named_or_skipped(line, words, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"sentence": "fine"}\n\n{"sentence": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"rows\.jsonl, row 3 .*{words}|rows\.jsonl, {words}"):
        list(read_file(str(file), "data.train_file").read(["sentence"]))
    rows = list(read_file(str(file), "data.train_file", skip_bad=True).read(["sentence"]))
    assert rows[:2] == [(1, {"sentence": "fine"}), (2, {"sentence": "fine"})]
    assert [(number, type(row)) for number, row in rows[2:]] == [(3, str)]


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
    with pytest.raises(InputError, match=r"rows\.jsonl, row 2: 'sentence' must be a non-empty string, got 3"):
        IMDB(test_file=str(file), tokenizer=str(base)).setup()
    data = IMDB(test_file=str(file), tokenizer=str(base), on_invalid_row="skip")
    data.setup()
    assert [data.text("test", i) for i in range(3)] == ["fine", "0", "bad"]
    assert [data.row_number("test", i) for i in range(3)] == [1, 3, 5]
    assert data.encoded["test"].labels.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="'sentence' must be text, got 3"):
        TextCorpus(train_file=str(file), column="sentence", tokenizer=str(base)).setup()


def test_imdb_row_without_tokens_is_named_or_skipped(base, tmp_path):
    settings = json.loads((base / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "z"}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    file = tmp_path / "rows.csv"
    file.write_text("sentence,sentiment\nfine,1\nzzz,0\nbad,0\n")
    with pytest.raises(InputError, match=r"rows\.csv, row 2: the tokenizer gives no token for the text 'zzz'"):
        IMDB(test_file=str(file), tokenizer=str(tmp_path), on_invalid_row="error").setup()
    data = IMDB(test_file=str(file), tokenizer=str(tmp_path), on_invalid_row="skip")
    with pytest.warns(UserWarning, match=r"1 of 3 rows are skipped: row 2: the tokenizer gives no token"):
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
        assert str(error).startswith("rows.csv, row 7: the label in 'label' must be")


@pytest.mark.parametrize(
    ("names", "value", "expected"),
    [
        ("1 2 3 4 0", "4.0", 3), ("1 2 3 4 0", "0.0", 4), ("1 2 3 4 5", 1.0, 0), ("1 2 3 4 5", "0", None),
        ("-1 0 1", "1.0", 2), ("-1 0 1", -1.0, 0), ("-1 0 1", "2", None), ("0.5 1.5", "1.50", 1),
        ("1 1.0", "1.00", None),
        ("none 1 2", "2.0", 2), ("none 1 2", "0", None), ("no yes", "0_1", None), ("no yes", "\u0967", None),
        ("no yes", "-0", None), ("no yes", "1e0", None), ("no yes", "01", 1), ("1 2", "\u0967", None),
    ],
)  # fmt: skip
def test_parse_label_numeric_names_are_not_taken_as_indices(names, value, expected):
    names = names.split()
    if expected is None:
        with pytest.raises(InputError, match="row 1: the label in 'label' must be"):
            parse_label({"label": value}, "label", names, "rows.csv", 1)
    else:
        assert parse_label({"label": value}, "label", names, "rows.csv", 1) == expected


@pytest.mark.parametrize("label", ["", "3", "-1", "1.5", "nan", "good", "1,", "0x1"])
def test_imdb_invalid_label_in_row_1001_is_named(label, base, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(HEADER + "good,1\n" * 1000 + f'bad,"{label}"\n' + "good,1\n" * 10)
    with pytest.raises(InputError, match=r"rows\.csv, row 1001: the label in 'sentiment'"):
        IMDB(train_file=str(file), val_file=str(file), tokenizer=str(base)).setup()


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
