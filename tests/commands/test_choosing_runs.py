"""Selection of a run: --version of fit, RUN of the other commands."""

import pytest
from conftest import ROOT
from helpers.refusals import refused

QUICK = ["fit", "--config", ROOT / "configs/quickstart.yaml", "--data.n_train", "40", "--trainer.max_epochs", "1",
         "--name", "x", *(f"--trainer.limit_{split}_batches=1" for split in ("train", "val", "test"))]  # fmt: skip


@pytest.mark.parametrize(("version", "folder"), [("3", "version_3"), ("version_4", "version_4"), ("mine", "mine")])
def test_fit_version_number_names_the_folder_of_the_default_kind(version, folder, run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conftest.latest", lambda path: path)
        run(*QUICK, "--version", version)
    assert [path.name for path in (tmp_path / "lightning_logs/x").iterdir() if not path.name.startswith(".")] == [
        folder
    ]


def test_fit_negative_version_is_refused(run, capsys):
    line = refused(run, capsys, *QUICK, "--version", "-1")
    assert "version must be a whole number of at least 0 or the name of a folder, got -1" in line


@pytest.fixture
def folders(tmp_path):
    """A run folder with an empty checkpoint."""
    folder = tmp_path / "lightning_logs/x/version_0/checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.ckpt").write_bytes(b"")
    return folder


@pytest.mark.parametrize("command", ["classify", "generate", "export"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("lightning_logs/x/0", "RUN: there is no folder lightning_logs/x/0; did you mean lightning_logs/x/version_0?"),
        ("lightning_logs/x/version_1", "did you mean lightning_logs/x/version_0?"),
        ("lightning_logs/x", "x has no checkpoints/best.ckpt; runs below it are lightning_logs/x/version_0"),
        ("-1", "RUN: there is no folder -1; the folder of a run is lightning_logs/NAME/version_N"),
        ("nowhere/version_0", "there is no folder nowhere/version_0; the folder of a run is lightning_logs/"),
    ],
)  # fmt: skip
def test_commands_missing_run_error_suggests_existing_run(command, path, words, folders, run, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("a film\n")
    args = {"classify": ["--input", "in.csv", "--out", "out.csv"],
            "generate": ["--prompt_file", "in.txt", "--out", "out.txt"],
            "export": ["--format", "hf", "--out", "out"]}[command]  # fmt: skip
    assert words in refused(run, capsys, command, path, *args)


def test_compare_missing_run_error_suggests_existing_run(folders, run, capsys):
    line = refused(run, capsys, "compare", "lightning_logs/x/0", "--out", "out")
    assert "there is no folder lightning_logs/x/0; did you mean lightning_logs/x/version_0?" in line
