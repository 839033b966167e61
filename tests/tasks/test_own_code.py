"""User-defined strategies and tasks: trained parameters, checkpoint contents, and permitted class names."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

import pytest
import torch
import yaml
from conftest import ROOT, metrics, started
from helpers.adapters import Houlsby, OutputScale, Unfreeze
from helpers.refusals import refused
from helpers.trainers import trainer
from lightning.pytorch import Callback
from torch import nn
from transformers import GPT2ForSequenceClassification

from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.run import plugins_of
from gpt2_pl.surgery import LoRA, PrefixTuning, PromptTuning, Surgery, build
from gpt2_pl.tasks import SentimentClassifier, Task
from gpt2_pl.utils.registry import class_path

IDS = torch.randint(400, (3, 9), generator=torch.Generator().manual_seed(2))


@dataclass
class Biases(Surgery):
    """BitFit on the published parameters only."""

    def apply(self, model, tokenizer=None):
        for name, parameter in model.named_parameters():
            if name in model.base_names:
                parameter.requires_grad_(name.endswith("bias"))
        return model


@dataclass
class FrozenEmbeddings(Surgery):
    """Full fine-tuning except for the embeddings."""

    def apply(self, model, tokenizer=None):
        model.wte.requires_grad_(False)
        model.wpe.requires_grad_(False)
        return model


def fitted(base, surgery, folder, callbacks=(), **settings):
    """Return a classifier after four steps, its checkpoint, and the names of the parameters in the optimizer."""
    torch.manual_seed(1)
    task = SentimentClassifier(base=str(base), surgery=surgery, dropout=0.0, **settings)
    task.make_optimizer = lambda groups: torch.optim.AdamW(groups, lr=0.1)
    fit = trainer(max_steps=4, callbacks=list(callbacks))
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    fit.save_checkpoint(folder / "some.ckpt")
    held = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    return task, folder / "some.ckpt", {name for name, p in task.named_parameters() if id(p) in held}


def logits(task):
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "row": torch.arange(len(IDS))}
    with torch.no_grad():
        return task.eval()(batch)


HEAD = {"head.linear.weight", "head.linear.bias"}


@pytest.mark.parametrize(
    ("surgery", "settings", "trains"),
    [
        ([Biases()], {}, lambda name: name.endswith("bias")),
        ([LoRA(rank=2), Biases()], {}, lambda name: name.endswith("bias") or "lora" in name),
        ([Biases(), LoRA(rank=2)], {}, lambda name: name.endswith("bias") or "lora" in name),
        ([FrozenEmbeddings()], {"train_base": True}, lambda name: "wte" not in name and "wpe" not in name),
        ([PromptTuning(3), FrozenEmbeddings()], {"train_base": True}, lambda n: "wte" not in n and "wpe" not in n),
        ([Unfreeze()], {}, lambda name: True),
        ([Houlsby()], {}, lambda name: ".up." in name or ".down" in name),
        ([Houlsby(), Biases()], {}, lambda name: ".up." in name or ".down" in name or name.endswith("ln_f.bias")),
        ([OutputScale()], {}, lambda name: name == "gpt2.scale"),
        ([OutputScale(), PrefixTuning(3)], {}, lambda name: "scale" in name or "prefix" in name),
    ],
    ids=lambda value: "+".join(type(one).__name__ for one in value) if isinstance(value, list) else "",
)  # fmt: skip
def test_task_custom_surgery_trains_and_saves_what_requires_a_gradient(surgery, settings, trains, base, tmp_path):
    task, checkpoint, optimized = fitted(base, surgery, tmp_path, **settings)
    names = {name for name, _ in task.named_parameters()}
    if isinstance(surgery[0], Houlsby) and len(surgery) > 1:  # published biases that keep their names
        published = {f"gpt2.{name}" for name in task.backbone.base_names}
        expected = {n for n in names if ".up." in n or ".down" in n or (n in published and n.endswith("bias"))} | HEAD
    else:
        expected = {name for name in names if trains(name)} | HEAD
    assert optimized == {name for name in expected if ".down" not in name}
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert set(stored) == expected
    again = SentimentClassifier.load_from_checkpoint(checkpoint)
    assert torch.equal(logits(again), logits(task))
    plain = SentimentClassifier(base=str(base))
    plain.configure_model()
    for name, parameter in plain.backbone.named_parameters():
        if f"gpt2.{name}" in names - expected:
            assert torch.equal(parameter, task.backbone.get_parameter(name))
    assert task.base_is_frozen == (not {f"gpt2.{name}" for name in task.backbone.base_names} & expected)


def test_task_complete_checkpoint_loads_without_the_base(base, tmp_path):
    task, checkpoint, _ = fitted(base, [Unfreeze()], tmp_path)
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["base"] is None
    assert torch.equal(logits(SentimentClassifier.load_from_checkpoint(checkpoint)), logits(task))


def test_task_partly_frozen_random_model_saves_all_weights(tmp_path):
    shape = {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    task, checkpoint, optimized = fitted_from_config(shape, tmp_path)
    assert "gpt2.wte.weight" not in optimized
    assert torch.equal(logits(SentimentClassifier.load_from_checkpoint(checkpoint)), logits(task))


def fitted_from_config(shape, folder):
    torch.manual_seed(1)
    task = SentimentClassifier(config=shape, surgery=[FrozenEmbeddings()], train_base=True, dropout=0.0)
    fit = trainer(max_steps=2)
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    fit.save_checkpoint(folder / "some.ckpt")
    held = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    return task, folder / "some.ckpt", {name for name, p in task.named_parameters() if id(p) in held}


class Freeze(Callback):
    """Freeze all but the head from the second step on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            pl_module.backbone.requires_grad_(False)


def test_task_freezing_callback_does_not_change_checkpoint_or_optimizer(base, tmp_path):
    task, checkpoint, optimized = fitted(base, None, tmp_path, [Freeze()])
    assert optimized == {name for name, _ in task.named_parameters()} == set(torch.load(checkpoint)["state_dict"])
    again = trainer(max_steps=1)
    again.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    held = {id(p) for group in again.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in task.parameters()}


def test_task_surgery_that_freezes_all_is_a_linear_probe(base, tmp_path):
    @dataclass
    class FreezeAll(Surgery):
        def apply(self, model, tokenizer=None):
            return model.requires_grad_(False)

    task = SentimentClassifier(base=str(base), surgery=[FreezeAll()], train_base=True)
    assert task.backbone_frozen
    assert task.base_is_frozen
    assert not task.trains_blocks


def test_task_surgery_that_unfreezes_an_adapted_weight_is_refused(base):
    with pytest.raises(InputError, match=r"unfreezes it and LoRA both train h\.0\.attn\.c_attn\.weight"):
        SentimentClassifier(base=str(base), surgery=[LoRA(rank=2), Unfreeze()])


class Focal(SentimentClassifier):
    """A task that saves all of its arguments, one of which a checkpoint cannot hold."""

    def __init__(self, gamma: float = 2.0, loss: nn.Module | None = None, **kwargs):
        super().__init__(**kwargs)
        self.gamma = gamma
        self.save_hyperparameters()


def test_task_custom_hyperparameters_are_restored_without_objects(base, tmp_path):
    task = Focal(gamma=1.5, loss=nn.Flatten(), base=str(base), surgery=[LoRA(rank=2)])
    fit = trainer(max_steps=1)
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    fit.save_checkpoint(tmp_path / "some.ckpt")
    again = Focal.load_from_checkpoint(tmp_path / "some.ckpt")
    assert again.gamma == 1.5
    assert torch.equal(logits(again), logits(task))
    assert torch.load(tmp_path / "some.ckpt", weights_only=True)["task"] == f"{__name__}.Focal"
    with pytest.raises(InputError, match=r"written by .*Focal"):
        SentimentClassifier.load_from_checkpoint(tmp_path / "some.ckpt")


# Names of classes


def test_class_path_is_public_for_library_and_full_for_user_classes():
    assert class_path(SentimentClassifier) == "gpt2_pl.tasks.SentimentClassifier"
    assert class_path(LoRA) == "gpt2_pl.surgery.LoRA"
    assert class_path(Biases) == f"{__name__}.Biases"
    assert Task.find(class_path(Focal)) is Focal
    assert Task.find("gpt2_pl.surgery.LoRA") is Surgery.find("gpt2_pl.tasks.SentimentClassifier") is None
    assert Task.find("gpt2_pl.tasks.Task") is None


@pytest.mark.parametrize(
    "surgery", [Biases(), Houlsby(7), LoRA(rank=3, targets=["q"])], ids=lambda value: type(value).__name__
)
def test_build_custom_surgery_from_its_settings_restores_it(surgery):
    again = build(surgery.settings())
    assert type(again) is type(surgery)
    assert again.settings() == surgery.settings()


def test_task_surgery_settings_that_are_not_plain_values_are_refused(base, tmp_path):
    @dataclass
    class From(Surgery):
        folder: object

        def apply(self, model, tokenizer=None):
            return model

    class Forgets(Surgery):
        def __init__(self, size: int):
            pass

        def apply(self, model, tokenizer=None):
            return model

    with pytest.raises(InputError, match=r"From: folder must be text.*PosixPath"):
        SentimentClassifier(base=str(base), surgery=[From(tmp_path)])
    with pytest.raises(InputError, match=r"Forgets does not store its argument 'size'"):
        SentimentClassifier(base=str(base), surgery=[Forgets(3)])


def test_save_checkpoint_task_defined_in_main_warns(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Focal, "__module__", "__main__")
    task = Focal(base=str(base))
    fit = trainer(max_steps=1)
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    with pytest.warns(UserWarning, match=r"__main__\.Focal.*move it to a separate module"):
        fit.save_checkpoint(tmp_path / "some.ckpt")


# The command line

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
    def fit(*args, task="imdb"):
        return run("fit", "--config", ROOT / f"configs/task/{task}.yaml", f"--model.base={base}", *data_flags,
                   "--data.max_length=24", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", *args)  # fmt: skip

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
        assert f"was written by '{mine}.Focal'" in line
        assert "--plugin MODULE" in line
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
    assert f"there is no '{mine}.BitFit'" in line
    assert "--plugin MODULE" in line
    run(*out, f"--plugin={mine}")
    run_of_best = SentimentClassifier.load_from_checkpoint(best)
    peer = GPT2ForSequenceClassification.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert torch.allclose(peer.eval()(IDS).logits, logits(run_of_best), atol=1e-5)
    forget(mine)
    capsys.readouterr()
    assert "base was trained" in refused(
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


@pytest.mark.parametrize(("number", "key", "name", "kind"), FAULTS, ids=[name for _, _, name, _ in FAULTS])
def test_fit_fault_in_user_code_is_one_line_with_file_line_and_class(
    number, key, name, kind, run, mine, tmp_path, capsys
):
    (tmp_path / f"{mine}.py").write_text(FAULTY)
    name = name.replace("mine", mine)
    flag = f"--{KEYS[key]}{'+' if key in ('surgery', 'callbacks') else ''}={name}"
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--config=quickstart", "--data.n_train=40", flag)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"gpt2-pl: error: {KEYS[key]}: {name}: {tmp_path / mine}.py, line {number}: {kind}: "), line


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
    with pytest.raises(InputError, match=rf"surgery Init: .*{mine}\.py, line \d+: TypeError: n"):
        build({"class_path": f"{mine}.Init"})


EVIL = "import pathlib; pathlib.Path({marker!r}).write_text('run')\n"


def test_commands_never_import_shadowing_modules_or_checkpoint_tasks(fit, tmp_path, files, monkeypatch):
    """Neither modules that shadow installed ones nor the task module named by a checkpoint are imported."""
    folder = fit("--name=good")
    checkpoint = folder / "checkpoints/best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "task": "evil.Task"}, checkpoint)
    for name in ("evil", "yaml", "torch", "numpy", "lightning", "argparse", "datasets", "pydantic"):
        (tmp_path / f"{name}.py").write_text(EVIL.format(marker=str(tmp_path / f"{name}.run")))
    commands = (
        ["classify", folder, "--input", files["test"], "--out", tmp_path / "predictions.csv"],
        ["export", folder, "--format=hf", "--out", tmp_path / "hf"],
        ["test", "--data=gpt2_pl.datamodules.IMDB", f"--data.test_file={files['test']}", f"--ckpt_path={checkpoint}"],
    )
    for command in commands:
        done = started(tmp_path, *command)
        assert done.returncode == 2, done.stderr
        assert "was written by 'evil.Task'" in done.stderr.splitlines()[-1]
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
        ("mine_absent", "there is no module 'mine_absent'"),
        ("folder/mine_bad.py", "must be the import name of a module, such as mine_bad"),
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
