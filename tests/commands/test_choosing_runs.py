"""Selection of a run: --version of fit, RUN of the other commands."""

import pytest
from conftest import ROOT
from helpers.refusals import names, refused

QUICK = ["fit", "--config", ROOT / "configs/quickstart.yaml", "--data.n_train", "40", "--trainer.max_epochs", "1",
         "--name", "x", *(f"--trainer.limit_{split}_batches=1" for split in ("train", "val", "test"))]  # fmt: skip


def test_fit_version_number_or_name_names_the_folder(run, tmp_path, monkeypatch):
    monkeypatch.setattr("conftest.latest", lambda path: path)
    for version in ("3", "mine"):
        run(*QUICK, "--version", version)
    folders = {path.name for path in (tmp_path / "lightning_logs/x").iterdir() if not path.name.startswith(".")}
    assert folders == {"version_3", "mine"}


def test_fit_negative_version_is_refused(run, capsys):
    line = refused(run, capsys, *QUICK, "--version", "-1")
    assert names(line, "version")
    assert "-1" in line


@pytest.fixture
def folders(tmp_path):
    """A run folder with an empty checkpoint."""
    folder = tmp_path / "lightning_logs/x/version_0/checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.ckpt").write_bytes(b"")
    return folder


COMMANDS = {
    "classify": ["--input", "in.csv", "--out", "out.csv"],
    "generate": ["--prompt_file", "in.txt", "--out", "out.txt"],
    "export": ["--format", "hf", "--out", "out"],
}


def test_commands_missing_run_error_suggests_existing_run(folders, run, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("a film\n")
    for command, args in COMMANDS.items():
        for path, words in {
            "lightning_logs/x/version_1": "did you mean lightning_logs/x/version_0?",
            "lightning_logs/x": "lightning_logs/NAME/version_N",
            "-1": "there is no folder",
            "nowhere/version_0": "there is no folder",
        }.items():
            line = refused(run, capsys, command, path, *args)
            assert words in line, (command, path)
            assert path in line, (command, path)
    line = refused(run, capsys, "compare", "lightning_logs/x/version_1", "--out", "out")
    assert "did you mean lightning_logs/x/version_0?" in line
