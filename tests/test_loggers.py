"""A run's folder and files are the same whatever its loggers are."""

import json
import sys
import types

import pytest
from conftest import ROOT, latest, metrics
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment

QUICK = ["--config", ROOT / "configs/quickstart.yaml", "--data.n_train", "80", "--trainer.max_epochs", "1"]
FILES = {"checkpoints", "config.yaml", "metrics.json", "predictions_test.csv", "predictions_val.csv", "tokenizer.json"}


class StubWandb(Logger):
    """As WandbLogger presents itself: an experiment, a project's name, an id for a version, and no ``log_dir``."""

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
    """The stub, where a class path finds it."""
    stub = types.ModuleType("own_loggers")
    stub.StubWandb = StubWandb
    monkeypatch.setitem(sys.modules, "own_loggers", stub)
    monkeypatch.setattr(StubWandb, "__module__", "own_loggers")


@pytest.mark.parametrize(
    "logger",
    [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}},
        {"class_path": "own_loggers.StubWandb"},
        [
            {"class_path": "own_loggers.StubWandb"},
            {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "board"}},
        ],
    ],
    ids=["csv", "wandb", "several"],
)
def test_run_with_own_logger_leaves_the_files_of_a_run(run, capsys, tmp_path, logger):
    folder = run("fit", *QUICK, "--trainer.logger", json.dumps(logger), "--name", "own")
    assert folder == tmp_path / "lightning_logs/own/version_0"
    assert {path.name for path in folder.iterdir()} >= FILES
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert metrics(folder)["status"] == "finished"
    out = capsys.readouterr().out
    assert "fit is done: lightning_logs/own/version_0" in out
    assert ("tensorboard --logdir" in out) == isinstance(logger, list)
    if "csv" not in json.dumps(logger).lower():
        assert {"val/accuracy", "test/accuracy", "train/loss"} <= StubWandb.logged.keys()
    # the commands that a run prints
    run("test", "--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/best.ckpt")
    assert metrics(latest(tmp_path))["scores"]["test/accuracy"] == metrics(folder)["scores"]["test/accuracy"]
    more = ["--ckpt_path", folder / "checkpoints/last.ckpt", "--trainer.max_epochs", "2"]
    run("fit", "--config", folder / "config.yaml", *more)
    assert [epoch["epoch"] for epoch in metrics(folder)["epochs"]] == [1, 2]


def test_run_without_logger_leaves_no_folder(run, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        run("fit", *QUICK, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
    assert not (tmp_path / "lightning_logs").exists()
