"""Files with unusual names, and special files."""

import os
from pathlib import Path

import pytest
from conftest import ROOT, metrics
from helpers.refusals import refused

IMDB = ["--config", ROOT / "configs/task/imdb.yaml", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", ["-v.csv", "#x.csv", "a #b.csv"])
def test_fit_data_file_with_unusual_name_is_read(name, joined, run, base, files, tmp_path):
    (tmp_path / name).write_bytes(files["train"].read_bytes())
    flag = [f"--data.train_file={name}"] if joined else ["--data.train_file", name]
    more = [f"--model.base={base}", "--data.max_length=32", f"--data.val_file={files['val']}"]
    folder = run("fit", *IMDB, *more, *flag, "--trainer.limit_val_batches=1")
    assert Path(metrics(folder)["data"]["files"]["train"]).name == name


@pytest.mark.parametrize("flag", ["--data.train_file", "--data.val_file", "--ckpt_path"])
@pytest.mark.parametrize("name", ["-missing.csv", "#missing.csv"])
def test_fit_missing_file_with_unusual_name_is_named(flag, name, run, base, files, capsys):
    more = [f"--model.base={base}", f"--data.train_file={files['train']}", "--data.max_length=32"]
    assert f"{flag[2:]}: there is no file {name}" in refused(run, capsys, "fit", *IMDB, *more, flag, name)


@pytest.mark.parametrize("rest", [[], ["--name", "x"]])
def test_fit_flag_without_its_value_is_named(rest, run, capsys):
    line = refused(run, capsys, "fit", *IMDB, "--data.train_file", *rest)
    assert "error: --data.train_file needs a value" in line


@pytest.fixture(params=["/dev/null", "/dev/full", "pipe.csv"])
def special(request, tmp_path):
    """A device or a pipe without a writer, and its description."""
    if request.param == "pipe.csv":
        os.mkfifo(tmp_path / "pipe.csv")
    return request.param, "a pipe" if request.param == "pipe.csv" else "a device"


def test_commands_special_files_are_refused_with_their_kind(special, run, base, files, capsys, tmp_path):
    name, kind = special
    train = [f"--model.base={base}", "--data.max_length=32", f"--data.train_file={files['train']}"]
    commands = {
        "data.train_file": ["fit", *IMDB, f"--model.base={base}", f"--data.train_file={name}"],
        "ckpt_path": ["fit", *IMDB, *train, f"--ckpt_path={name}"],
        "config": ["fit", "--config", name],
        "sweep": ["sweep", name],
        "out": ["generate", tmp_path, "--prompt_file", files["train"], "--out", name],
    }
    for key, command in commands.items():
        line = refused(run, capsys, *command)
        assert f"{key}: {name} is {kind}, not a regular file" in line


def test_fit_duplicate_key_is_refused_with_file_and_line(run, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("trainer:\n  max_epochs: 1\n  accelerator: cpu\n  max_epochs: 2\n")
    line = refused(run, capsys, "fit", *IMDB, "--config", "mine.yaml")
    assert "mine.yaml, line 4: the key 'max_epochs' is given twice, first in line 2" in line
    line = refused(run, capsys, "fit", *IMDB, "--trainer", "{max_epochs: 1, max_epochs: 2}")
    assert "--trainer, line 1: the key 'max_epochs' is given twice" in line
