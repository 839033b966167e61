"""Data sets of one row, and checks of files before training."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics
from helpers.refusals import refused

from gpt2_pl.metrics import RowOutputs

CONFIG = ROOT / "configs"
POEM = "{0}\n\na day\na night\na star\nso bright\n\n"


def table(file):
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_row_outputs_one_or_two_rows_keep_shape_and_order():
    for n in (1, 2):
        metric = RowOutputs("row", "probability", "one")
        expected = {"row": torch.arange(n), "probability": torch.rand(n, 3), "one": torch.rand(n, 1)}
        metric.update(**{name: values.flip(0) for name, values in expected.items()})
        found = metric.rows()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), n


def one_row(folder, files, splits):
    """Copies of delimited files with the header and the first row, and flags that name them."""
    flags = []
    for split, file in files.items():
        lines = file.read_text().splitlines(keepends=True)
        copy = folder / f"one_{split}.csv"
        copy.write_text("".join(lines[:2] if split in splits else lines))
        flags.append(f"--data.{split}_file={copy}")
    return flags


@pytest.mark.parametrize("threshold", [pytest.param("0.5", marks=pytest.mark.slow), "f1"])
def test_fit_validation_and_test_of_one_row_are_scored_and_written(threshold, run, base, pair_files, tmp_path):
    flags = one_row(tmp_path, pair_files, ("val", "test"))
    folder = run("fit", "--config", CONFIG / "task/quora.yaml", f"--model.base={base}", *flags, "--data.max_length=48",
                 "--trainer.max_epochs=1", "--trainer.limit_train_batches=2",
                 f"--model.threshold={threshold}")  # fmt: skip
    for split in ("val", "test"):
        assert metrics(folder)["scores"][f"{split}/accuracy"] in (0.0, 1.0)
        (row,) = table(folder / f"predictions_{split}.csv")
        assert row["row"] == "1"
        assert float(row["p(duplicate)"]) + float(row["p(not_duplicate)"]) == pytest.approx(1.0, abs=2e-6)
    best = ["--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/best.ckpt"]
    predicted = run("predict", *best, f"--data.predict_file={tmp_path / 'one_test.csv'}")
    (prediction,) = table(predicted / "predictions_predict.csv")
    run("classify", folder, "--input", tmp_path / "one_test.csv", "--out", tmp_path / "out.csv")
    (classified,) = table(tmp_path / "out.csv")
    assert classified["prediction"] == prediction["prediction"] == row["prediction"]


def test_fit_validation_and_test_of_one_poem_are_scored_and_written(run, base, tmp_path):
    train, one = tmp_path / "train.txt", tmp_path / "empty.txt"
    train.write_text("".join(POEM.format(n) for n in range(5)))
    one.write_text(POEM.format(7))
    folder = run("fit", "--config", CONFIG / "task/sonnets.yaml", f"--model.base={base}", "--trainer.max_epochs=1",
                 f"--data.train_file={train}", f"--data.val_file={one}", f"--data.test_file={one}",
                 "--data.max_length=60", "--model.max_new_tokens=4")  # fmt: skip
    for split in ("val", "test"):
        (row,) = table(folder / f"losses_{split}.csv")
        assert row["poem"] == "7"
        assert int(row["n_tokens"]) > 1


BAD = {
    "no row": "sentence1\tsentence2\tis_duplicate\n",
    "no column": "sentence1\tis_duplicate\na\t1\n",
    "no label": "sentence1\tsentence2\tis_duplicate\na\tb\t1\na\tb\t7\n",
    "no text": "sentence1\tsentence2\tis_duplicate\na\t\t1\n",
    "no file": None,
}


def test_fit_invalid_file_of_any_split_is_refused_before_training(run, base, pair_files, capsys, tmp_path, subtests):
    bad = tmp_path / "bad.csv"
    splits = itertools.cycle(["test", "val", "train"])
    for (name, content), split in zip([*BAD.items(), ("no row", BAD["no row"])], splits, strict=False):
        with subtests.test(name, split=split):
            bad.unlink(missing_ok=True)
            if content is not None:
                bad.write_text(content)
            flags = [f"--data.{which}_file={file}" for which, file in {**pair_files, split: bad}.items()]
            quora = ["--config", CONFIG / "task/quora.yaml", f"--model.base={base}", *flags, "--data.max_length=48"]
            assert "bad.csv" in refused(run, capsys, "fit", *quora)
            assert not Path("lightning_logs").exists()


def test_fit_unusable_test_poems_or_text_are_refused_before_training(run, base, poem_files, files, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("1\n\nonly\ntwo lines\n")
    (tmp_path / "empty.txt").write_text("")
    settings = [f"--model.base={base}", "--trainer.max_epochs=1"]
    poems = ["--config", CONFIG / "task/sonnets.yaml", f"--data.train_file={poem_files['train']}",
             f"--data.val_file={poem_files['val']}", f"--data.test_file={tmp_path / 'short.txt'}",
             "--data.max_length=60"]  # fmt: skip
    text = ["--config", CONFIG / "task/text.yaml", "--data.column=sentence", "--data.max_length=32",
            f"--data.train_file={files['train']}", f"--data.test_file={tmp_path / 'empty.txt'}"]  # fmt: skip
    for more, words in (
        (poems, "poem 1"),
        (text, "is empty"),
    ):
        assert words in refused(run, capsys, "fit", *more, *settings)
        assert not Path("lightning_logs").exists()


def test_prepare_data_fewer_rows_than_processes_is_refused(base, pair_files, tmp_path, monkeypatch):
    from gpt2_pl.datamodules import QuoraPairs
    from gpt2_pl.errors import InputError

    data = QuoraPairs(**{f"{flag.partition('=')[0].partition('.')[2]}": flag.partition("=")[2]
                         for flag in one_row(tmp_path, pair_files, ("test",))}, tokenizer=str(base))  # fmt: skip
    monkeypatch.setattr(data, "_rank_and_world_size", lambda: (0, 2))
    with pytest.raises(InputError, match="got 1 rows for 2 processes"):
        data.prepare_data()
