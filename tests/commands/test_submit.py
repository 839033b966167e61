"""gpt2-pl submit: the files of CS224N's project "Build GPT-2", byte for byte, and its configurations."""

import csv

import pytest
import yaml
from conftest import ROOT, flags, metrics
from helpers.refusals import refused
from helpers.saved_runs import saved_run

import gpt2_pl
from gpt2_pl.commands import main
from gpt2_pl.datamodules import SST5, QuoraPairs
from gpt2_pl.datamodules.sonnets import read_poems
from gpt2_pl.tasks import ParaphraseDetector, SentimentClassifier
from gpt2_pl.text.tokenizer import load_tokenizer

COURSE = ROOT / "configs/course/cs224n"


def rows_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def with_ids(file, column, out):
    """Copy a tab-separated file with ids and without a column, as the course's test files are."""
    rows = [{"id": f"X{i}", **row} for i, row in enumerate(rows_of(file))]
    rows = [{key: value for key, value in row.items() if key != column} for row in rows]
    with out.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out


def submit_run(folder, task, data, **more):
    """A run of a course configuration, with its data in config.yaml."""
    settings = {"data": {"class_path": f"gpt2_pl.datamodules.{type(data).__name__}", "init_args": more}}
    saved_run(folder, task, data)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def course_settings(name):
    return yaml.safe_load((COURSE / f"{name}.yaml").read_text())["data"]["init_args"]


@pytest.mark.parametrize("mode", ["last-linear-layer", "full-model"])
def test_submit_sentiment_writes_ids_and_labels_of_dev_and_test(mode, base, files, tmp_path, capsys):
    dev, test = tmp_path / "dev.csv", with_ids(files["test"], "sentiment", tmp_path / "test.csv")
    lines = ["\tid\tsentence\tsentiment", "0\t A7d\t It 's FINE , buy it .\t3", '1\tB8\t"No, ""one"" goes"\t2']
    dev.write_text("\n".join(lines) + "\n")
    settings = course_settings("sst")
    data = SST5(val_file=str(dev), tokenizer=str(base), template=settings["template"], normalize=settings["normalize"])
    task = SentimentClassifier(base=str(base), train_base=mode == "full-model")
    run = submit_run(tmp_path / "run", task, data, val_file=str(dev), predict_file=str(test))
    main(["submit", str(run), "--format", "cs224n", "--out", str(tmp_path / "predictions")])
    model = gpt2_pl.load(run)
    for split, file in (("dev", dev), ("test", test)):
        rows = rows_of(file)
        labels = [model.labels.index(name) for name in model.predict([row["sentence"].lower() for row in rows])]
        lines = [f"{row['id'].strip().lower()}, {label} \n" for row, label in zip(rows, labels, strict=True)]
        content = (tmp_path / f"predictions/{mode}-sst-{split}-out.csv").read_bytes().decode()
        assert content == "id \t Predicted_Sentiment \n" + "".join(lines)
    assert content.count("\n") == 36
    again = ["submit", run, "--format", "cs224n", "--out", tmp_path / "predictions"]
    assert "exists already" in refused(lambda *args: main([*map(str, args)]), capsys, *again)


def test_submit_paraphrases_writes_token_ids_or_numbers(base, pair_files, tmp_path):
    settings = course_settings("quora")
    test = tmp_path / "test.csv"
    test.write_text("id\tsentence1\tsentence2\nQ1\tHow, why?\tA b\nq2\tonly one\nQ3\tthe  film\tThe film.\n")
    shared = {"template": settings["template"], "normalize": settings["normalize"]}
    dev = with_ids(pair_files["val"], "", tmp_path / "dev.csv")
    data = QuoraPairs(val_file=str(dev), tokenizer=str(base), **shared)
    task = ParaphraseDetector(base=str(base), train_base=True)
    more = {"val_file": str(dev), "predict_file": str(test), "on_invalid_row": settings["on_invalid_row"]}
    run = submit_run(tmp_path / "run", task, data, **more)
    pairs = [("how , why ?", "a b"), ("the film", "the film .")]
    model = gpt2_pl.load(run)
    classes = [model.labels.index(name) for name in model.predict(pairs)]
    main(["submit", str(run), "--format", "cs224n", "--out", str(tmp_path / "ids")])
    main(["submit", str(run), "--format", "cs224n", "--out", str(tmp_path / "numbers"), "--splits", "test",
          "--paraphrase_labels", "numbers"])  # fmt: skip
    tokens = [("3919", "8505")[index] for index in classes]
    expected = f"id \t Predicted_Is_Paraphrase \nq1, {tokens[0]} \nq3, {tokens[1]} \n"
    assert (tmp_path / "ids/para-test-output.csv").read_bytes() == expected.encode()
    assert (tmp_path / "ids/para-dev-output.csv").read_text().count("\n") == 34
    expected = f"id\tPredicted_Is_Paraphrase\nq1,{classes[0]}\nq3,{classes[1]}\n"
    assert (tmp_path / "numbers/para-test-output.csv").read_bytes() == expected.encode()
    assert [path.name for path in (tmp_path / "numbers").iterdir()] == ["para-test-output.csv"]


def test_fit_with_first_lines_as_test_poems_completes_and_submits_them(run, base, poem_files, tmp_path, capsys):
    openings = tmp_path / "held_out.txt"
    poems = read_poems(str(poem_files["test"]), "f")
    openings.write_bytes("".join(f"{p.number}\r\n\r\n" + p.opening(3).replace("\n", "\r\n") for p in poems).encode())
    folder = run("fit", "--config", "course/cs224n/sonnets", f"--model.base={base}", "--data.max_length=60",
                 *flags(poem_files)[:2], f"--data.test_file={openings}", "--trainer.max_epochs=1",
                 "--model.max_new_tokens=9")  # fmt: skip
    assert [name for name in metrics(folder)["scores"] if name.startswith("test/")] == []
    assert metrics(folder)["scores"]["val/perplexity"] > 1
    completed = read_poems(str(folder / "poems_test.txt"), "f")
    assert [(p.number, p.lines[:3]) for p in completed] == [(p.number, p.lines[:3]) for p in poems]
    assert not (folder / "losses_test.csv").exists()
    assert "target" in refused(run, capsys, "references", folder)
    main(["submit", str(folder), "--format", "cs224n", "--seed=2"])
    model = gpt2_pl.load(folder)
    for name, file in (("generated_sonnets", openings), ("generated_sonnets_dev", poem_files["val"])):
        expected = "--Generated Sonnets-- \n\n"
        for i, poem in enumerate(model.generate([p.opening(3) for p in read_poems(str(file), "f")], seed=2)):
            expected += f"\n{i}\n{poem.removesuffix(chr(10))}\n\n"
        assert (tmp_path / f"predictions/{name}.txt").read_bytes() == expected.encode()


def test_submit_invalid_runs_and_files_are_refused(run, base, files, tmp_path, capsys):
    data = SST5(val_file=str(files["val"]), tokenizer=str(base))
    made = submit_run(tmp_path / "run", SentimentClassifier(base=str(base)), data, val_file=str(files["val"]))
    command = ["submit", made, "--format=cs224n"]
    no_id = tmp_path / "no_id.jsonl"
    no_id.write_text('{"id": "a", "sentence": "the plot"}\n{"id": null, "sentence": "a film"}\n')
    for args, words in (
        ([], "--test is required"),
        (["--splits=dev", "--dataset=quora"], "number of classes"),
        (["--splits=dev", "--dataset=sonnets"], "completes poems"),
        (["--splits=dev", "--dev=nowhere.csv"], "--dev: there is no file nowhere.csv"),
        (["--splits=dev", f"--dev={files['val']}"], "--dev must be a file with the column id"),
        (["--splits=dev", f"--dev={no_id}"], f"{no_id}, row 2: id must be"),
        (["--format=other"], "format"),
    ):
        assert words in refused(run, capsys, *command, *args), args
    (made / "config.yaml").write_text("data: {class_path: mine.Data}")
    assert "--dataset" in refused(run, capsys, *command, "--splits=dev", f"--dev={files['val']}")
    assert "best.ckpt" in refused(run, capsys, "submit", base, "--format=cs224n")
    assert not (tmp_path / "predictions").exists()


def test_course_label_words_are_the_tokens_of_the_course(shared):
    tokenizer = load_tokenizer(shared / "tokenizer/gpt2")
    words = yaml.safe_load((COURSE / "quora.yaml").read_text())["model"]["init_args"]["label_words"]
    assert [tokenizer.encode(word).ids for word in words] == [[3919], [8505]]
