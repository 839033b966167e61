"""What the command line says, before it is parsed: files and flags in order, and what a checkpoint adds to them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

import yaml

from commands import RUNS
from gpt2_pl.checkpoint import read
from gpt2_pl.documents import load_yaml, read_yaml
from gpt2_pl.errors import InputError
from gpt2_pl.files import existing_file
from gpt2_pl.surgery import build
from gpt2_pl.tasks import Task


def refuse_contradictions(files: list[Any]) -> None:
    """Refuse two files of which one trains the base, or operates on it, and the other leaves it as it is."""
    trains: dict[bool, str] = {}
    surgery = None
    for file in filter(None, files):
        model = (load_yaml(file.get_content(), str(file)) or {}).get("model") or {}
        stated = (model.get("init_args") if isinstance(model, dict) else None) or {}
        if (value := stated.get("train_base")) is not None:
            trains[bool(value)] = str(file)
        if stated.get("surgery") or stated.get("surgery+"):
            surgery = str(file)
    if len(trains) == 2:
        raise InputError(
            f"{trains[True]} trains the base and {trains[False]} does not (train_base); leave one of them out"
        )
    if surgery is not None and trains.get(False, surgery) != surgery:
        raise InputError(
            f"{surgery} operates on the base and {trains[False]} leaves it as it is (a linear probe); leave one out"
        )


def check_name(name: str, key: str = "name") -> None:
    """Refuse a run's name or version that would lead out of the folder of runs, or is none."""
    parts = PurePath(name).parts
    if not parts or {"/", "\\", "..", "~"} & {*parts, parts[0][:1]} or not name.isprintable() or "\\" in name:
        raise InputError(f"{key} is {name!r}; it must be a folder's name, such as my_run, below {RUNS}")
    if any(len(part.encode()) > 200 for part in parts):
        raise InputError(f"{key} is {name[:50]!r} and longer; a folder's name has at most 200 bytes")


LEAST = {
    "checkpoint_every_n_steps": 1,
    "early_stopping_patience": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.max_epochs": -1,
    "trainer.max_steps": -1,
    "trainer.num_nodes": 1,
}  # of numbers that Lightning checks late or not at all


def check_ranges(config: Any) -> None:
    """Refuse numbers out of range, and a folder of runs that cannot be made.

    Raises:
        InputError: naming the key and its value.
    """
    for key, least in LEAST.items():
        if (value := config.get(key)) is not None and value < least:
            raise InputError(f"{key} is {value}; it must be at least {least}")
    interval = config.trainer.val_check_interval
    if isinstance(interval, int | float) and interval <= 0:
        raise InputError(f"trainer.val_check_interval is {interval}; it must be above 0")
    root = config.trainer.default_root_dir
    if root is not None and "://" not in str(root) and Path(root).exists() and not Path(root).is_dir():
        raise InputError(f"trainer.default_root_dir is {root}; it must be a folder")


def ordered(args: list[str]) -> list[str]:
    """The command, its configuration files, then its flags: these lie over files wherever they stand.

    Raises:
        InputError: a file that is given as ``-cFILE``.
    """
    for arg in args:
        if arg.startswith("-c") and arg != "-c":
            raise InputError(f"{arg} is no flag; a configuration file is given as --config FILE")
    files: list[str] = []
    flags: list[str] = []
    for before, arg in pairwise(args):
        is_file = before in ("-c", "--config") or arg in ("-c", "--config") or arg.startswith("--config=")
        (files if is_file else flags).append(arg)
    return [*args[:1], *files, *flags]


def settings_of(args: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configuration files on the command line that hold keys, in order, by name.

    Raises:
        InputError: no such file, one that is not YAML, or one that is too large or too deep.
    """
    values = [following for arg, following in pairwise(args) if arg in ("-c", "--config")]
    values += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    for value in values:
        settings = read_yaml(existing_file(value, "config"))
        if isinstance(settings, dict):
            yield value, settings


def check_shape(file: str, settings: Any, key: str = "") -> None:
    """Refuse what the parser passes over, or names only by what is around it.

    Raises:
        InputError: a group of keys that is none, or a class with other keys than class_path and init_args.
    """
    if not key:
        for group in ("model", "data", "trainer"):
            if group in settings and not isinstance(settings[group], dict | str | None):
                raise InputError(f"{file}: {group} is {settings[group]!r}; it must hold keys")
        if isinstance(settings.get("trainer", {}), str | None):
            raise InputError(f"{file}: trainer is {settings['trainer']!r}; it must hold keys")
    if isinstance(settings, list):
        for i, value in enumerate(settings):
            check_shape(file, value, f"{key}[{i}]")
    if not isinstance(settings, dict):
        return
    if {"class_path", "init_args"} & settings.keys():
        for name, kind in (("class_path", str), ("init_args", dict)):
            if not isinstance(settings.get(name), kind | None):
                what = "a class's name" if kind is str else "keys"
                raise InputError(f"{file}: {key}.{name} is {settings[name]!r}; it must be {what}")
        if wrong := [name for name in settings if name not in ("class_path", "init_args", "dict_kwargs")]:
            raise InputError(f"{file}: {key}.{wrong[0]} is no key; a class has class_path and init_args")
    for name, value in settings.items():
        check_shape(file, value, f"{key}.{name}".removeprefix("."))


def checkpoint_path(args: list[str]) -> str | None:
    """The checkpoint that flags, or else files, name: a file here."""
    path = None
    for _, settings in settings_of(args):
        path = settings.get("ckpt_path", path)
    for i, arg in enumerate(args):
        if arg == "--ckpt_path" and i + 1 < len(args):
            path = args[i + 1]
        elif arg.startswith("--ckpt_path="):
            path = arg.partition("=")[2]
    if path in (None, "null"):
        return None
    if not isinstance(path, str):
        raise InputError(f"ckpt_path is {path!r}; it must be a file's name")
    existing_file(path, "ckpt_path")
    return path


def states(args: list[str], *keys: str) -> bool:
    """Whether flags say what any of these keys is."""
    return any(arg.partition("=")[0] in {f"--{key}" for key in keys} for arg in args)


def run_of(checkpoint: Path, root: Path) -> Path | None:
    """The folder, below ``root``, of the run that a last checkpoint is to go on; None of any other checkpoint."""
    run = checkpoint.expanduser().resolve().parents[1]
    if checkpoint.name != "last.ckpt" or not (run / "config.yaml").is_file() or not run.is_relative_to(root.resolve()):
        return None
    return run.relative_to(root.resolve())


# What may be otherwise when a run goes on: where files lie, how things are computed, what is written and decided.
_FREE = {
    *("base", "config", "tokenizer", "compile", "activation_checkpointing", "batch_size", "eval_batch_size"),
    *("n_shown", "temperature", "top_p", "guide", "max_new_tokens", "threshold"),
}
_FREE_OF_SURGERY = {"folder", "dropout", "b_lr_ratio", "init_text"}
_STRATEGIES = ("callbacks.DiscriminativeLR", "callbacks.GradualUnfreezing")


def _settings_that_stay(settings: dict[str, Any]) -> dict[str, Any]:
    """By key, what a run that goes on goes on with."""
    found = {"seed_everything": settings.get("seed_everything")}
    for part in ("model", "data"):
        stated = settings.get(part) or {}
        found[f"{part}.class_path"] = stated.get("class_path")
        for key, value in (stated.get("init_args") or {}).items():
            if key == "surgery":
                value = [
                    {**of, "init_args": {k: v for k, v in of.get("init_args", {}).items() if k not in _FREE_OF_SURGERY}}
                    for of in value or []
                ]
            if key not in _FREE and not key.endswith("_file"):
                found[f"{part}.{key}"] = value
    callbacks = (settings.get("trainer") or {}).get("callbacks") or []
    found["trainer.callbacks"] = [callback for callback in callbacks if callback["class_path"] in _STRATEGIES]
    return found


def check_same_settings(file: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with a run under other settings than ``file``, its config.yaml, says.

    A checkpoint holds the state of an optimizer, whose rates would be taken whatever the settings say.
    """
    if not file.is_file():
        return
    before = _settings_that_stay(dict(settings_of(["fit", f"--config={file}"])).get(str(file), {}))
    now = _settings_that_stay(settings)
    for key in before.keys() & now.keys():
        if before[key] != now[key]:
            raise InputError(
                f"{key} is {now[key]}; the run that goes on has {before[key]} ({file}): leave it at that, or begin a "
                "run without ckpt_path"
            )


def with_hyperparameters(args: list[str], checkpoint: str) -> list[str]:
    """Put the checkpoint's hyperparameters under all files and flags, as a first configuration file."""
    content = read(checkpoint, "ckpt_path", Task)
    stored, task = dict(content["hyper_parameters"]), content["task"]
    stored.pop("num_classes", None)  # the data's to say
    stored.pop("word_ids", None)
    for key, other in (("base", "config"), ("config", "base")):
        if states_argument(args, key):
            stored.pop(other, None)  # a model has one of the two
    if states_argument(args, "surgery"):
        stored.pop("surgery", None)  # theirs would be added to it
    else:
        stored["surgery"] = [build(settings).settings() for settings in stored.get("surgery") or []] or None
    layer = {"model": {"class_path": task, "init_args": stored}}
    return [args[0], "--config", yaml.safe_dump(layer), *args[1:]]


def states_argument(args: list[str], key: str) -> bool:
    """Whether flags or configuration files say what an argument of the model is; null says nothing."""
    for arg, following in pairwise([*args, ""]):
        name, equals, value = arg.partition("=")
        if (
            name.startswith((f"--model.{key}", f"--model.init_args.{key}"))
            and (value if equals else following) != "null"
        ):
            return True
    for _, settings in settings_of(args):
        model = settings.get("model")
        stated = model.get("init_args") if isinstance(model, dict) else None
        if isinstance(stated, dict) and any(stated.get(name) is not None for name in (key, f"{key}+")):
            return True
    return False
