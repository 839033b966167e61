"""gpt2-pl classify: the same predictions as predict, for all file formats, in constant memory."""

import csv
import json
import subprocess
import sys

import datasets
import pytest
from conftest import ROOT

from gpt2_pl.datamodules.synthetic import toy_pairs

CONFIG = ROOT / "configs"


@pytest.fixture
def trained(run, base, pair_flags):
    """A run of a paraphrase detector with a tuned threshold."""
    settings = ["--data.max_length=48", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
                "--model.threshold=accuracy", "--trainer.precision=32-true",
                "--model.optimizer.init_args.lr=1e-3"]  # fmt: skip
    return run("fit", "--config", CONFIG / "task/quora.yaml", f"--model.base={base}", *pair_flags, *settings)


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


@pytest.mark.parametrize(
    ("ending", "out"), [(".csv", "o.csv"), (".tsv", "o.jsonl"), (".jsonl", "o.tsv"), (".parquet", "sub/o.csv")]
)
def test_classify_any_file_format_equals_predict(ending, out, trained, run, tmp_path, capsys):
    rows = [{k: row[k] for k in ("sentence1", "sentence2")} for row in toy_pairs(150, 9)]
    rows[3]["sentence1"] = 'with "quotes", commas and é'
    rows[5]["sentence2"] = "so long that it must be cut " * 9
    published = [{"question1": row["sentence1"], "question2": row["sentence2"]} for row in rows]
    predicted = run("predict", "--config", trained / "config.yaml", "--ckpt_path", trained / "checkpoints/best.ckpt",
                    f"--data.predict_file={write(tmp_path / 'plain.csv', rows)}")  # fmt: skip
    expected = table(predicted / "predictions_predict.csv")
    capsys.readouterr()
    run("classify", trained, "--input", write(tmp_path / f"new{ending}", published), "--out", tmp_path / out,
        "--precision", "32-true", "--batch_size", "2")  # fmt: skip
    assert capsys.readouterr().out.strip().endswith("150 rows")
    found = table(tmp_path / out)
    assert list(found[0]) == ["row", "sentence1", "sentence2", "prediction", "p(not_duplicate)", "p(duplicate)"]
    for a, b, row in zip(found, expected, rows, strict=True):
        assert (a["row"], a["prediction"]) == (b["row"], b["prediction"])
        assert (a["sentence1"], a["sentence2"]) == (row["sentence1"], row["sentence2"])
        assert float(a["p(duplicate)"]) == pytest.approx(float(b["p(duplicate)"]), abs=2e-6)
    assert len({row["prediction"] for row in found}) == 2


def test_classify_sentences_equals_test_predictions(run, base, data_flags, files, tmp_path):
    folder = run("fit", "--config", CONFIG / "task/imdb.yaml", "--config", CONFIG / "strategy/lora.yaml",
                 f"--model.base={base}", "--data.max_length=64", *data_flags, "--trainer.max_epochs=1")  # fmt: skip
    run("classify", folder, "--input", files["test"], "--out", tmp_path / "out.csv")
    predictions = table(tmp_path / "out.csv")
    tested = table(folder / "predictions_test.csv")
    assert [row["sentence"].strip() for row in predictions] == [row["text"] for row in tested]
    difference = [
        abs(float(a["p(positive)"]) - float(b["p(positive)"])) for a, b in zip(predictions, tested, strict=True)
    ]
    assert max(difference) < 2e-3  # in bfloat16 where the hardware likes that


def refused(run, capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        run("classify", *args)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_classify_invalid_input_is_refused_without_output_or_skipped(trained, run, capsys, base, data_flags, tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b"}] * 300 + [{"sentence1": "", "sentence2": "b"}]
    bad, out = write(tmp_path / "bad.csv", rows), tmp_path / "out.csv"
    assert "bad.csv, row 301: 'sentence1' must be a non-empty string, got ''" in refused(
        run, capsys, trained, "--input", bad, "--out", out
    )
    stray = tmp_path / "stray.csv"
    stray.write_text("sentence1,sentence2\na,b\na,b,c\nd,e\n")
    assert "stray.csv, row 2 cannot" in refused(run, capsys, trained, "--input", stray, "--out", out)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "a", "sen\n')
    assert "broken.jsonl" in refused(run, capsys, trained, "--input", broken, "--out", out)
    other = write(tmp_path / "other.csv", [{"sentence1": "a", "comment": "b"}])
    line = refused(run, capsys, trained, "--input", other, "--out", out)
    assert "no column 'sentence2'; it has 'sentence1', 'comment'" in line
    assert "nowhere.csv" in refused(run, capsys, trained, "--input", "nowhere.csv", "--out", out)
    assert "must be a file with one of the extensions" in refused(
        run, capsys, trained, "--input", bad, "--out", tmp_path / "out.xlsx"
    )
    assert "exists already" in refused(run, capsys, trained, "--input", bad, "--out", bad)
    assert "runs below it are" in refused(run, capsys, tmp_path, "--input", bad, "--out", out)
    assert not out.exists()

    run("classify", trained, "--input", bad, "--out", out, "--on_invalid_row", "skip")
    assert "300 rows; 1 invalid rows are skipped" in capsys.readouterr().out
    run("classify", trained, "--input", stray, "--out", tmp_path / "stray_out.csv", "--on_invalid_row", "skip")
    assert [row["row"] for row in table(tmp_path / "stray_out.csv")] == ["1", "3"]

    words = run("fit", "--config", CONFIG / "task/text.yaml", f"--model.base={base}", "--data.column=sentence",
                "--data.max_length=32", *data_flags, "--trainer.max_epochs=1")  # fmt: skip
    assert "LanguageModel" in refused(run, capsys, words, "--input", bad, "--out", tmp_path / "words.csv")


def test_classify_larger_file_uses_constant_memory(trained, tmp_path):
    peaks = []
    for n in (5_000, 40_000):  # more than is read at a time
        file = tmp_path / f"{n}.csv"
        with file.open("w") as lines:
            lines.write("sentence1,sentence2\n")
            lines.writelines(f"how do I fix the clock number {i}?,is it hard to repair clock {i}?\n" for i in range(n))
        # The peak of a child process alone: a process that starts it and asks.
        script = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        command = [sys.executable, str(ROOT / "cli.py"), "classify", str(trained), "--input", str(file),
                   "--out", str(tmp_path / f"{n}_out.csv")]  # fmt: skip
        done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024))
        assert sum(1 for _ in (tmp_path / f"{n}_out.csv").open()) == n + 1
    assert peaks[1] < peaks[0] + 80e6, peaks


def test_classify_quoting_equals_setting_of_training(run, base, pair_files, tmp_path):
    rows = tmp_path / "quotes.csv"
    rows.write_text('sentence1\tsentence2\na\tb\n"a3" x\tb3\n"a5\tb5\na6\tb6\n"a7" z\tb7\n')
    folder = run("fit", "--config", CONFIG / "task/quora.yaml", f"--model.base={base}", "--data.max_length=48",
                 f"--data.train_file={pair_files['train']}", f"--data.val_file={pair_files['val']}",
                 "--data.quoting=false", "--trainer.max_epochs=1")  # fmt: skip
    run("classify", folder, "--input", rows, "--out", tmp_path / "out.csv")
    found = [(row["row"], row["sentence1"]) for row in table(tmp_path / "out.csv")]
    assert found == [("1", "a"), ("2", '"a3" x'), ("3", '"a5'), ("4", "a6"), ("5", '"a7" z')]
    with pytest.raises(SystemExit):
        run("classify", folder, "--input", rows, "--out", tmp_path / "other.csv", "--quoting", "true")


def test_classify_out_below_a_file_is_refused_before_input_is_read(trained, run, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(run, capsys, trained, "--input", "nowhere.csv", "--out", tmp_path / "file" / "out.csv")
    assert "is not a folder" in line


def test_classify_row_without_tokens_is_refused_by_number_or_skipped(trained, run, tmp_path, capsys):
    file = trained / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "z"}, "content": ""}
    file.write_text(json.dumps(settings))
    rows = [{"sentence1": text, "sentence2": "the film"} for text in ("a film", "zz", "film z", "zzz")]
    classify = ("classify", trained, "--input", write(tmp_path / "in.csv", rows), "--out", tmp_path / "out.csv")
    with pytest.raises(SystemExit) as ended:
        run(*classify)
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "in.csv, row 2: the tokenizer gives no token for one of the texts 'zz', 'the film'" in line
    assert not (tmp_path / "out.csv").exists()
    run(*classify, "--on_invalid_row", "skip")
    assert capsys.readouterr().out.strip().endswith("2 rows; 2 invalid rows are skipped")
    assert [row["row"] for row in table(tmp_path / "out.csv")] == ["1", "3"]
    write(tmp_path / "in.csv", rows[1:2])
    with pytest.raises(SystemExit):
        run(
            "classify",
            trained,
            "--input",
            tmp_path / "in.csv",
            "--out",
            tmp_path / "none.csv",
            "--on_invalid_row",
            "skip",
        )
    assert "has no valid rows" in capsys.readouterr().err
    assert not (tmp_path / "none.csv").exists()
