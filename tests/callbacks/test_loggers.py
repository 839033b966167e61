"""Folder and files of a run with every kind of logger."""

import json
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, latest, metrics
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

QUICK = ["--config", ROOT / "configs/quickstart.yaml", "--data.n_train", "80", "--trainer.max_epochs", "1"]
PNGS = {f"confusion_{split}.png" for split in ("train", "val", "test")}
FILES = {"checkpoints", "config.yaml", "metrics.json", "predictions_test.csv", "predictions_val.csv", "tokenizer.json",
         "weight_digests.json"}  # fmt: skip


class StubWandb(Logger):
    """A logger with the interface of WandbLogger: an experiment, a project name, an id as version, no ``log_dir``."""

    logged: dict = {}

    def __init__(self, project: str = "project", offline: bool = True) -> None:
        super().__init__()
        self.project, self.offline = project, offline
        type(self).logged = {}

    @property
    def name(self):
        return self.project

    @property
    def version(self):
        return "a1b2c3"

    @property
    def save_dir(self):
        return "wandb"

    @property
    @rank_zero_experiment
    def experiment(self):
        return types.SimpleNamespace(id="a1b2c3")

    def log_metrics(self, metrics, step=None):
        self.logged.update(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """Register the stub where a class path finds it."""
    stub = types.ModuleType("own_loggers")
    stub.StubWandb = StubWandb
    monkeypatch.setitem(sys.modules, "own_loggers", stub)
    monkeypatch.setattr(StubWandb, "__module__", "own_loggers")


@pytest.mark.parametrize(
    "logger",
    [
        pytest.param(
            {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}},
            marks=pytest.mark.slow,
        ),
        [
            {"class_path": "own_loggers.StubWandb"},
            {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "board"}},
        ],
    ],
    ids=["csv", "several"],
)
def test_fit_own_logger_writes_all_run_files(run, capsys, tmp_path, logger):
    folder = run("fit", *QUICK, "--trainer.logger", json.dumps(logger), "--name", "own")
    assert folder == tmp_path / "lightning_logs/own/version_0"
    assert {path.name for path in folder.iterdir()} >= FILES
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert metrics(folder)["status"] == "finished"
    out = capsys.readouterr().out
    assert "fit finished: lightning_logs/own/version_0" in out
    assert ("tensorboard --logdir" in out) == isinstance(logger, list)
    if isinstance(logger, dict):  # it takes no images
        assert {path.name for path in folder.iterdir()} >= PNGS
    else:
        assert {"val/accuracy", "test/accuracy", "train/loss"} <= StubWandb.logged.keys()
    # the commands that a run prints
    run("test", "--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/best.ckpt")
    assert metrics(latest(tmp_path))["scores"]["test/accuracy"] == metrics(folder)["scores"]["test/accuracy"]
    more = ["--ckpt_path", folder / "checkpoints/last.ckpt", "--trainer.max_epochs", "2"]
    run("fit", "--config", folder / "config.yaml", *more)
    assert [epoch["epoch"] for epoch in metrics(folder)["epochs"]] == [1, 2]


class BareLogger(Logger):
    """A logger with only the members that Lightning requires."""

    @property
    def name(self):
        return None

    @property
    def version(self):
        return None

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class WandbRun:
    """A stand-in for the run that ``wandb.init`` returns."""

    id, name = "a1b2c3", "a name"

    def __init__(self):
        self.history, self.config = [], {}

    def log(self, values):
        self.history.append(values)

    def logged(self, key):
        return [(values[key], values["trainer/global_step"]) for values in self.history if key in values]


@pytest.fixture
def wandb_run(monkeypatch):
    """Stub the part of the package wandb that Lightning's WandbLogger uses."""
    wandb_run, modules = WandbRun(), {name: types.ModuleType(name) for name in ("wandb", "wandb.sdk.lib")}
    wandb = modules["wandb"]
    wandb.run, wandb.init = None, lambda **settings: wandb_run
    wandb.Image = lambda image: np.asarray(image)
    wandb.Table = lambda columns, data, dataframe: (columns, data)
    modules["wandb.wandb_run"] = types.SimpleNamespace(Run=WandbRun)
    modules["wandb.sdk.lib"].RunDisabled = WandbRun
    modules["wandb.sdk"] = types.ModuleType("wandb.sdk")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return wandb_run


@pytest.mark.usefixtures("drawn_images")
def test_fit_wandb_logger_receives_settings_scores_images_and_text(run, wandb_run, tmp_path, capsys):
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True, "save_dir": "w"}}
    folder = run("fit", *QUICK, "--trainer.logger", json.dumps(logger), "--name", "own")
    assert folder == tmp_path / "lightning_logs/own/version_0"
    assert {path.name for path in folder.iterdir()} == FILES
    assert "lightning_logs/own/version_0/checkpoints/best.ckpt" in capsys.readouterr().out
    for split in ("train", "val", "test"):
        (image, step), *_ = wandb_run.logged(f"{split}/confusion")
        assert image[0].shape == (600, 700, 3)
        assert step == metrics(folder)["steps"]
    (layers, _), *_ = wandb_run.logged("layers")
    assert layers[0] == ["text"]
    assert "block.0" in layers[1][0][0]
    assert wandb_run.config["data.n_train"] == 80
    assert wandb_run.logged("trainable_parameters")
    assert wandb_run.logged("test/accuracy")[-1][0] == metrics(folder)["scores"]["test/accuracy"]


@pytest.mark.parametrize("kind", ["bare", "board and bare"])
def test_fit_loggers_without_image_support_write_png_files(run, monkeypatch, kind):
    monkeypatch.setattr(sys.modules["own_loggers"], "BareLogger", BareLogger, raising=False)
    monkeypatch.setattr(BareLogger, "__module__", "own_loggers")
    bare = {"class_path": "own_loggers.BareLogger"}
    loggers = {
        "bare": bare,
        "board and bare": [
            bare,
            {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "a board"}},
        ],
    }
    folder = run("fit", *QUICK, "--trainer.logger", json.dumps(loggers[kind]), "--name", "own")
    found = {path.name for path in folder.glob("*.png")}
    if kind != "board and bare":
        assert found == PNGS
        assert imread(folder / "confusion_val.png").shape[:2] == (600, 700)
        return
    assert not found
    board = EventAccumulator(str(next(Path("a board").rglob("version_0")))).Reload()
    assert {"val/confusion", "train/confusion", "test/confusion"} <= set(board.Tags()["images"])


def test_fit_names_with_spaces_printed_commands_are_quoted_and_run(run, tmp_path, capsys):
    board = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "a board"}}
    run("fit", *QUICK, "--trainer.logger", json.dumps(board), "--name", "my own run")
    lines = dict(line.split(":  ", 1) for line in capsys.readouterr().out.splitlines() if ":  " in line)
    assert shlex.split(lines["TensorBoard"]) == ["tensorboard", "--logdir", "a board"]
    program, *command = shlex.split(lines["Evaluate"])
    assert program == "gpt2-pl"
    scored = run(*command)
    assert scored == tmp_path / "lightning_logs/my own run/version_1"
    assert metrics(scored)["scores"]["test/loss"] > 0


def test_fit_logger_false_existing_checkpoint_is_refused_by_path(run, tmp_path, capsys):
    fit = ["fit", *QUICK, "--trainer.logger", "false"]
    with pytest.raises(ValueError, match="empty"):  # no run folder
        run(*fit)
    out = capsys.readouterr().out
    assert "fit finished; trainer.logger is false: there is no run folder" in out
    before = (tmp_path / "checkpoints/best.ckpt").read_bytes()
    with pytest.raises(SystemExit):
        run(*fit)
    error = capsys.readouterr().err
    assert "trainer.logger: false" in error
    assert "checkpoints/best.ckpt exists already" in error
    assert (tmp_path / "checkpoints/best.ckpt").read_bytes() == before
    with pytest.raises(ValueError, match="empty"):
        run(*fit, "--ckpt_path", "checkpoints/last.ckpt", "--trainer.max_epochs", "2")
    assert (tmp_path / "checkpoints/last.ckpt").is_file()


def test_fit_logger_and_checkpointing_false_create_no_run_folder(run, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        run("fit", *QUICK, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
    assert not (tmp_path / "lightning_logs").exists()
