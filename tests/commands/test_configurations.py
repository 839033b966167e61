"""Invalid keys and values in configuration files and flags."""

import contextlib
import itertools
import os
import random
import re

import pytest
import yaml
from helpers.configs import CONFIGS
from helpers.refusals import refused
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningCLI

from gpt2_pl.commands import main
from gpt2_pl.commands.support.config_merge import CommandLine
from gpt2_pl.commands.support.messages import explain
from gpt2_pl.errors import InputError

FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "sweep")
BENEATH = {  # what a strategy's file lies over
    **dict.fromkeys(("hard_prompt", "verbalizer"), "quora"),
    **dict.fromkeys(("unlikelihood", "sequence_unlikelihood", "dpo", "ulmfit_lm"), "text"),
}


def beneath(file, base, flags):
    """The arguments before and after a file on the command line."""
    task = (
        [] if file.parent.name != "strategy" else ["--config", CONFIGS / f"task/{BENEATH.get(file.stem, 'sst5')}.yaml"]
    )
    if file.stem in ("last_linear_layer", "full_model"):
        task = ["--config", file.with_name("sst.yaml")]
    if file.parent.name == "trainer":
        task = ["--config", CONFIGS / "quickstart.yaml"]
    quick = file.stem.startswith("quickstart") or file.parent.name == "trainer"
    return task, [] if quick else [f"--model.base={base}", "--data.max_length=40", *flags[:1]]


@pytest.fixture
def built(monkeypatch, run):
    """Build everything from a command line without running it; return the built CLI."""
    found = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: found.append(self))

    def built(*args):
        with contextlib.suppress(ValueError):  # there is no run's folder
            run("fit", *args)
        return found[-1]

    return built


def places(value, path=()):
    """Every key of nested settings as a path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(key, str):
            yield (*path, key)
        yield from places(inner, (*path, key))


def found_in(settings, path):
    for key in path:
        settings = settings[key]
    return settings


def cases():
    """The deepest key of every file that no earlier file has; not a whole section, which following flags need."""
    seen = set()
    for file in FILES:
        paths = sorted(places(yaml.safe_load(file.read_text())), key=len, reverse=True)
        path = next((path for path in paths if len(path) > 1 and path[-1] not in seen), paths[0])
        seen.add(path[-1])
        yield file, path


CASES = list(cases())


def test_fit_misspelled_config_key_is_refused_by_name(built, base, data_flags, capsys, tmp_path):
    changed = tmp_path / "changed.yaml"
    for file, path in CASES:
        settings = yaml.safe_load(file.read_text())
        above, key = found_in(settings, path[:-1]), path[-1]
        wrong = f"{key.rstrip('+')}x{'+' if key.endswith('+') else ''}"
        above[wrong] = above.pop(key)
        changed.write_text(yaml.safe_dump(settings))
        before, after = beneath(file, base, data_flags)
        assert wrong.rstrip("+") in refused(built, capsys, *before, "--config", changed, *after), (file, path)
    assert not (tmp_path / "lightning_logs").exists()


def test_fit_abbreviated_flag_is_refused(built, capsys, tmp_path):
    """Abbreviate flags at any position: flags are looked up by full name before they are parsed."""
    cli = built("--config", CONFIGS / "quickstart.yaml")
    names = {name for action in cli._parser("fit")._actions for name in action.option_strings}
    assert {"--ckpt_path", "--config", "--name", "--trainer.max_epochs"} <= names
    long = {name for name in names if name.startswith("--") and not name.endswith(".help")}
    short = sorted({whole[:end] for whole in long for end in range(3, len(whole))} - names)
    for name in random.Random(1).sample(short, 300):
        with pytest.raises(ArgumentError, match=f"unrecognized arguments: {name}=x|Key '{name[2:]}' is not"):
            cli.parser.parse_args(["fit", f"{name}=x"])
    for flag in ("--ckpt_p=https://example.com/x.ckpt", "--confi=/nowhere.yaml", "--nam=x", "--trainer.max_epoch=3"):
        assert flag.partition("=")[0] in refused(built, capsys, "--config", CONFIGS / "quickstart.yaml", flag)
    for given in ("-c/nowhere.yaml", "-c=/nowhere.yaml", "-c"):
        assert f"unknown flag {given}" in refused(built, capsys, "--config", CONFIGS / "quickstart.yaml", given)
    assert not (tmp_path / "lightning_logs").exists()


@pytest.fixture
def parse(built):
    """Parse a command line without building anything; return the error message or None."""
    cli = built("--config", CONFIGS / "quickstart.yaml")

    def parse(*args):
        try:
            cli.line = CommandLine(["fit", *map(str, args)])
            cli.line.import_classes()
            cli.parse_arguments(cli.parser, cli.line.arguments)
        except InputError as error:
            return str(error)
        return None

    return parse


def main_of(*args):
    main([*args])


OF_KIND = {  # what a value of each kind cannot be
    bool: ("nonsense", {"a": [1]}),
    int: ("nonsense", [], {"a": [1]}),
    float: ("nonsense", True, [], {"a": [1]}),
    str: (True, {"a": [1]}),
    list: (7, 1.5, True, "nonsense"),
    dict: (7, 1.5, True, [], "nonsense"),
    type(None): ({"a": [1]},),
}


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_parse_arguments_value_of_another_type_error_names_key_in_one_line(parse, tmp_path):
    """Change one value of each file, each to a value of another type in turn."""
    changed = tmp_path / "changed.yaml"
    values = itertools.cycle([7, True, None, [], "nonsense", {"a": [1]}, 1.5])
    for (file, path), value in zip(CASES, values, strict=False):
        settings = yaml.safe_load(file.read_text())
        above, key = found_in(settings, path[:-1]), path[-1]
        kind = type(above[key])
        above[key] = value
        changed.write_text(yaml.safe_dump(settings))
        message = parse(*beneath(file, "unused", ["unused"])[0], f"--config={changed}")
        if message is None:  # the trainer checks a strategy's name when it is built
            assert path == ("trainer", "strategy") or value not in OF_KIND[kind], (file, path)
        else:
            assert "\n" not in message, (file, path, message)
            assert key.rstrip("+") in message or "has no argument 'a'" in message, (file, path, message)
            assert not re.search("Errors:|Subtypes|Namespace|Given value|<class", message), (file, path, message)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_parse_arguments_misspelled_name_error_suggests_nearest(parse, tmp_path):
    def file(text):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text)
        return f"--config={path}"

    sst5 = f"--config={CONFIGS}/task/sst5.yaml"
    rank = "model: {init_args: {surgery+: [{class_path: gpt2_pl.surgery.LoRA, init_args: {rnk: 3}}]}}"
    for args, nearest in {
        (sst5, "--model.poolin=last"): "pooling",
        (sst5, "--model.pooling=lst"): "last",
        (sst5, "--model.optimizer.lrr=3"): "lr",
        (sst5, "--model.config={n_embdd: 128}"): "n_embd",
        (sst5, "--trainer.max_epoch=3"): "--trainer.max_epochs",
        (sst5, "--trainr.max_epochs=3"): "--trainer.max_epochs",
        (sst5, "--earlystopping_patience=3"): "--early_stopping_patience",
        (sst5, "--on_non_finite_loss=skp"): "skip",
        (sst5, file("trainer: {max_epoch: 3}")): "trainer.max_epochs",
        (sst5, file("data: {init_args: {batch_siz: 3}}")): "batch_size",
        (sst5, file(rank)): "rank",
        (f"--config={CONFIGS}/task/sst.yaml",): f"{CONFIGS}/task/sst5.yaml",
    }.items():  # fmt: skip
        assert f"did you mean {nearest}?" in str(parse(*args)), args
        if args[-1].startswith("--config") and "sst.yaml" not in args[-1]:
            assert str(parse(*args)).startswith(f"{args[-1].removeprefix('--config=')}: ")


def test_fit_parser_error_has_the_key(run, capsys):
    for flag, key in {
        "--trainer.max_epoch=3": "trainer.max_epoch",
        "--trainer.max_epochs=x": "trainer.max_epochs",
        "--data.batch_size": "data.batch_size",
        "--model.pooling=lst": "model.pooling",
        "--model.optimizer.lrr=3": "model.optimizer.lrr",
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping": "trainer.callbacks.monitor",
    }.items():
        assert refused(run, capsys, "fit", "--config", CONFIGS / "quickstart.yaml", flag).key == key


def test_main_misspelled_command_or_option_error_suggests_nearest(capsys):
    for nearest, args in {
        "test": ["tests"],
        "--ckpt_path": ["classify", "run", "--input=x", "--out=y", "--ckpt_pth=x"],
        "--baseline": ["compare", "x", "--out=y", "--baselin", "full"],
        "--max_new_tokens": ["generate", "run", "--prompt_file=x", "--out=y", "--max_new_token=3"],
        "--dry_run": ["sweep", "file", "--dry_rn"],
        "copy": ["configs", "coppy"],
    }.items():
        assert f"did you mean {nearest}?" in refused(main_of, capsys, *args)


def test_explain_unknown_parser_message_is_kept_on_one_line(built):
    cli = built("--config", CONFIGS / "quickstart.yaml")
    for text in ("", "\n", 'Parser key "model":', 'Parser key "a":\n  something\n  else', "no key at all\n  - x"):
        line = str(explain(text, cli.line, cli._parser("fit")))
        assert "\n" not in line
        assert all(word in line for word in ("something", "else", "no key", "x") if word in text)
        assert bool(line) == bool(text.strip())


OUT_OF_RANGE = {  # the key, and a part of the text
    "--model.config={n_embd: 128, n_head: 5}": ("model.config", "n_embd"),
    "--model.config={n_layer: 0}": ("model.config", "n_layer"),
    "--model.config={dropout: 2}": ("model.config", "dropout"),
    "--model.config={n_embd: 1000000000000, n_head: 1}": ("model.config", "memory"),
    "--model.optimizer.init_args.lr=-1": ("model.optimizer", "learning rate"),
    "--model.optimizer.init_args.betas=[2, 2]": ("model.optimizer", "beta"),
}


def test_fit_model_value_out_of_range_is_refused_before_writing(built, capsys, tmp_path):
    for flag, (key, value) in OUT_OF_RANGE.items():
        line = refused(built, capsys, "--config", CONFIGS / "quickstart.yaml", flag)
        assert line.key == key, line
        assert value in line
    assert not (tmp_path / "lightning_logs").exists()


def test_fit_value_invalid_for_machine_or_data_is_refused_in_one_line(run, capsys):
    for flag, key in (
        ("--model.config={vocab_size: 1000000000000}", "model.config"),
        ("--trainer.val_check_interval=500", "val_check_interval"),
    ):
        with pytest.raises(SystemExit):
            run("fit", f"--config={CONFIGS}/quickstart.yaml", flag)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert key in line


BAD_VALUES = {
    "seed_everything": (-1, 99999999999999), "checkpoint_every_n_steps": (-3, 0), "early_stopping_patience": (-1, 0),
    "trainer.devices": (0, "x"), "trainer.accelerator": ("foo",), "trainer.strategy": ("foo",),
    "trainer.limit_train_batches": (-1,), "trainer.val_check_interval": (0, -1),
    "trainer.accumulate_grad_batches": (0,), "trainer.gradient_clip_algorithm": ("foo",), "trainer.max_epochs": (-2,),
    "trainer.max_steps": (-7,), "trainer.max_time": ("x",), "trainer.num_nodes": (0,), "trainer.profiler": ("foo",),
    "trainer.default_root_dir": ("/dev/null",),
}  # fmt: skip


def test_fit_invalid_value_of_key_in_no_config_is_refused_before_writing(built, capsys, tmp_path, monkeypatch):
    for key, value in ((key, value) for key, values in BAD_VALUES.items() for value in values):
        line = refused(built, capsys, "--config", CONFIGS / "quickstart.yaml", f"--{key}={value}")
        assert key.rpartition(".")[2] in line, (key, value, line)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "ntasks" in refused(built, capsys, "--config", CONFIGS / "quickstart.yaml", "--trainer.devices=1")
    assert not (tmp_path / "lightning_logs").exists()


def test_fit_config_of_wrong_structure_is_refused(built, capsys, tmp_path):
    file = tmp_path / "other.yaml"
    for text, key in {
        **{f"ckpt_path: {value}": "ckpt_path" for value in ("3", "[a]", "{a: b}", "true")},
        "model: &a {init_args: {x: *a}}": "line 1",
        "trainer: &a {x: *a}": "line 1",
    }.items():
        file.write_text(text)
        line = refused(built, capsys, "--config", CONFIGS / "quickstart.yaml", "--config", file)
        assert key in line, text


def test_fit_pl_global_seed_in_environment_is_removed(built, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "x")
    built("--config", CONFIGS / "quickstart.yaml", "--seed_everything=false")
    assert "PL_GLOBAL_SEED" not in os.environ


def test_fit_misspelled_class_error_suggests_nearest(run, capsys):
    for flag, near in {
        "--model=gpt2_pl.tasks.SentimentClasifier": "gpt2_pl.tasks.SentimentClassifier",
        "--model.surgery+=gpt2_pl.surgery.LoRa": "gpt2_pl.surgery.LoRA",
        "--model.optimizer=torch.optim.AdanW": "torch.optim.AdamW",
        "--trainer.callbacks+=gpt2_pl.callbacks.GradualUnfreezin": "gpt2_pl.callbacks.GradualUnfreezing",
    }.items():
        line = refused(run, capsys, "fit", "--config", CONFIGS / "quickstart.yaml", flag)
        assert line.endswith(f"did you mean {near}?")
        assert line.key == flag.removeprefix("--").partition("=")[0].rstrip("+")
