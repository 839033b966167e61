"""Trainer settings that a task cannot use: one-line errors before any data are read."""

import logging
import warnings
from importlib.util import find_spec

import pytest
import torch
from helpers.configs import CONFIGS
from helpers.refusals import names, refused
from helpers.stops import TINY

from gpt2_pl.commands import main
from gpt2_pl.commands.support.training_checks import check_optimizer
from gpt2_pl.errors import InputError

SST5 = ["--config", CONFIGS / "task/sst5.yaml", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
NO_VALIDATION = "--trainer.limit_val_batches=0"


def callback(name, **arguments):
    return f"--trainer.callbacks=[{{class_path: {name}, init_args: {arguments}}}]"


UNUSABLE = [  # settings, and parts of the line
    (["--trainer.max_epochs=0"], ["trainer.max_epochs", "0"]),
    (["--trainer.max_steps=0"], ["trainer.max_steps", "0"]),
    (["--trainer.limit_train_batches=0"], ["trainer.limit_train_batches", "0"]),
    ([callback("BackboneFinetuning")], ["gpt2_pl.callbacks.GradualUnfreezing"]),
    ([callback("ModelPruning", pruning_fn="l1_unstructured", amount=0.1)], ["ModelPruning", "weights"]),
    ([callback("ModelCheckpoint", filename="best")], ["checkpoints/best.ckpt"]),
    ([callback("ModelCheckpoint", save_last="link")], ["checkpoints/last.ckpt"]),
    ([callback("EarlyStopping", monitor="val/loss"), NO_VALIDATION], ["EarlyStopping", "val/loss"]),
    ([callback("ModelCheckpoint", monitor="val/loss"), NO_VALIDATION], ["ModelCheckpoint", "val/loss"]),
    (["--trainer.strategy=ddp_spawn", "--trainer.devices=2"], ["trainer.strategy", "spawn"]),
    (["--trainer.strategy=ddp_fork", "--trainer.devices=2"], ["trainer.strategy", "fork"]),
    (["--trainer.strategy=ddp_notebook", "--trainer.devices=2"], ["trainer.strategy", "fork"]),
]  # fmt: skip


def test_fit_unusable_trainer_setting_is_refused_before_training(run, capsys, tmp_path):
    for settings, words in UNUSABLE:
        line = refused(run, capsys, *TINY, *settings)
        assert all(word in line for word in words), (settings, line)
    assert not list(tmp_path.glob("lightning_logs/*/*/metrics.json"))


def test_fit_two_settings_of_accumulation_are_refused_in_one_line(run, capsys):
    scheduler = callback("GradientAccumulationScheduler", scheduling={0: 2})
    line = refused(run, capsys, *TINY, scheduler, "--trainer.accumulate_grad_batches=2")
    assert names(line, "trainer.callbacks")
    assert "accumulate_grad_batches" in line


def test_fit_monitor_that_is_not_logged_is_refused_in_one_line(run, capsys):
    for name in ("EarlyStopping", "ModelCheckpoint"):
        with pytest.raises(SystemExit) as ended:
            run(*TINY, callback(name, monitor="val/acc"))
        assert ended.value.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(words in line for words in ("trainer.callbacks", name, "val/acc", "val/accuracy")), line


def test_fit_fraction_below_one_batch_is_refused_before_training(run, base, data_flags, capsys, tmp_path):
    rows = ["fit", *SST5, f"--model.base={base}", "--data.max_length=40", "--data.labels=['0', '1']", *data_flags]
    for key in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"):
        line = refused(run, capsys, *rows, f"--trainer.{key}=0.01")
        assert names(line, f"trainer.{key}")
        assert "0.01" in line
    assert not list(tmp_path.rglob("*.ckpt"))


LACKS_A_PACKAGE = """
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

class Watch(Callback):
    def __init__(self, depth: int = 1):
        import no_such_package

class Log(CSVLogger):
    def __init__(self, save_dir: str = "logs"):
        raise ModuleNotFoundError("Requirement 'no_such_package>=1.0' not met.\\nTry pip install")
"""


def test_fit_class_that_cannot_be_instantiated_is_named_in_one_line(run, capsys, tmp_path):
    (tmp_path / "lacking.py").write_text(LACKS_A_PACKAGE)
    for setting, words in {
        "--trainer.logger=lacking.Log":
            ["trainer.logger", "lacking.Log", "lacking.py, line 11", "no_such_package>=1.0", "Try pip install"],
        "--trainer.callbacks=[lacking.Watch]":
            ["trainer.callbacks", "lacking.Watch", "lacking.py, line 7", "no_such_package"],
        callback("Timer", duration="x"): ["trainer.callbacks", "lightning.pytorch.callbacks.Timer", "'x'"],
    }.items():  # fmt: skip
        line = refused(run, capsys, *TINY, setting)
        assert all(word in line for word in words), line
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="the package is installed")
def test_fit_precision_without_its_package_is_refused_in_one_line(run, capsys):
    assert "transformer_engine" in refused(run, capsys, *TINY, "--trainer.precision=transformer-engine")


class Closure(torch.optim.SGD):
    """An optimizer that requires a closure."""

    def step(self, closure):
        return closure()


def test_check_optimizer_unusable_optimizer_is_refused():
    for optimizer, words in (
        (torch.optim.LBFGS, "LBFGS"),
        (torch.optim.SparseAdam, "SparseAdam"),
        (Closure, "Closure"),
        (lambda groups: torch.optim.Adam(groups, lr=-1), "learning rate"),
    ):
        with pytest.raises(InputError, match=words) as error:
            check_optimizer(optimizer)
        assert names(error.value, "model.optimizer"), words


def test_check_optimizer_other_torch_optimizers_are_accepted():
    for name in ("Adafactor", "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop",
                 "Rprop", "SGD", *(["Muon"] if hasattr(torch.optim, "Muon") else [])):  # fmt: skip
        check_optimizer(getattr(torch.optim, name))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_fit_optimizer_refusing_parameter_shapes_is_refused_in_one_line(run, capsys):
    line = refused(run, capsys, *TINY, "--model.optimizer=torch.optim.Muon")
    assert names(line, "model.optimizer")
    assert "Muon" in line


@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar"])
def test_fit_own_progress_bar_replaces_default_one(name, run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(
        "gpt2_pl.commands.lightning_cli.GPT2CLI._run_subcommand", lambda self, _: made.append(self.trainer)
    )
    main([*map(str, TINY), callback(f"lightning.pytorch.callbacks.{name}")])
    (trainer,) = made
    assert type(trainer.progress_bar_callback).__name__ == name
    assert not any(type(one).__name__ in ("EpochLines", "RunProgressBar") for one in trainer.callbacks)
    line = refused(
        run, capsys, *TINY, callback(f"lightning.pytorch.callbacks.{name}")
    )  # with enable_progress_bar false
    assert "enable_progress_bar=False" in line


def test_main_library_tips_and_deprecations_are_not_shown(caplog):
    trainer_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def speak(self, _):
        trainer_log.info("💡 Tip: try installing [litmodels]")
        trainer_log.info("something of the run")
        for category in (DeprecationWarning, FutureWarning):
            warnings.warn_explicit("old", category, "fit_loop.py", 1, module="lightning.pytorch.loops")
            warnings.warn_explicit("own", category, "mine.py", 1, module="mine")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as shown:
        patch.setattr("gpt2_pl.commands.lightning_cli.GPT2CLI._run_subcommand", speak)
        warnings.simplefilter("always")
        main([*map(str, TINY), "--trainer.logger=false", "--trainer.enable_checkpointing=false"])
    assert "Tip" not in caplog.text
    assert "something of the run" in caplog.text
    assert [str(one.message) for one in shown if str(one.message) in ("old", "own")] == ["own", "own"]
