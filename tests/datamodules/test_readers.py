"""Readers of row files: literal file names, valid and invalid contents, and the time that they take."""

import csv
import itertools
import json
import os
import time
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, metrics
from helpers.row_files import ENDINGS, data, rows_of, texts, write

from gpt2_pl.commands.generate import read_prompts
from gpt2_pl.datamodules import QuoraPairs, TextCorpus
from gpt2_pl.datamodules.readers import read_file
from gpt2_pl.datamodules.rows import DatasetRows, require_columns
from gpt2_pl.datamodules.sonnets import read_poems
from gpt2_pl.errors import InputError

CONFIG = ROOT / "configs"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(file, **options):
    source = read_file(str(file), "data.train_file", **options)
    return [row for _, row in source.read(source.columns)]


# Names

NAMES = ["x[1]", "x[!a]", "t?", "t*", "**", "{a,b}", "a::b", "$HOME", "${HOME}", "%HOME%", "~", "~x", "~root",
         "with space", "new\nline", "tab\t", "é日", "http:", "http:/host/x", "s3:/bucket/x", "file:x", "zip:", "a#b",
         "%20", "\\x", "-x", "a&b;c", "d[1]/x", "d?/x", "a::b/x", "~/x"]  # fmt: skip
DECOYS = ["x1", "xb", "tt", "a", "b", "x", "a b", "d1/x", "dd/x", "bucket/x", "host/x"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_read_file_with_pattern_in_its_name_reads_that_file(ending, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in DECOYS:
        write(Path(name + ending), rows_of("another file"))
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(Path(name + ending), rows_of(f"in {name}"))
    for name in NAMES:
        for path in (name + ending, str(tmp_path / name) + ending):
            assert [row["sentence"] for row in read(path)] == [f"in {name}"]
    for name in ("x[1]", "t?", "d[1]/x", "a::b"):
        assert texts(data(base, name + ending)) == [f"in {name}"]
        corpus = TextCorpus(train_file=name + ending, val_file="t?" + ending, column="sentence", tokenizer=str(base))
        corpus.setup()
        decoded = corpus.tokenizer.decode(corpus.encoded["train"].values.tolist(), skip_special_tokens=False)
        assert f"in {name}" in decoded
        assert "another" not in decoded
    for name in NAMES:
        os.unlink(name + ending)
        with pytest.raises(InputError):
            read(name + ending)


def test_read_text_with_pattern_in_its_name_reads_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x1.txt", "x[1].txt", "~x.txt", "a::b.txt"):
        Path(name).write_text(f"1\n\nin {name}\n")
    for name in ("x[1].txt", "~x.txt", "a::b.txt"):
        assert [poem.lines for poem in read_poems(name, "f")] == [[f"in {name}"]]
        assert read_prompts(name, poems=False) == (["1", f"in {name}"], None)


def test_read_file_with_home_in_its_path_reads_the_users_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.csv", rows_of("at home"))
    assert read("~/x.csv")[0]["sentence"] == "at home"
    with pytest.raises(InputError, match=r"~nobody/x\.csv"):
        read("~nobody/x.csv")


def test_fit_with_patterns_in_names_reads_those_files_and_its_config_reads_back(run, base, tmp_path):
    for name in ("x[1].csv", "a\nb ~.csv", "a::b?.tsv"):
        write(tmp_path / name, rows_of(*(f"a film, the {i}th" for i in range(12))))
    write(tmp_path / "x1.csv", rows_of("one"))
    folder = run("fit", "--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", "--data.train_file=x[1].csv",
                 "--data.val_file=a\nb ~.csv", "--data.test_file=a::b?.tsv", "--data.label_column=label",
                 "--data.max_length=32", "--trainer.max_epochs=1")  # fmt: skip
    assert metrics(folder)["data"]["rows"] == {"train": 12, "val": 12, "test": 12}
    tested = run("validate", "--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/best.ckpt")
    assert metrics(tested)["scores"]["val/loss"] == metrics(folder)["scores"]["val/loss"]
    run("classify", folder, "--input", "x[1].csv", "--out", tmp_path / "out.csv")
    assert len(list(csv.DictReader((tmp_path / "out.csv").open()))) == 12


# Contents


def test_read_file_growing_while_read_is_refused(tmp_path):
    file = write(tmp_path / "rows.csv", rows_of(*("film" for _ in range(3000))))
    source = read_file(str(file), "data.train_file")
    rows = source.read(["sentence"])
    next(rows)
    with file.open("a") as lines:
        lines.write("film,1\n")
    with pytest.raises(InputError, match=r"rows\.csv changed"):
        list(rows)


def test_read_file_with_byte_order_marks_reads_the_same(tmp_path):
    for case in itertools.product([".csv", ".tsv", ".jsonl", ".json"], [1, 2, 3]):
        ending, marks = case
        file = write(tmp_path / f"rows{ending}", rows_of("film", "plot"))
        expected = read(file)
        file.write_bytes(b"\xef\xbb\xbf" * marks + file.read_bytes())
        assert read(file) == expected, case
        if ending == ".json":
            file.write_bytes(b"\xef\xbb\xbf" * marks + json.dumps(rows_of("film", "plot")).encode())
            assert read(file) == expected, case


def test_read_poems_and_prompts_with_byte_order_marks_keep_all_lines(tmp_path):
    file = tmp_path / "poems.txt"
    file.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbf1\n\na day\n\n2\n\na night\n")
    assert [(poem.number, poem.lines) for poem in read_poems(str(file), "f")] == [(1, ["a day"]), (2, ["a night"])]
    assert read_prompts(str(file), poems=False)[0] == ["1", "a day", "2", "a night"]
    file.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbf")
    with pytest.raises(InputError, match=r"poems\.txt"):
        read_poems(str(file), "f")
    for name in ("marks.csv", "marks.jsonl"):
        (tmp_path / name).write_bytes(file.read_bytes())
        with pytest.raises(InputError, match=name):
            read(tmp_path / name)


# Parquet

STRUCT = pa.struct([("as JSON", pa.string())])
NO_TEXT = {
    "struct": pa.array([{"as JSON": '"film"'}], STRUCT),
    "list": pa.array([["film"]]),
    "map": pa.array([[("a", "film")]], pa.map_(pa.string(), pa.string())),
    "binary": pa.array([b"film"]),
    "timestamp": pa.array([0], pa.timestamp("us")),
    "decimal": pa.array([Decimal("1.5")]),
    "date": pa.array([1], pa.date32()),
    "time": pa.array([1], pa.time32("s")),
    "null": pa.array([None]),
    "dictionary": pa.array([b"film"]).dictionary_encode(),
}
NUMBERS = {
    "int64": pa.array([1]),
    "double": pa.array([1.0]),
    "bool": pa.array([True]),
    "uint8": pa.array([1], pa.uint8()),
}


def test_setup_parquet_column_without_text_is_refused_by_row(base, tmp_path, subtests):
    file = tmp_path / "rows.parquet"
    for kind, values in (NO_TEXT | NUMBERS).items():
        with subtests.test(kind):
            pq.write_table(pa.table({"sentence": values, "label": pa.array([1])}), file)
            with pytest.raises(InputError, match=r"rows\.parquet, row 1: 'sentence'"):
                data(base, file).setup()
            words = "2 tokens" if kind == "null" else r"rows\.parquet, row 1: 'sentence' .*data\.column"
            with pytest.raises(InputError, match=words):
                TextCorpus(train_file=str(file), column="sentence", tokenizer=str(base)).setup()
            pq.write_table(pa.table({"sentence": pa.array(["film"]), "label": values}), file)
            if kind in NUMBERS:
                module = data(base, file, labels=["False", "True"] if kind == "bool" else None)
                assert texts(module) == ["film"]
                assert module.encoded["test"].labels.tolist() == [1]
            else:
                with pytest.raises(InputError, match=r"rows\.parquet, row 1: .*'label'"):
                    data(base, file).setup()


def test_setup_parquet_column_of_any_text_type_is_read(base, tmp_path):
    file, plain = tmp_path / "rows.parquet", pa.array(["film", "plot", "film"])
    kinds = [pa.string(), pa.large_string(), pa.string_view()]
    for words in (*map(plain.cast, kinds), plain.dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string()))):
        pq.write_table(pa.table({"sentence": words, "label": words, "a.b": words}), file)
        module = data(base, file, labels=["film", "plot"])
        assert texts(module) == ["film", "plot", "film"], words.type
        assert module.encoded["test"].labels.tolist() == [0, 1, 0], words.type
        renamed = data(base, file, labels=["film", "plot"], columns={"sentence": "a.b"})
        assert texts(renamed)[1] == "plot", words.type


def test_setup_json_value_of_wrong_type_is_refused_by_row(base, tmp_path, subtests):
    for value in ({"as JSON": '"film"'}, ["film"], 3, None, True):
        file = write(tmp_path / "rows.jsonl", [{"sentence": value, "label": 1}])
        with subtests.test(text=value), pytest.raises(InputError, match=r"rows\.jsonl, row 1.*'sentence'"):
            data(base, file).setup()
    for value in ({"as JSON": "1"}, [1], ["1"], None):
        file = write(tmp_path / "rows.jsonl", [{"sentence": "film", "label": value}])
        with subtests.test(label=value), pytest.raises(InputError, match=r"rows\.jsonl, row 1.*'label'"):
            data(base, file, labels=["x", "['1']"]).setup()


def test_read_file_parquet_without_rows_is_refused(base, tmp_path):
    file = tmp_path / "rows.parquet"
    empty = pa.table({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())})
    pq.write_table(empty, file)
    for read_it in (lambda: read(file), data(base, file).setup):
        with pytest.raises(InputError, match=r"rows\.parquet.*no rows"):
            read_it()
    pq.write_table(pa.table({}), file)
    with pytest.raises(InputError, match=r"rows\.parquet.*no rows"):
        read(file)


def test_read_file_parquet_duplicate_name_or_invalid_utf8_is_refused(base, tmp_path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["sentence", "sentence"]), file)
    with pytest.raises(InputError, match=r"'sentence' twice"):
        read(file)
    words = pa.array([b"film", b"gr\xfcn", b"plot"]).view(pa.string())
    pq.write_table(pa.table({"sentence": words, "label": pa.array([1, 1, 0])}), file)
    with pytest.raises(InputError, match=r"rows\.parquet, row 2 .*UTF-8"):
        data(base, file).setup()
    module = data(base, file, on_invalid_row="skip")
    with pytest.warns(match="1 of 3 rows are skipped: row 2 .*UTF-8"):
        assert texts(module) == ["film", "plot"]
    assert [module.row_number("test", i) for i in range(2)] == [1, 3]


def test_dataset_rows_are_read_as_those_of_files(base, monkeypatch):
    image = datasets.List(datasets.Value("int64"))
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": label, "image": image})
    rows = [{"sentence": f"film {i}", "label": i % 2, "image": [i]} for i in range(2500)]
    source = DatasetRows(datasets.Dataset.from_list(rows, features=features), "some/set (test)", "data.hub_id")
    with pytest.raises(InputError, match=r"some/set \(test\).*'picture'.*'image'"):
        require_columns(source, ["picture"])
    module = data(base, None, hub_id="some/set", test_file=None)
    monkeypatch.setattr(module, "_sources", lambda split: [source])
    module.setup("test")
    assert [row["sentence"] for row in module.rows["test"]] == [row["sentence"] for row in rows]
    assert module.encoded["test"].labels.tolist() == [row["label"] for row in rows]
    assert [module.row_number("test", i) for i in (0, 2499)] == [1, 2500]


# Time

HOSTILE = {
    "names": lambda n: "{" + ",".join(f'"k{i}":1' for i in range(n)) + f',"k{n - 1}":2}}',
    "nested names": lambda n: '{"a":[' + ",".join('{"b":1,"b":1}' for _ in range(n)) + "]}",
    "depth": lambda n: '{"sentence":' + "[" * n + "]" * n + "}",
    "depth of objects": lambda n: '{"a":' * n + "1" + "}" * n,
    "digits": lambda n: '{"sentence":"a","label":' + "9" * n + "}",
    "digits of a fraction": lambda n: '{"sentence":"a","label":0.' + "9" * n + "e999999999}",
    "digits of an exponent": lambda n: '{"sentence":"a","label":1e' + "9" * n + "}",
    "digits in text": lambda n: '{"sentence":"a","label":"' + "9" * n + '"}',
    "label of names": lambda n: '{"sentence":"a","label":{' + ",".join(f'"k{i}":1' for i in range(n)) + "}}",
    "escapes": lambda n: '{"sentence":"' + "\\ud800" * n + '"}',
}  # fmt: skip


def test_setup_hostile_json_is_refused_in_linear_time(base, tmp_path, subtests):
    file = tmp_path / "rows.jsonl"
    for kind, text in HOSTILE.items():
        with subtests.test(kind):
            file.write_text(text(200_000) + "\n")
            start = time.process_time()
            with pytest.raises(InputError, match=r"rows\.jsonl") as error:
                data(base, file).setup()
            assert time.process_time() - start < 5
            assert len(str(error.value)) < 1000


def test_setup_many_column_names_take_linear_time(base, tmp_path):
    """Read rows with distinct column names, which must not take time proportional to rows times names."""
    rows = [{"sentence": "film", "label": 1, **{f"k{i}_{j}": 1 for j in range(20)}} for i in range(3000)]
    file = write(tmp_path / "rows.jsonl", rows)
    start = time.process_time()
    assert len(texts(data(base, file))) == 3000
    assert time.process_time() - start < 5
    header = ",".join(f"k{i}" for i in range(30_000))
    (tmp_path / "wide.csv").write_text(f"{header}\n{header}\n")
    start = time.process_time()
    with pytest.raises(InputError, match=r"'sentence'.* and 29980 more") as error:
        data(base, tmp_path / "wide.csv").setup()
    assert time.process_time() - start < 5
    assert len(str(error.value)) < 1000


def test_read_file_unclosed_quote_is_refused_at_field_limit(tmp_path):
    file = tmp_path / "rows.csv"
    with file.open("w") as lines:
        lines.write('sentence,label\nfilm,1\n"film,1\n')
        for _ in range(80):
            lines.write("a film of some length,1\n" * 40_000)
    with pytest.raises(InputError, match=r"rows\.csv, row 2: .*field limit"):
        read(file)


def test_setup_any_batch_size_encodes_rows_as_one_by_one(base, tmp_path, monkeypatch):
    pairs = [{"sentence1": f"film {i} " * (i % 40 + 1), "sentence2": "plot", "is_duplicate": i % 2} for i in range(203)]
    file = write(tmp_path / "rows.jsonl", pairs)
    monkeypatch.setattr("gpt2_pl.datamodules.labelled._BATCH_ROWS", 50)
    monkeypatch.setattr("gpt2_pl.datamodules.labelled._BATCH_CHARACTERS", 2000)
    module = QuoraPairs(test_file=str(file), tokenizer=str(base), max_length=30)
    module.setup()
    rows = module.encoded["test"]
    for i, pair in enumerate(pairs):
        (ids,) = module.template.encode([pair], module.tokenizer, 30)
        assert rows.values[rows.offsets[i] : rows.offsets[i + 1]].tolist() == ids
        assert module.row_number("test", i) == i + 1
    assert np.array_equal(rows.labels, [pair["is_duplicate"] for pair in pairs])
