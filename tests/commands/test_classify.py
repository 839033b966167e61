"""gpt2-pl classify: the same predictions as predict, for all file formats, in constant memory."""

import csv
import json
import shutil
import sys

import datasets
import numpy as np
import pytest
from conftest import ROOT, flags
from helpers import forked
from helpers.refusals import names, refused

import gpt2_pl
from gpt2_pl.commands import main
from gpt2_pl.datamodules.synthetic import toy_pairs

CONFIG = ROOT / "configs"


@pytest.fixture(scope="module")
def trained(fitted, base, pair_files):
    """A run of a paraphrase detector with a tuned threshold."""
    settings = ["--data.max_length=48", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
                "--model.threshold=accuracy", "--trainer.precision=32-true",
                "--model.optimizer.init_args.lr=1e-3"]  # fmt: skip
    return fitted("fit", "--config", CONFIG / "task/quora.yaml", f"--model.base={base}", *flags(pair_files), *settings)


@pytest.fixture(scope="module")
def sentences(fitted, base, files):
    """A run that classifies sentences, and its tested predictions."""
    return fitted("fit", "--config", CONFIG / "task/imdb.yaml", "--config", CONFIG / "strategy/lora.yaml",
                  f"--model.base={base}", "--data.max_length=64", *flags(files), "--trainer.max_epochs=1")  # fmt: skip


def table(file):
    if file.suffix == ".jsonl":
        return [{k: str(v) for k, v in json.loads(line).items()} for line in file.read_text().splitlines()]
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))


def write(file, rows):
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file


def test_classify_any_file_format_equals_predict(trained, run, tmp_path, capsys):
    rows = [{k: row[k] for k in ("sentence1", "sentence2")} for row in toy_pairs(60, 9)]
    rows[3]["sentence1"] = 'with "quotes", commas and é'
    rows[5]["sentence2"] = "so long that it must be cut " * 9
    published = [{"question1": row["sentence1"], "question2": row["sentence2"]} for row in rows]
    with_ids = [{**row, "id": f"{'x' if i else ''}{i}"} for i, row in enumerate(rows)]
    predicted = run("predict", "--config", trained / "config.yaml", "--ckpt_path", trained / "checkpoints/best.ckpt",
                    f"--data.predict_file={write(tmp_path / 'plain.csv', with_ids)}", "--data.keep=[id]")  # fmt: skip
    expected = table(predicted / "predictions_predict.csv")
    assert list(expected[0])[:3] == ["row", "id", "text"]
    assert [row["id"] for row in expected] == [row["id"] for row in with_ids]
    for ending, out in ((".csv", "o.csv"), (".tsv", "o.jsonl"), (".jsonl", "o.tsv"), (".parquet", "sub/o.csv")):
        capsys.readouterr()
        main(["classify", str(trained), f"--input={write(tmp_path / f'new{ending}', published)}",
              f"--out={tmp_path / out}", "--precision=32-true", "--batch_size=2"])  # fmt: skip
        assert capsys.readouterr().out.strip().endswith("60 rows")
        found = table(tmp_path / out)
        assert list(found[0]) == ["row", "sentence1", "sentence2", "prediction", "p(not_duplicate)", "p(duplicate)"]
        for a, b, row in zip(found, expected, rows, strict=True):
            assert (a["row"], a["prediction"]) == (b["row"], b["prediction"]), ending
            assert (a["sentence1"], a["sentence2"]) == (row["sentence1"], row["sentence2"]), ending
            assert float(a["p(duplicate)"]) == pytest.approx(float(b["p(duplicate)"]), abs=2e-6), ending
        assert len({row["prediction"] for row in found}) == 2
        (tmp_path / out).unlink()


def test_classify_sentences_equals_test_predictions(sentences, files, tmp_path):
    main(["classify", str(sentences), f"--input={files['test']}", f"--out={tmp_path / 'out.csv'}"])
    predictions = table(tmp_path / "out.csv")
    tested = table(sentences / "predictions_test.csv")
    assert [row["sentence"].strip() for row in predictions] == [row["text"] for row in tested]
    difference = [
        abs(float(a["p(positive)"]) - float(b["p(positive)"])) for a, b in zip(predictions, tested, strict=True)
    ]
    assert max(difference) < 2e-3  # in bfloat16 where the hardware likes that


@pytest.fixture
def classify(tmp_path, monkeypatch):
    """Classify in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: main(["classify", *map(str, args)])


def test_classify_invalid_input_is_refused_without_output_or_skipped(trained, classify, capsys, tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b"}] * 300 + [{"sentence1": "", "sentence2": "b"}]
    bad, out = write(tmp_path / "bad.csv", rows), tmp_path / "out.csv"
    stray = tmp_path / "stray.csv"
    stray.write_text("sentence1,sentence2\na,b\na,b,c\nd,e\n")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "a", "sen\n')
    other = write(tmp_path / "other.csv", [{"sentence1": "a", "comment": "b"}])
    for source, words in (
        (bad, ["bad.csv, row 301", "'sentence1'"]),
        (stray, ["stray.csv, row 2"]),
        (broken, ["broken.jsonl"]),
        (other, ["'sentence2'", "'comment'"]),
        ("nowhere.csv", ["nowhere.csv"]),
    ):
        line = refused(classify, capsys, trained, "--input", source, "--out", out)
        assert all(word in line for word in words), line
    line = refused(classify, capsys, trained, "--input", bad, "--out", tmp_path / "out.xlsx")
    assert "out.xlsx" in line
    assert names(line, "out")
    assert str(bad) in refused(classify, capsys, trained, "--input", stray, "--out", bad)
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "out.csv"
    assert str(tmp_path / "file") in refused(classify, capsys, trained, "--input", "nowhere.csv", "--out", below)
    assert str(tmp_path) in refused(classify, capsys, tmp_path, "--input", bad, "--out", out)
    assert not out.exists()

    classify(trained, "--input", bad, "--out", out, "--on_invalid_row", "skip")
    assert "300 rows; 1 invalid" in capsys.readouterr().out
    classify(trained, "--input", stray, "--out", tmp_path / "stray_out.csv", "--on_invalid_row", "skip")
    assert [row["row"] for row in table(tmp_path / "stray_out.csv")] == ["1", "3"]


def test_predict_chooses_columns_and_numbers_as_classify_does(trained, run, tmp_path, capsys):
    rows = [
        {"id": f"x{i}", "p(duplicate)": 1, **{k: row[k] for k in ("sentence1", "sentence2")}}
        for i, row in enumerate(toy_pairs(9, 9))
    ]
    source, out = write(tmp_path / "new.csv", rows), tmp_path / "out.csv"
    predict = ["predict", "--config", trained / "config.yaml", "--ckpt_path", trained / "checkpoints/best.ckpt",
               f"--data.predict_file={source}"]  # fmt: skip
    chosen = ["id", "prediction=label", "p(duplicate)"]
    folder = run(*predict, "--data.keep=[id]", "--data.predict_labels=numbers", f"--data.predict_columns={chosen}")
    main(["classify", str(trained), "--input", str(source), "--out", str(out), "--keep", "id", "--labels", "numbers",
          "--columns", *chosen])  # fmt: skip
    found, expected = table(folder / "predictions_predict.csv"), table(out)
    assert list(found[0]) == list(expected[0]) == ["id", "label", "p(duplicate)"]
    assert [(row["id"], row["label"]) for row in found] == [(row["id"], row["label"]) for row in expected]
    assert {row["label"] for row in found} <= {"0", "1"}
    for key, value, word in (
        ("predict_columns", "[id, predicton]", "predicton"),
        ("predict_columns", "[guess=prediction]", "did you mean prediction=guess?"),
        ("predict_columns", "[id, prediction=id]", "different names"),
        ("keep", "[prediction]", "'prediction'"),
        ("keep", "[id, id]", "twice"),
        ("keep", "['p(duplicate)']", "'p(duplicate)'"),
    ):
        keep = [] if key == "keep" else ["--data.keep=[id]"]
        line = refused(run, capsys, *predict, *keep, f"--data.{key}={value}")
        assert f"data.{key} must be" in line
        assert word in line
        assert not list(tmp_path.glob("lightning_logs/*/version_1"))
    line = refused(run, capsys, "classify", trained, "--input", source, "--out", tmp_path / "other.csv",
                   "--keep", "prediction", "--columns", "row", "prediction=x")  # fmt: skip
    assert "--keep must be other columns of the file, and 'prediction'" in line


def test_classify_calibrated_scales_probabilities_and_keeps_predictions(trained, classify, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    source = write(tmp_path / "new.csv", [{"sentence1": f"a {i}", "sentence2": "b"} for i in range(9)])
    line = refused(classify, capsys, run, "--input", source, "--out", tmp_path / "out.csv", "--calibrated")
    assert f"gpt2-pl inspect {run}" in line
    classify(run, "--input", source, "--out", tmp_path / "plain.csv")
    (run / "calibration.json").write_text('{"temperature": 2.5, "split": "val", "rows": 60}')
    classify(run, "--input", source, "--out", tmp_path / "scaled.csv", "--calibrated")
    columns = [name for name in table(tmp_path / "plain.csv")[0] if name.startswith("p(")]
    for row, scaled in zip(table(tmp_path / "plain.csv"), table(tmp_path / "scaled.csv"), strict=True):
        expected = np.array([float(row[name]) for name in columns]) ** (1 / 2.5)
        assert [float(scaled[name]) for name in columns] == pytest.approx(expected / expected.sum(), abs=1e-5)
        assert scaled["prediction"] == row["prediction"]
    best = run / "checkpoints/best.ckpt"
    args = (run, "--input", source, "--out", tmp_path / "out.csv", "--calibrated")
    assert names(refused(classify, capsys, *args, "--ckpt_path", best), "ckpt_path")
    for content in ('{"temperature": 0, "split": "val", "rows": 60}', '{"temperature": "x"}', "[]"):
        (run / "calibration.json").write_text(content)
        assert "calibration.json" in refused(classify, capsys, *args)


def test_classify_run_of_a_language_model_is_refused(run, base, files, data_flags, capsys, tmp_path):
    words = run("fit", "--config", CONFIG / "task/text.yaml", f"--model.base={base}", "--data.column=sentence",
                "--data.max_length=32", *data_flags, "--trainer.max_epochs=1",
                "--trainer.limit_train_batches=1")  # fmt: skip
    command = ["classify", words, "--input", files["test"], "--out", tmp_path / "words.csv"]
    assert "LanguageModel" in refused(run, capsys, *command)
    assert not (tmp_path / "words.csv").exists()


def test_classify_larger_file_uses_constant_memory(trained, tmp_path):
    peaks = []
    for n in (5_000, 20_000):  # more than is read at a time
        file = tmp_path / f"{n}.csv"
        with file.open("w") as lines:
            lines.write("sentence1,sentence2\n")
            lines.writelines(f"how do I fix the clock number {i}?,is it hard to repair clock {i}?\n" for i in range(n))
        script = tmp_path / "peak.py"
        script.write_text(
            "import resource, runpy, sys\n"
            "sys.argv = sys.argv[1:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        done = forked.run([script, ROOT / "cli.py", "classify", trained, "--input", file,
                           "--out", tmp_path / f"{n}_out.csv"], cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024))
        assert sum(1 for _ in (tmp_path / f"{n}_out.csv").open()) == n + 1
    print(peaks)
    assert peaks[1] < peaks[0] + 34e6, peaks  # two kilobytes a row


def test_classify_quoting_equals_setting_of_training(run, base, pair_files, tmp_path, capsys):
    rows = tmp_path / "quotes.csv"
    rows.write_text('sentence1\tsentence2\na\tb\n"a3" x\tb3\n"a5\tb5\na6\tb6\n"a7" z\tb7\n')
    folder = run("fit", "--config", CONFIG / "task/quora.yaml", f"--model.base={base}", "--data.max_length=48",
                 f"--data.train_file={pair_files['train']}", f"--data.val_file={pair_files['val']}",
                 "--data.quoting=false", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1")  # fmt: skip
    run("classify", folder, "--input", rows, "--out", tmp_path / "out.csv")
    found = [(row["row"], row["sentence1"]) for row in table(tmp_path / "out.csv")]
    assert found == [("1", "a"), ("2", '"a3" x'), ("3", '"a5'), ("4", "a6"), ("5", '"a7" z')]
    other = ["--out", tmp_path / "other.csv", "--quoting", "true"]
    assert "quotes.csv" in refused(run, capsys, "classify", folder, "--input", rows, *other)


def test_classify_row_without_tokens_is_refused_by_number_or_skipped(trained, classify, tmp_path, capsys):
    trained = shutil.copytree(trained, tmp_path / "run")
    file = trained / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "z"}, "content": ""}
    file.write_text(json.dumps(settings))
    rows = [{"sentence1": text, "sentence2": "the film"} for text in ("a film", "zz", "film z", "zzz")]
    args = (trained, "--input", write(tmp_path / "in.csv", rows), "--out", tmp_path / "out.csv")
    line = refused(classify, capsys, *args)
    assert "in.csv, row 2" in line
    assert "'zz'" in line
    assert not (tmp_path / "out.csv").exists()
    classify(*args, "--on_invalid_row", "skip")
    assert capsys.readouterr().out.strip().endswith("2 rows; 2 invalid rows are skipped")
    assert [row["row"] for row in table(tmp_path / "out.csv")] == ["1", "3"]
    write(tmp_path / "in.csv", rows[1:2])
    line = refused(classify, capsys, *args[:4], tmp_path / "none.csv", "--on_invalid_row", "skip")
    assert "in.csv" in line
    assert names(line, "input")
    assert not (tmp_path / "none.csv").exists()


def test_classify_equals_predict_in_python_bit_for_bit(trained, tmp_path, capsys):
    rows = [{k: row[k] for k in ("sentence1", "sentence2")} for row in toy_pairs(9, 9)]
    source, out = write(tmp_path / "new.csv", rows), tmp_path / "out.csv"
    main(["classify", str(trained), "--input", str(source), "--out", str(out)])
    expected = gpt2_pl.load(trained).predict_proba([tuple(row.values()) for row in rows])
    assert [row["p(duplicate)"] for row in table(out)] == [str(round(p, 6)) for p in expected[:, 1].tolist()]
