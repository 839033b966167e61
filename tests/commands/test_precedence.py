"""Precedence of flag over file over checkpoint for every hyperparameter, and the values in config.yaml."""

import itertools
import json
import shutil
import types
import typing

import pytest
import torch
import yaml
from conftest import ROOT
from lightning.pytorch.cli import LightningCLI

from gpt2_pl import tasks
from gpt2_pl.commands.lightning_cli import GPT2CLI
from gpt2_pl.tasks import (
    DataToText,
    LanguageModel,
    ParaphraseDetector,
    PoemGenerator,
    SentimentClassifier,
    Task,
    TextRegressor,
)
from gpt2_pl.tasks.checkpoint import arguments
from gpt2_pl.tasks.classification import Classifier
from gpt2_pl.utils.registry import class_path

TASKS = (SentimentClassifier, ParaphraseDetector, TextRegressor, LanguageModel, PoemGenerator, DataToText)
DATA = {
    SentimentClassifier: "gpt2_pl.datamodules.IMDB",
    ParaphraseDetector: "gpt2_pl.datamodules.QuoraPairs",
    TextRegressor: "gpt2_pl.datamodules.STSB",
    LanguageModel: "gpt2_pl.datamodules.TextCorpus",
    PoemGenerator: "gpt2_pl.datamodules.Sonnets",
    DataToText: "gpt2_pl.datamodules.WebNLG",
}
LIGHTNING = {"pytorch-lightning_version": "2.6.6"}
SHAPE = {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "dropout": 0.1}


def prompt(length):
    init_args = {"length": length, "init_text": None}
    return [{"class_path": "gpt2_pl.surgery.PromptTuning", "init_args": init_args}]


# Three values each of what a type does not tell.
VALUES = {
    "config": [{**SHAPE, "n_head": n} for n in (1, 2, 4)],
    "surgery": [prompt(2), prompt(3), prompt(4)],
    "label_words": [[" a", " b"], [" c", " d"], [" e", " f"]],
    "label_token_ids": [[1, 2], [3, 4], [5, 6]],
    "schedule": [{"class_path": "gpt2_pl.optim.LinearWithWarmup", "init_args": {"warmup": w}} for w in (0.1, 0.2, 0.3)],
    "optimizer": [{"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}} for lr in (1e-3, 2e-3, 3e-3)],
}
# What excludes one another: a model starts from a base or from a shape, answers in words or by a linear head, and
# trains with DPO or with other losses.
EXCLUDED = {
    "base": {"config": None, "label_words": None, "label_token_ids": None, "head": "linear", "dpo": None},
    "config": {"base": None, "surgery": None, "label_words": None, "label_token_ids": None, "head": "linear",
               "train_base": True},
    "label_words": {"config": None, "surgery": None, "pooling": "last", "num_dropout_samples": 1, "head_dropout": None,
              "head": "verbalizer", "train_base": True},
}  # fmt: skip


def hints(task):
    found = {}
    for cls in reversed(task.__mro__):
        if "__init__" in vars(cls) and issubclass(cls, Task):
            found |= typing.get_type_hints(vars(cls)["__init__"])
    return found


def three(name, hint):
    """A checkpoint's, a file's and a flag's value of a hyperparameter."""
    if name in VALUES:
        return VALUES[name]
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal and float not in kinds:
            return list(itertools.islice(itertools.cycle(typing.get_args(kind)), 3))
        if kind is bool:
            return [True, False, True]
        if kind is int:
            return [3, 4, 5]
        if kind is float:
            return [0.11, 0.12, 0.13]
        if kind == list[str]:
            return [["a"], ["b"], ["c"]]
    pytest.fail(f"say three values of the new hyperparameter {name}: {hint}")


def written(value):
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Read a command line and build the model and the trainer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda *args: GPT2CLI([str(arg) for arg in args])


def used(cli):
    return yaml.safe_load(cli._parser("fit").dump(cli.config["fit"], skip_none=False))


def assert_used(cli, settings, values, sources):
    """Compare the settings of the model, and the model, with the value of every setting's source."""
    for name, source in sources.items():
        if name == "label_token_ids" and source == 0:
            continue  # a checkpoint's are looked up again
        if name in ("optimizer", "schedule"):
            if source:
                init_args = settings[name]["init_args"]
                assert init_args.items() >= values[name][source]["init_args"].items(), name
            continue
        expected = values[name][source]
        built = cli.model.hparams[name]
        if name == "surgery":  # none is an empty list
            settings[name], built = settings[name] or None, built or None
        assert settings[name] == expected, name
        if name == "config" and expected is not None:
            expected = {**expected, "dropout": values["dropout"][sources["dropout"]]}
        assert built == expected, name
        if isinstance(own := getattr(cli.model, name, None), bool | int | float | str) and expected is not None:
            assert own == expected, name
    if source := sources["optimizer"]:
        made = cli.model.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
        assert made.defaults["lr"] == values["optimizer"][source]["init_args"]["lr"]
    if source := sources["schedule"]:
        assert cli.model.schedule.warmup == values["schedule"][source]["init_args"]["warmup"]


OTHERS = (DataToText, LanguageModel, ParaphraseDetector)  # each of which has another like it
CASES = [
    *(pytest.param(task, "base", marks=[pytest.mark.slow] if task in OTHERS else []) for task in TASKS),
    pytest.param(SentimentClassifier, "config", marks=pytest.mark.slow),
    pytest.param(ParaphraseDetector, "label_words", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("task", "variant"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_gpt2cli_hyperparameter_prefers_flag_over_file_over_checkpoint(task, variant, build, base, tmp_path):
    bases = [str(shutil.copytree(base, tmp_path / name)) for name in ("from_checkpoint", "from_file", "from_flag")]
    names = sorted(set(arguments(task)) - {"num_classes"})  # which is the data's
    assert {"base", "dropout", "compile", *(["pooling"] if issubclass(task, Classifier) else [])} <= set(names)
    fixed, hint = EXCLUDED[variant], hints(task)
    values = {name: [fixed[name]] * 3 if name in fixed else three(name, hint[name]) for name in names if name != "base"}
    values["base"] = [None] * 3 if variant == "config" else bases
    if variant == "base" and issubclass(task, Classifier):
        values["train_base"] = [True, False, True]
    stored = {name: chosen[0] for name, chosen in values.items() if name not in ("optimizer", "schedule")}
    checkpoint = tmp_path / "some.ckpt"
    torch.save(
        {"task": class_path(task), "hyper_parameters": stored, "state_dict": {}, "base": {}, **LIGHTNING}, checkpoint
    )
    data = [f"--data={DATA[task]}", f"--data.tokenizer={base}", f"--ckpt_path={checkpoint}"]
    file = tmp_path / "run.yaml"

    def says(sources):
        """Build with values of a checkpoint (0), a file (1) and flags (2); all of them must be used."""
        stated = {name: values[name][1] for name, source in sources.items() if source >= 1}
        file.write_text(
            yaml.safe_dump({"model": {"class_path": f"gpt2_pl.tasks.{task.__name__}", "init_args": stated}})
        )
        typed = [f"--model.{name}={written(values[name][2])}" for name, source in sources.items() if source == 2]
        cli = build("fit", *(["--config", file] if stated else []), *typed, *data)
        found = used(cli)["model"]["init_args"]
        assert_used(cli, found, values, sources)
        return cli

    says(dict.fromkeys(names, 0))
    for shift in range(3):
        mixed = {name: (i + shift) % 3 for i, name in enumerate(names)}
        last = says(mixed)
    shown = tmp_path / "config.yaml"
    shown.write_text(yaml.safe_dump(used(last)))
    again = build("fit", "--config", shown)
    assert used(again)["model"] == used(last)["model"]
    assert dict(again.model.hparams) == dict(last.model.hparams)


def test_tasks_public_classes_are_all_in_cases():
    public = {name for name in tasks.__all__ if issubclass(getattr(tasks, name), Task)}
    assert public - {"Task"} == {task.__name__ for task in TASKS}


def test_gpt2cli_files_and_flags_in_any_order_later_one_wins(build, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("seed_everything: 7\ntrainer: {max_epochs: 8}\nname: by_file\n")
    quick = ["--config", ROOT / "configs/quickstart.yaml"]
    settings = used(build("fit", *quick, "--trainer.max_epochs", "9", "--config", over, "--name=by_flag"))
    assert (settings["seed_everything"], settings["trainer"]["max_epochs"], settings["name"]) == (7, 8, "by_flag")
    cli = build("fit", *quick, "--config", over, "--trainer.max_epochs=9", "--model.dropout=0.4")
    assert (cli.trainer.max_epochs, cli.model.config.dropout) == (9, 0.4)


def test_gpt2cli_ckpt_path_in_file_yields_to_values_of_file(build, tmp_path, base):
    checkpoint = tmp_path / "some.ckpt"
    stored = {"base": str(base), "config": None, "surgery": [], "mean_weight": 0.2, "label_smoothing": 0.3}
    torch.save(
        {
            "task": "gpt2_pl.tasks.SentimentClassifier",
            "hyper_parameters": stored,
            "state_dict": {},
            "base": {},
            **LIGHTNING,
        },
        checkpoint,
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({
        "model": {"class_path": "gpt2_pl.tasks.SentimentClassifier",
                  "init_args": {"base": str(base), "mean_weight": 0.4}},
        "data": {"class_path": "gpt2_pl.datamodules.IMDB"}, "ckpt_path": str(checkpoint),
    }))  # fmt: skip
    settings = used(build("fit", "--config", file))
    assert settings["ckpt_path"] == str(checkpoint)
    assert (settings["model"]["init_args"]["mean_weight"], settings["model"]["init_args"]["label_smoothing"]) == (
        0.4,
        0.3,
    )


@pytest.mark.parametrize("variant", ["base", pytest.param("config", marks=pytest.mark.slow)])
def test_gpt2cli_file_without_model_keeps_checkpoint_base_and_config(variant, build, tmp_path, base):
    checkpoint = tmp_path / "some.ckpt"
    stored = {"base": None, "config": None, "surgery": [], variant: str(base) if variant == "base" else SHAPE}
    torch.save(
        {
            "task": "gpt2_pl.tasks.SentimentClassifier",
            "hyper_parameters": stored,
            "state_dict": {},
            "base": {},
            **LIGHTNING,
        },
        checkpoint,
    )
    given = ["--data=gpt2_pl.datamodules.ToySentiment", f"--ckpt_path={checkpoint}"]
    found = used(build("fit", "--config", ROOT / "configs/trainer/cpu.yaml", *given))["model"]["init_args"]
    assert {name: found[name] for name in ("base", "config")} == {name: stored[name] for name in ("base", "config")}
    other = {
        "base": None,
        "config": None,
        "base" if variant == "config" else "config": SHAPE if variant == "base" else str(base),
    }
    for stated in ({name: value for name, value in other.items() if value is not None}, other):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({"model": {"init_args": stated}}))
        found = used(build("fit", "--config", file, *given))["model"]["init_args"]
        assert {name: found[name] for name in other} == other
        flags = [f"--model.{name}={written(value)}" for name, value in stated.items()]
        found = used(build("fit", *given, *flags))["model"]["init_args"]
        assert {name: found[name] for name in other} == other
