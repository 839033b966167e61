"""Unusable arguments of Lightning's and torch's classes: one-line errors that name the key."""

import json
import sys
import types

import pytest
from conftest import ROOT, weights
from helpers.refusals import names, refused
from lightning.pytorch.callbacks import Callback

QUICK = ["fit", "--config", ROOT / "configs/quickstart.yaml", "--data.n_train", "40", "--trainer.max_epochs", "1"]
SHORT = [f"--trainer.limit_{split}_batches=1" for split in ("train", "val", "test")]


def test_fit_class_failing_at_first_use_error_names_key_and_class(run, capsys):
    for flags, words in (
        ("logger CSVLogger save_dir=x flush_logs_every_n_steps=0",
         ["trainer.logger: CSVLogger", "ZeroDivision"]),
        ("logger TensorBoardLogger save_dir=x dict_kwargs={foo:1}", ["trainer.logger: TensorBoardLogger", "'foo'"]),
        ("callbacks+ ModelSummary max_depth=-5", ["trainer.callbacks: ModelSummary", "-5"]),
        ("callbacks+ ModelCheckpoint filename={x", ["trainer.callbacks: ModelCheckpoint", "ValueError"]),
        ("callbacks+ EarlyStopping monitor=nope", ["trainer.callbacks: EarlyStopping", "nope", "val/loss"]),
        ("strategy DDPStrategy process_group_backend=foo", ["trainer.strategy: DDPStrategy", "backend type foo"]),
    ):  # fmt: skip
        key, name, *arguments = flags.split()
        shown = [f"--trainer.{key.removesuffix('+')}.{one}".replace(":1", ": 1") for one in arguments]
        line = refused(run, capsys, *QUICK, *SHORT, f"--trainer.{key}={name}", *shown)
        assert all(word in line for word in words), (flags, line)


def test_fit_class_without_required_arguments_is_refused_in_one_line(run, capsys):
    for flag, words in {
        "--trainer.callbacks+=ModelPruning": ["ModelPruning", "--trainer.callbacks.pruning_fn VALUE"],
        "--trainer.callbacks=[{class_path: EarlyStopping}]": ["EarlyStopping", "monitor"],
        "--trainer.plugins=TransformerEnginePrecision": ["TransformerEnginePrecision", "weights_dtype"],
        "--trainer.plugins=[MixedPrecision]": ["MixedPrecision", "precision, device"],
        "--trainer.logger=CSVLogger": ["CSVLogger", "save_dir"],
        "--model.surgery+=gpt2_pl.surgery.PeftAdapter": ["PeftAdapter", "folder"],
    }.items():
        line = refused(run, capsys, *QUICK, flag)
        assert names(line, flag.partition("=")[0].strip("-+")), flag
        assert all(word in line for word in words), (flag, line)
        assert len(line) < 250


def test_fit_plugin_without_its_package_error_names_package(run, capsys):
    line = refused(run, capsys, *QUICK, "--trainer.plugins=lightning.pytorch.plugins.environments.MPIEnvironment")
    assert "mpi4py" in line
    assert "subclass" not in line


class Faulty(Callback):
    """A callback of the user's own with a fault in its code."""

    def on_train_start(self, *_):
        """Fail."""
        raise KeyError("own fault")


def test_fit_exception_in_own_callback_is_raised_unchanged(run, monkeypatch):
    module = types.ModuleType("own_faults")
    module.Faulty = Faulty
    monkeypatch.setitem(sys.modules, "own_faults", module)
    monkeypatch.setattr(Faulty, "__module__", "own_faults")
    callbacks = json.dumps([{"class_path": "own_faults.Faulty"}])
    with pytest.raises(KeyError, match="own fault"):
        run(*QUICK, *SHORT, f"--trainer.callbacks+={callbacks}")


@pytest.mark.parametrize(("plugins", "dtype"), [("HalfPrecision", "float16"), ("[DoublePrecision]", "float64")])
def test_fit_precision_plugin_replaces_default_precision(plugins, dtype, run):
    precision = ["--trainer.precision=null", f"--trainer.plugins={plugins}"]
    folder = run("fit", *QUICK[1:], *SHORT, *precision, "--data.template=null")
    assert {str(tensor.dtype) for tensor in weights(folder / "checkpoints/last.ckpt").values()} == {f"torch.{dtype}"}
