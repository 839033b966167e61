"""User-defined strategies and tasks on the command line: names of classes, faults in them, and what is imported."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import yaml
from conftest import ROOT, metrics, started
from helpers.classifiers import IDS, logits
from helpers.refusals import refused
from transformers import GPT2ForSequenceClassification

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.run import plugins_of
from gpt2_pl.surgery import Surgery, build
from gpt2_pl.tasks import SentimentClassifier, Task

MINE = """
import lightning.pytorch as pl
import torch
from dataclasses import dataclass
from gpt2_pl.datamodules import IMDB
from gpt2_pl.surgery import Surgery
from gpt2_pl.tasks import SentimentClassifier

class Focal(SentimentClassifier):
    def __init__(self, gamma: float = 2.0, **kwargs):
        super().__init__(**kwargs)
        self.gamma = gamma
        self.save_hyperparameters("gamma")

@dataclass
class BitFit(Surgery):
    also: str = "bias"
    def apply(self, model, tokenizer=None):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(("bias", self.also)))
        return model

class Count(pl.Callback):
    def on_fit_end(self, trainer, pl_module):
        with open("counted", "w") as file:
            file.write(str(sum(p.numel() for p in pl_module.backbone.parameters() if p.requires_grad)))

class Shouting(IMDB):
    def __init__(self, loud: bool = True, **kwargs):
        super().__init__(**kwargs)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Create a user module with a unique name in the working directory, not imported yet."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MINE)
    yield name
    for module in set(sys.modules) - before:
        if module.startswith("mine_"):
            del sys.modules[module]


def forget(module):
    """Unload a module and its classes, as if in a new process."""
    del sys.modules[module]
    for root in (Task, Surgery):
        for path in [path for path in root._classes if path.startswith(f"{module}.")]:
            del root._classes[path]


@pytest.fixture
def fit(run, base, data_flags):
    def fit(*args):
        return run("fit", "--config", ROOT / "configs/task/imdb.yaml", f"--model.base={base}", *data_flags,
                   "--data.max_length=24", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4",
                   "--trainer.accelerator=cpu", *args)  # fmt: skip

    return fit


def test_commands_custom_task_and_callback_train_test_resume_classify(fit, run, mine, tmp_path, files, capsys):
    own = [f"--model={mine}.Focal", "--model.gamma=1.5", f"--trainer.callbacks+={mine}.Count"]
    folder = fit(*own, f"--data={mine}.Shouting", "--data.loud=false", "--name=task")
    assert (tmp_path / "counted").is_file()
    forget(mine)
    run("test", "--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/best.ckpt")
    forget(mine)
    resumed = ["fit", "--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/last.ckpt"]
    run(*resumed, "--trainer.max_epochs=2")
    assert [epoch["epoch"] for epoch in metrics(folder)["epochs"]] == [1, 2]
    capsys.readouterr()
    forget(mine)
    classify = ["classify", folder, "--input", files["test"], "--out", tmp_path / "predictions.csv"]
    for command in (classify, ["test", "--data=gpt2_pl.datamodules.IMDB", f"--data.test_file={files['test']}",
                           f"--ckpt_path={folder}/checkpoints/best.ckpt"]):  # fmt: skip
        line = refused(run, capsys, *command)
        assert f"'{mine}.Focal'" in line
        assert "--plugin" in line
    assert mine not in sys.modules
    run(*classify, "--plugin", mine)
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 36


def test_commands_custom_strategy_is_tested_resumed_and_exported(fit, run, mine, tmp_path, capsys):
    surgery = f"--model.surgery+={{class_path: {mine}.BitFit, init_args: {{also: ln_1.weight}}}}"
    folder = fit(surgery, "--name=bitfit")
    task = SentimentClassifier.load_from_checkpoint(folder / "checkpoints/last.ckpt")
    trained = {name for name, p in task.backbone.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in task.backbone.named_parameters() if n.endswith(("bias", "ln_1.weight"))}
    assert metrics(folder)["parameters"]["trainable"] == sum(p.numel() for p in task.parameters() if p.requires_grad)
    forget(mine)
    best = folder / "checkpoints/best.ckpt"
    run("test", "--config", folder / "config.yaml", "--ckpt_path", best)
    forget(mine)
    last = ["--ckpt_path", folder / "checkpoints/last.ckpt", "--trainer.max_epochs=2"]
    run("fit", "--config", folder / "config.yaml", *last)
    assert [epoch["epoch"] for epoch in metrics(folder)["epochs"]] == [1, 2]
    forget(mine)
    capsys.readouterr()
    out = ["export", folder, "--format=hf", "--out", tmp_path / "hf"]
    line = refused(run, capsys, *out)
    assert f"'{mine}.BitFit'" in line
    assert "--plugin" in line
    run(*out, f"--plugin={mine}")
    run_of_best = SentimentClassifier.load_from_checkpoint(best)
    peer = GPT2ForSequenceClassification.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert torch.allclose(peer.eval()(IDS).logits, logits(run_of_best), atol=1e-5)
    forget(mine)
    capsys.readouterr()
    assert "--format hf" in refused(
        run, capsys, "export", folder, "--format=peft", "--out", tmp_path / "peft", f"--plugin={mine}"
    )


FAULTY = """
from dataclasses import dataclass
from lightning.pytorch import Callback
from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.surgery import Surgery
from gpt2_pl.tasks import SentimentClassifier

def helper(model):
    model.load_state_dict({})  # fault: surgery mine.InTorch RuntimeError

@dataclass
class Typo(Surgery):
    def apply(self, model, tokenizer=None):
        return model.blocks  # fault: surgery mine.Typo AttributeError

@dataclass
class Meta(Surgery):
    def apply(self, model, tokenizer=None):
        float(model.ln_f.weight.sum())  # fault: surgery mine.Meta RuntimeError

@dataclass
class InTorch(Surgery):
    def apply(self, model, tokenizer=None):
        helper(model)

class Init(Surgery):
    def __init__(self, n: int = 1):
        try:
            self.n = {}["n"]
        except KeyError as error:
            raise TypeError("n") from error  # fault: surgery mine.Init TypeError

    def apply(self, model, tokenizer=None): ...

class OwnTask(SentimentClassifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.nowhere  # fault: model mine.OwnTask AttributeError

class OwnData(ToySentiment):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        open("nowhere")  # fault: data mine.OwnData FileNotFoundError

class OwnCallback(Callback):
    def __init__(self, n: int = 1):
        assert n > 1  # fault: callbacks mine.OwnCallback AssertionError

class OwnHook(Callback):
    def on_fit_start(self, trainer, pl_module):
        open("nowhere")  # fault: callbacks mine.OwnHook FileNotFoundError
"""
KEYS = {"surgery": "model.surgery", "model": "model", "data": "data", "callbacks": "trainer.callbacks"}
FAULTS = [(n, *line.split()[-3:]) for n, line in enumerate(FAULTY.split("\n"), 1) if " # fault: " in line]


def test_fit_fault_in_user_code_is_one_line_with_file_line_and_class(run, mine, tmp_path, capsys, subtests):
    (tmp_path / f"{mine}.py").write_text(FAULTY)
    for number, key, name, kind in FAULTS:
        name = name.replace("mine", mine)
        flag = f"--{KEYS[key]}{'+' if key in ('surgery', 'callbacks') else ''}={name}"
        with subtests.test(name):
            line = refused(run, capsys, "fit", "--config=quickstart", "--data.n_train=40", flag)
            assert line.startswith(f"gpt2-pl: error: {KEYS[key]}: {name}: {tmp_path / mine}.py, line {number}: {kind}:")


def test_fit_fault_in_user_code_with_traceback_variable_shows_it(run, mine, tmp_path, capsys, monkeypatch):
    (tmp_path / f"{mine}.py").write_text(FAULTY)
    monkeypatch.setenv("GPT2_PL_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        run("fit", "--config=quickstart", f"--model.surgery+={mine}.InTorch")
    *shown, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gpt2-pl: error: model.surgery: {mine}.InTorch: ")
    assert "Traceback (most recent call last):" in shown
    assert any(text.endswith("in load_state_dict") for text in shown)


def test_build_fault_in_user_class_names_file_and_line(mine, tmp_path, monkeypatch):
    (tmp_path / f"{mine}.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(mine)
    with pytest.raises(InputError, match=rf"Init: .*{mine}\.py, line \d+: TypeError: n"):
        build({"class_path": f"{mine}.Init"})


EVIL = "import pathlib; pathlib.Path({marker!r}).write_text('run')\n"


def test_commands_never_import_shadowing_modules_or_checkpoint_tasks(fit, run, tmp_path, files, capsys, monkeypatch):
    """Neither modules that shadow installed ones nor the task module named by a checkpoint are imported."""
    folder = fit("--name=good")
    checkpoint = folder / "checkpoints/best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "task": "evil.Task"}, checkpoint)
    for name in ("evil", "yaml", "torch", "numpy", "lightning", "argparse", "datasets", "pydantic"):
        (tmp_path / f"{name}.py").write_text(EVIL.format(marker=str(tmp_path / f"{name}.run")))
    done = started(tmp_path, "test", "--data=gpt2_pl.datamodules.IMDB", f"--data.test_file={files['test']}",
                   f"--ckpt_path={checkpoint}")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "'evil.Task'" in done.stderr.splitlines()[-1]
    capsys.readouterr()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # where evil would be found
    for command in (
        ["classify", folder, "--input", files["test"], "--out", tmp_path / "predictions.csv"],
        ["export", folder, "--format=hf", "--out", tmp_path / "hf"],
    ):
        assert "'evil.Task'" in refused(run, capsys, *command)
    assert not list(tmp_path.glob("*.run"))


def test_plugin_that_cannot_be_imported_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine_bad.py").write_text("x = 1\ny = undefined\n")
    (tmp_path / "mine_worse.py").write_text("def f(:\n")
    (tmp_path / "mine_needs.py").write_text("import no_such_package\n")
    classify = ["classify", tmp_path, "--input", "x.csv", "--out", tmp_path / "predictions.csv"]
    for name, words in (
        ("mine_bad", "mine_bad.py, line 2: NameError: name 'undefined' is not defined"),
        ("mine_worse", "mine_worse.py, line 1: SyntaxError"),
        ("mine_needs", "mine_needs.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("mine_absent", "'mine_absent'"),
        ("folder/mine_bad.py", "folder/mine_bad.py"),
    ):
        assert words in refused(run, capsys, *classify, "--plugin", name)
        if "/" not in name and name != "mine_absent":
            assert words in refused(run, capsys, "fit", "--config", ROOT / "configs/quickstart.yaml",
                                    f"--model={name}.Focal")  # fmt: skip


def test_plugins_of_config_returns_modules_outside_the_library(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"class_path": "mine.tasks.Focal", "init_args": {"surgery": [
        {"class_path": "gpt2_pl.surgery.LoRA"}, {"class_path": "mine.BitFit", "init_args": {}}]}}}))  # fmt: skip
    assert plugins_of(file) == ["mine.tasks", "mine"]
    file.write_text("name: x\n")
    assert plugins_of(file) == []
