"""Merging of configuration files, flags and a checkpoint's hyperparameters, before they are parsed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from gpt2_pl.commands.support.plugins import CLASS_MODULES, add_working_folder, import_class, import_plugin
from gpt2_pl.configs import config_path
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.filesystem import require_file
from gpt2_pl.surgery import build
from gpt2_pl.tasks import Task
from gpt2_pl.tasks.checkpoint import read
from gpt2_pl.utils.yaml_json import DuplicateKeyError, load_yaml, read_yaml


class Source(NamedTuple):
    """Configuration file or flag.

    Args:
        name: name of the file on the command line, or name of the flag without dashes.
        settings: values by key, such as ``model.optimizer.init_args.lr``.
        is_file: whether the source is a configuration file.
    """

    name: str
    settings: dict[str, Any]
    is_file: bool = False


def _flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each leaf below a key; lists are leaves, and keys omit the top ``init_args``."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        yield re.sub(r"^(model|data)\.init_args\.", r"\1.", key), value


class CommandLine:
    """Arguments of fit, validate, test and predict: files and flags in their order; later ones override earlier ones.

    Args:
        args: the subcommand and its arguments.

    Attributes:
        command: the subcommand.
        sources: files and flags in their order.
        arguments: arguments for the parser: ``args`` without ``--plugin``.
        plugins: modules that ``--plugin`` names.
        without_value: flags without a value.

    Raises:
        InputError: a file is missing, is not YAML, is too large or too deeply nested, or has a value of the wrong kind.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.command, *rest = args
        self.sources: list[Source] = []
        self.plugins: list[str] = []
        self.arguments = [self.command]
        self.without_value: list[str] = []
        while rest:
            argument = rest.pop(0)
            if argument.startswith("--"):
                argument = argument.replace("+.help", ".help", 1)
            name, equals, value = argument.partition("=")
            words = [argument]
            if not equals and name.startswith("-") and rest and not rest[0].startswith("--"):
                words.append(value := rest.pop(0))
            has_value = bool(equals) or len(words) == 2
            if name == "--plugin":
                self.plugins.append(value)
            elif name in ("-c", "--config") and has_value:
                self._add_config(name, value, bool(equals))
            elif name.startswith("--"):
                self._add_option(name, value if has_value else None, bool(equals))
            elif not name.startswith("-c"):
                self.arguments += words
            else:
                raise InputError(f"unknown flag {argument}; give a configuration file as --config FILE")

    def _add_config(self, option: str, name: str, has_equals_sign: bool) -> None:
        file = config_path(name)
        self.arguments += [f"{option}={file}"] if has_equals_sign else [option, str(file)]
        content = read_yaml(file)
        if content is None:
            raise InputError(f"config: {name} is empty; it must have keys, such as model, data and trainer")
        if isinstance(content, dict):
            check_shape(name, content)
            self.sources.append(Source(name, dict(_flatten(content, "")), is_file=True))

    def _add_option(self, option: str, value: str | None, has_equals_sign: bool) -> None:
        if value is None:
            self.without_value.append(option)
            self.arguments.append(option)
        else:
            is_joined = has_equals_sign or (value.startswith("-") and value not in ("-c", "-h"))
            self.arguments += [f"{option}={value}"] if is_joined else [option, value]
        self._add_flag(option.removeprefix("--"), value)

    def _add_flag(self, key: str, text: str | None) -> None:
        try:
            value = None if text is None else load_yaml(text, f"--{key}")
        except DuplicateKeyError:
            raise
        except InputError:
            value = text
        if isinstance(value, str | None) and text is not None and "#" in text:
            value = text  # not a comment, as in the parser
        self.sources.append(Source(key, dict(_flatten(value, key))))

    @property
    def files(self) -> list[str]:
        """Names of the configuration files in their order."""
        return [source.name for source in self.sources if source.is_file]

    def last(self, key: str) -> Any:
        """Return the value of a key in the last file or flag that has it, or None."""
        return next((s.settings[key] for s in reversed(self.sources) if key in s.settings), None)

    def has_flag(self, *keys: str) -> bool:
        """Return whether one of the keys is given as a flag."""
        return any(not source.is_file and source.name in keys for source in self.sources)

    def states(self, key: str) -> bool:
        """Return whether a file or flag sets an argument of the model, or a part of it, to another value than null."""
        pattern = re.compile(rf"model\.{re.escape(key)}(\+|\..+)?")
        return any(
            value is not None and pattern.fullmatch(name)
            for source in self.sources
            for name, value in source.settings.items()
        )

    def checkpoint(self) -> str | None:
        """Return the path of the checkpoint (``ckpt_path``), or None.

        Raises:
            InputError: it is not an existing file.
        """
        path = self.last("ckpt_path")
        if path is None:
            return None
        if not isinstance(path, str):
            raise InputError(f"ckpt_path must be the path of a file, got {path!r}")
        require_file(path, "ckpt_path")
        return path

    def import_classes(self) -> None:
        """Import plugins and the modules of all classes that files and flags name.

        Raises:
            InputError: a module cannot be imported.
        """
        add_working_folder()
        for name in self.plugins:
            import_plugin(name)
        for source in self.sources:
            for key, value in source.settings.items():
                is_class = key.endswith((".class_path", ".help")) or key.removesuffix("+") in CLASS_MODULES
                values = [value] if isinstance(value, str) and is_class else []
                values += [one for one in value if isinstance(one, str)] if isinstance(value, list) and is_class else []
                for path in [*values, *_class_paths(value)]:
                    import_class(path, key, f"{source.name}: " if source.is_file else "")


def _class_paths(value: Any) -> Iterator[str]:
    """Yield all class paths in a list of classes with arguments."""
    if isinstance(value, list):
        for one in value:
            yield from _class_paths(one)
    elif isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        yield from _class_paths(list(value.values()))


def check_order(line: CommandLine) -> list[str]:
    """Check for settings that a later file overrides against the user's intention.

    The file of a task, which names the class of the model, must come first, because other files modify it. Otherwise it
    would silently override settings of the model or the data, which is an error. A flag, or any other setting of a file
    before the task, that a later file overrides is worth a warning. All other overrides are intended.

    Returns:
        Warnings, one line each.

    Raises:
        InputError: the file of a task overrides model or data settings of an earlier file.
    """
    warnings = []
    has_class = False
    for i, source in enumerate(line.sources):
        names_class = "model.class_path" in source.settings or "model" in source.settings
        later = [other for other in line.sources[i + 1 :] if other.is_file]
        if source.is_file and not has_class and not names_class:
            later = [other for other in later if "model.class_path" in other.settings][:1]
            for task in later:
                if not (overridden := _overridden(source, task)):
                    continue
                changes = ", ".join(f"{key} ({was!r} becomes {now!r})" for key, was, now in overridden)
                if any(key.startswith(("model.", "data.")) for key in source.settings):
                    raise InputError(
                        f"{task.name} comes after {source.name} and would override its {changes}; give the task's file "
                        f"first: --config {task.name} --config {source.name}"
                    )
                warnings.append(f"{task.name} comes after {source.name} and overrides its {changes}")
        elif not source.is_file:
            for other in later:
                warnings += [
                    f"{other.name} comes after --{key} {was!r} and overrides it by {now!r}; give flags after files"
                    for key, was, now in _overridden(source, other)
                ]
        has_class |= names_class
    return warnings


def _overridden(earlier: Source, later: Source) -> list[tuple[str, Any, Any]]:
    """Return key, old value and new value of each setting that a later source changes."""
    changes = []
    for key, value in earlier.settings.items():
        plain = key.removesuffix("+")
        if plain in later.settings and later.settings[plain] != value:
            changes.append((plain, value, later.settings[plain]))
    return changes


def validate_strategy_combination(line: CommandLine) -> None:
    """Check that no file freezes the base while another one trains or adapts it.

    Raises:
        InputError: two files contradict each other.
    """
    trains: dict[bool, str] = {}
    surgery = None
    for file in filter(lambda source: source.is_file, line.sources):
        if (value := file.settings.get("model.train_base")) is not None:
            trains[bool(value)] = file.name
        if file.settings.get("model.surgery") or file.settings.get("model.surgery+"):
            surgery = file.name
    if len(trains) == 2:
        raise InputError(
            f"{trains[True]} trains the base and {trains[False]} does not (train_base); use only one of them"
        )
    if surgery is not None and trains.get(False, surgery) != surgery:
        raise InputError(
            f"{surgery} adapts the base and {trains[False]} freezes it (a linear probe); use only one of them"
        )


WINDOWS = os.name == "nt"
# Characters that are not allowed, dots and blanks at the end, which are dropped, and names of devices.
_INVALID_ON_WINDOWS = re.compile(r'[<>:"|?*]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def check_name(name: str, key: str = "name") -> None:
    """Check that the name or version of a run is a valid path below the folder of all runs.

    Raises:
        InputError: it is not.
    """
    parts = PurePath(name).parts
    if not parts or {"/", "\\", "..", "~"} & {*parts, parts[0][:1]} or not name.isprintable() or "\\" in name:
        raise InputError(f"{key} must be the name of a folder below {RUNS}, such as my_run, got {name!r}")
    if WINDOWS and any(_INVALID_ON_WINDOWS.search(part) for part in parts):
        raise InputError(f"{key} must be a valid name of a folder on Windows, got {name!r}")
    if any(len(part.encode()) > 200 for part in parts):
        raise InputError(f"{key} must have at most 200 bytes, got {name[:50]!r}...")


MIN_VALUES = {  # of numbers that Lightning checks late or not at all
    "checkpoint_every_n_steps": 1,
    "early_stopping_patience": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.max_epochs": -1,
    "trainer.max_steps": -1,
    "trainer.num_nodes": 1,
}


def check_ranges(config: Any) -> None:
    """Check numbers of the trainer and the folder of all runs.

    Args:
        config: the parsed configuration of a command.

    Raises:
        InputError: a number is out of range, or the folder is a file.
    """
    for key, least in MIN_VALUES.items():
        if (value := config.get(key)) is not None and value < least:
            raise InputError(f"{key} must be at least {least}, got {value}")
    interval = config.trainer.val_check_interval
    if isinstance(interval, int | float) and interval <= 0:
        raise InputError(f"trainer.val_check_interval must be greater than 0, got {interval}")
    root = config.trainer.default_root_dir
    if root is not None and "://" not in str(root) and Path(root).exists() and not Path(root).is_dir():
        raise InputError(f"trainer.default_root_dir must be a folder, got the file {root}")


def check_shape(file: str, settings: dict[str, Any]) -> None:
    """Check the kinds of values that the parser ignores, or reports without their key.

    Args:
        file: name of the configuration file, for error messages.
        settings: its content.

    Raises:
        InputError: a group of keys is not a mapping, or a class has other keys than class_path and init_args.
    """
    for group in ("model", "data", "trainer"):
        kinds: Any = dict if group == "trainer" else dict | str | None  # a name of a class, or a default
        if group in settings and not isinstance(settings[group], kinds):
            raise InputError(f"{file}: {group} must be a mapping of keys to values, got {settings[group]!r}")
    _check_classes(file, settings, "")


def _check_classes(file: str, settings: Any, key: str) -> None:
    """Check that all classes below a key, which is empty for a whole file, have only the keys of a class."""
    prefix = f"{key}." if key else ""
    if isinstance(settings, list):
        for i, value in enumerate(settings):
            _check_classes(file, value, f"{key}[{i}]")
    if not isinstance(settings, dict):
        return
    if {"class_path", "init_args"} & settings.keys():
        for name, kind, expected in (("class_path", str, "the name of a class"), ("init_args", dict, "a mapping")):
            if name in settings and not isinstance(settings[name], kind):
                raise InputError(f"{file}: {prefix}{name} must be {expected}, got {settings[name]!r}")
        if unknown := [name for name in settings if name not in ("class_path", "init_args", "dict_kwargs")]:
            raise InputError(f"{file}: unknown key {prefix}{unknown[0]}; a class has class_path and init_args")
    for name, value in settings.items():
        _check_classes(file, value, f"{prefix}{name}")


def run_to_resume(checkpoint: Path, root: Path) -> Path | None:
    """Return the folder of the run that a ``last.ckpt`` resumes, relative to ``root``; None for other checkpoints."""
    run = checkpoint.expanduser().resolve().parents[1]
    if checkpoint.name != "last.ckpt" or not (run / "config.yaml").is_file() or not run.is_relative_to(root.resolve()):
        return None
    return run.relative_to(root.resolve())


# Settings that may change when a run is resumed: locations, speed, outputs and decisions.
_MUTABLE_ON_RESUME = {
    *("base", "config", "tokenizer", "compile", "activation_checkpointing", "batch_size", "eval_batch_size"),
    *("num_val_samples", "temperature", "top_p", "line_length_bias", "max_new_tokens", "threshold"),
}
_MUTABLE_SURGERY_ARGUMENTS = {"folder", "dropout", "loraplus_lr_ratio", "init_text"}
_STRATEGIES = ("gpt2_pl.callbacks.DiscriminativeLR", "gpt2_pl.callbacks.GradualUnfreezing")


def _immutable_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings by key that must not change when a run is resumed."""
    immutable = {"seed_everything": settings.get("seed_everything")}
    for part in ("model", "data"):
        content = settings.get(part) or {}
        immutable[f"{part}.class_path"] = content.get("class_path")
        for key, value in (content.get("init_args") or {}).items():
            if key not in _MUTABLE_ON_RESUME and not key.endswith("_file"):
                immutable[f"{part}.{key}"] = list(map(_immutable_surgery, value or [])) if key == "surgery" else value
    callbacks = (settings.get("trainer") or {}).get("callbacks") or []
    immutable["trainer.callbacks"] = [callback for callback in callbacks if callback["class_path"] in _STRATEGIES]
    return immutable


def _immutable_surgery(surgery: dict[str, Any]) -> dict[str, Any]:
    arguments = surgery.get("init_args") or {}
    return {**surgery, "init_args": {k: v for k, v in arguments.items() if k not in _MUTABLE_SURGERY_ARGUMENTS}}


def check_same_settings(file: Path, settings: dict[str, Any]) -> None:
    """Check that a run is resumed with the settings of its config.yaml.

    Other settings would partly be ignored: a checkpoint restores the state of the optimizer, including learning rates.

    Args:
        file: config.yaml of the run; a missing one is not checked.
        settings: configuration of the command.

    Raises:
        InputError: a setting differs.
    """
    if not file.is_file():
        return
    content = read_yaml(file)
    saved = _immutable_settings(content if isinstance(content, dict) else {})
    current = _immutable_settings(settings)
    for key in saved.keys() & current.keys():
        if saved[key] != current[key]:
            raise InputError(
                f"{key} must be {saved[key]}, as in the resumed run ({file}), got {current[key]}; start a new run "
                "without ckpt_path to change it"
            )


def with_hyperparameters(line: CommandLine, checkpoint: str) -> list[str]:
    """Return the parser's arguments with the hyperparameters of a checkpoint as the first configuration file.

    Files and flags override the hyperparameters.

    Args:
        line: the command line.
        checkpoint: path of the checkpoint.

    Raises:
        InputError: the checkpoint is invalid.
    """
    content = read(checkpoint, "ckpt_path", Task)
    stored = dict(content["hyper_parameters"])
    stored.pop("num_classes", None)  # determined by the data
    stored.pop("label_token_ids", None)
    for key, other in (("base", "config"), ("config", "base")):
        if line.states(key):
            stored.pop(other, None)  # a model has either a base or a config
    if line.states("surgery"):
        stored.pop("surgery", None)  # otherwise the parser would append to it
    else:
        stored["surgery"] = [build(settings).settings() for settings in stored.get("surgery") or []] or None
    layer = {"model": {"class_path": content["task"], "init_args": stored}}
    return [line.command, "--config", yaml.safe_dump(layer), *line.arguments[1:]]
