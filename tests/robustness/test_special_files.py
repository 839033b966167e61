"""Files with unusual names, and special files."""

import os
from pathlib import Path

import pytest
from conftest import ROOT, metrics
from helpers.refusals import refused

IMDB = ["--config", ROOT / "configs/task/imdb.yaml", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]


@pytest.mark.parametrize("joined", [False, True])
def test_fit_data_file_with_unusual_name_is_read(joined, run, base, files, tmp_path):
    names = {"train": "-v.csv", "val": "#x.csv", "test": "a #b.csv"}
    flags = []
    for split, name in names.items():
        (tmp_path / name).write_bytes(files["val"].read_bytes())
        flags += [f"--data.{split}_file={name}"] if joined else [f"--data.{split}_file", name]
    folder = run("fit", *IMDB, f"--model.base={base}", "--data.max_length=32", *flags)
    assert {split: Path(file).name for split, file in metrics(folder)["data"]["files"].items()} == names


def test_fit_missing_file_with_unusual_name_is_named(run, base, files, capsys):
    more = [f"--model.base={base}", f"--data.train_file={files['train']}", "--data.max_length=32"]
    for flag, name in (
        ("--data.train_file", "-missing.csv"), ("--data.val_file", "#missing.csv"), ("--ckpt_path", "-missing.csv"),
        ("--ckpt_path", "#missing.csv"),
    ):  # fmt: skip
        line = refused(run, capsys, "fit", *IMDB, *more, flag, name)
        assert flag[2:] in line, flag
        assert f" {name}" in line, flag


def test_fit_flag_without_its_value_is_named(run, capsys):
    for rest in ([], ["--name", "x"]):
        assert "--data.train_file" in refused(run, capsys, "fit", *IMDB, "--data.train_file", *rest), rest


def test_commands_special_files_are_refused(run, base, files, capsys, tmp_path):
    """Devices, and a pipe without a writer."""
    os.mkfifo(tmp_path / "pipe.csv")
    train = [f"--model.base={base}", "--data.max_length=32", f"--data.train_file={files['train']}"]
    for name in ("/dev/null", "pipe.csv"):
        commands = {
            "data.train_file": ["fit", *IMDB, f"--model.base={base}", f"--data.train_file={name}"],
            "ckpt_path": ["fit", *IMDB, *train, f"--ckpt_path={name}"],
            "config": ["fit", "--config", name],
            "sweep": ["sweep", name],
            "out": ["generate", tmp_path, "--prompt_file", files["train"], "--out", name],
        }
        for key, command in commands.items():
            line = refused(run, capsys, *command)
            assert key in line, name
            assert name in line, key


def test_fit_duplicate_key_is_refused_with_file_and_line(run, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("trainer:\n  max_epochs: 1\n  accelerator: cpu\n  max_epochs: 2\n")
    line = refused(run, capsys, "fit", *IMDB, "--config", "mine.yaml")
    assert "mine.yaml, line 4: the key 'max_epochs'" in line
    assert "line 2" in line
    line = refused(run, capsys, "fit", *IMDB, "--trainer", "{max_epochs: 1, max_epochs: 2}")
    assert "--trainer, line 1: the key 'max_epochs'" in line
