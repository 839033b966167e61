"""What the command line says, before it is parsed: files and flags in order, and what a checkpoint adds to them."""

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
    """A configuration file or a flag.

    Args:
        name: the file as it was named, or the flag without its dashes.
        settings: the values that it states, by key, such as ``model.optimizer.init_args.lr``.
        is_file: whether it is a configuration file.
    """

    name: str
    settings: dict[str, Any]
    is_file: bool = False


def _flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The values below a key, by their own keys; lists are values. The arguments of ``model`` are keys of it."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        yield re.sub(r"^(model|data)\.init_args\.", r"\1.", key), value


class CommandLine:
    """The arguments of fit, validate, test and predict, read once: files and flags in their order, later over earlier.

    Args:
        args: from the subcommand on.

    Attributes:
        command: the subcommand.
        sources: files and flags, in order.
        arguments: what the parser reads: ``args`` without ``--plugin``.
        plugins: the modules that ``--plugin`` names.
        without_value: flags that stand alone.

    Raises:
        InputError: no such file, one that is not YAML, one that is too large or too deep, or one whose keys hold what
            they cannot.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.command, *rest = args
        self.sources: list[Source] = []
        self.plugins: list[str] = []
        self.arguments = [self.command]
        self.without_value: list[str] = []
        while rest:
            typed = [rest.pop(0)]
            typed[0] = typed[0].replace("+.help", ".help", 1) if typed[0].startswith("--") else typed[0]
            name, equals, value = typed[0].partition("=")
            if not equals and name.startswith("-") and rest and not rest[0].startswith("--"):
                typed.append(value := rest.pop(0))
            if name == "--plugin":
                self.plugins.append(value)
                continue
            has_value = bool(equals) or len(typed) == 2
            if name in ("-c", "--config") and has_value:
                file = config_path(value)
                self.arguments.append(f"{name}={file}") if equals else self.arguments.extend([name, str(file)])
                self._add_file(value, file)
            elif name.startswith("--") and not has_value:
                self.without_value.append(name)
                self.arguments.append(name)
                self._add_flag(name.removeprefix("--"), None)
            elif name.startswith("--"):
                joined = equals or (value.startswith("-") and value not in ("-c", "-h"))
                self.arguments += [f"{name}={value}"] if joined else [name, value]
                self._add_flag(name.removeprefix("--"), value)
            elif not name.startswith("-c"):
                self.arguments += typed
            else:
                raise InputError(f"{typed[0]} is no flag; a configuration file is given as --config FILE")

    def _add_file(self, name: str, file: Path) -> None:
        content = read_yaml(file)
        if content is None:
            raise InputError(f"config: {name} holds no settings; it must hold keys, such as model, data and trainer")
        if isinstance(content, dict):
            check_shape(name, content)
            self.sources.append(Source(name, dict(_flatten(content, "")), is_file=True))

    def _add_flag(self, key: str, text: str | None) -> None:
        try:
            value = None if text is None else load_yaml(text, f"--{key}")
        except DuplicateKeyError:
            raise
        except InputError:
            value = text
        if isinstance(value, str | None) and text is not None and "#" in text:
            value = text  # the parser takes no part of it for a comment either
        self.sources.append(Source(key, dict(_flatten(value, key))))

    @property
    def files(self) -> list[str]:
        """The configuration files' names, in order; those that are empty are left out."""
        return [source.name for source in self.sources if source.is_file]

    def last(self, key: str) -> Any:
        """The value that the last file or flag with this key states; None if there is none."""
        return next((s.settings[key] for s in reversed(self.sources) if key in s.settings), None)

    def has_flag(self, *keys: str) -> bool:
        """Whether one of these keys is a flag."""
        return any(not source.is_file and source.name in keys for source in self.sources)

    def states(self, key: str) -> bool:
        """Whether a file or flag states an argument of the model, or a part of it; null states nothing."""
        pattern = re.compile(rf"model\.{re.escape(key)}(\+|\..+)?")
        return any(
            value is not None and pattern.fullmatch(name)
            for source in self.sources
            for name, value in source.settings.items()
        )

    def checkpoint(self) -> str | None:
        """The file that ``ckpt_path`` names.

        Raises:
            InputError: it is not a file.
        """
        path = self.last("ckpt_path")
        if path is None:
            return None
        if not isinstance(path, str):
            raise InputError(f"ckpt_path must be the name of a file, got {path!r}")
        require_file(path, "ckpt_path")
        return path

    def import_classes(self) -> None:
        """Import plugins, and the modules of the classes that files and flags name: they are the user's own choice.

        Raises:
            InputError: a module that cannot be imported.
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
    """The class paths within a list of classes and their arguments."""
    if isinstance(value, list):
        for one in value:
            yield from _class_paths(one)
    elif isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        yield from _class_paths(list(value.values()))


def check_order(line: CommandLine) -> list[str]:
    """Find settings that a later file overrides though their order says that they should win.

    The file that names the model's class (a task's) is the one that other files change: it comes first. What a file
    before it says about the model or the data would silently be lost. Every other override is as LightningCLI has it,
    later over earlier, and worth a warning where a flag or a file before the task's file loses.

    Returns:
        Warnings, a line each.

    Raises:
        InputError: naming both files, the keys and the values.
    """
    warnings = []
    has_class = False
    for i, source in enumerate(line.sources):
        names_class = "model.class_path" in source.settings or "model" in source.settings
        later = [other for other in line.sources[i + 1 :] if other.is_file]
        if source.is_file and not has_class and not names_class:
            later = [other for other in later if "model.class_path" in other.settings][:1]
            for task in later:
                if not (lost := _lost(source, task)):
                    continue
                told = ", ".join(f"{key} ({was!r} becomes {now!r})" for key, was, now in lost)
                if any(key.startswith(("model.", "data.")) for key in source.settings):
                    raise InputError(
                        f"{task.name} comes after {source.name} and would override its {told}; give the task's file "
                        f"first: --config {task.name} --config {source.name}"
                    )
                warnings.append(f"{task.name} comes after {source.name} and overrides its {told}")
        elif not source.is_file:
            for other in later:
                warnings += [
                    f"{other.name} comes after --{key} {was!r} and overrides it by {now!r}; give flags after files"
                    for key, was, now in _lost(source, other)
                ]
        has_class |= names_class
    return warnings


def _lost(earlier: Source, later: Source) -> list[tuple[str, Any, Any]]:
    """The settings of one source that a later one states otherwise: key, value before and after."""
    lost = []
    for key, value in earlier.settings.items():
        plain = key.removesuffix("+")
        if plain in later.settings and later.settings[plain] != value:
            lost.append((plain, value, later.settings[plain]))
    return lost


def validate_strategy_combination(line: CommandLine) -> None:
    """Refuse two files of which one trains the base, or operates on it, and the other leaves it as it is."""
    trains: dict[bool, str] = {}
    surgery = None
    for file in filter(lambda source: source.is_file, line.sources):
        if (value := file.settings.get("model.train_base")) is not None:
            trains[bool(value)] = file.name
        if file.settings.get("model.surgery") or file.settings.get("model.surgery+"):
            surgery = file.name
    if len(trains) == 2:
        raise InputError(
            f"{trains[True]} trains the base and {trains[False]} does not (train_base); leave one of them out"
        )
    if surgery is not None and trains.get(False, surgery) != surgery:
        raise InputError(
            f"{surgery} operates on the base and {trains[False]} leaves it as it is (a linear probe); leave one out"
        )


WINDOWS = os.name == "nt"
# Characters that mean something else, dots and spaces that are dropped, and devices.
_NOT_OF_WINDOWS = re.compile(r'[<>:"|?*]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def check_name(name: str, key: str = "name") -> None:
    """Refuse a run's name or version that would lead out of the folder of runs, or is none."""
    parts = PurePath(name).parts
    if not parts or {"/", "\\", "..", "~"} & {*parts, parts[0][:1]} or not name.isprintable() or "\\" in name:
        raise InputError(f"{key} is {name!r}; it must be a folder's name, such as my_run, below {RUNS}")
    if WINDOWS and any(_NOT_OF_WINDOWS.search(part) for part in parts):
        raise InputError(f"{key} is {name!r}; Windows has no folders of such a name")
    if any(len(part.encode()) > 200 for part in parts):
        raise InputError(f"{key} is {name[:50]!r} and longer; a folder's name has at most 200 bytes")


MIN_VALUES = {
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
    for key, least in MIN_VALUES.items():
        if (value := config.get(key)) is not None and value < least:
            raise InputError(f"{key} is {value}; it must be at least {least}")
    interval = config.trainer.val_check_interval
    if isinstance(interval, int | float) and interval <= 0:
        raise InputError(f"trainer.val_check_interval is {interval}; it must be above 0")
    root = config.trainer.default_root_dir
    if root is not None and "://" not in str(root) and Path(root).exists() and not Path(root).is_dir():
        raise InputError(f"trainer.default_root_dir is {root}; it must be a folder")


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
            if name in settings and not isinstance(settings[name], kind):
                what = "a class's name" if kind is str else "keys"
                raise InputError(f"{file}: {key}.{name} is {settings[name]!r}; it must be {what}")
        if wrong := [name for name in settings if name not in ("class_path", "init_args", "dict_kwargs")]:
            raise InputError(f"{file}: {key}.{wrong[0]} is no key; a class has class_path and init_args")
    for name, value in settings.items():
        check_shape(file, value, f"{key}.{name}".removeprefix("."))


def run_to_resume(checkpoint: Path, root: Path) -> Path | None:
    """The folder, below ``root``, of the run that a last checkpoint is to go on; None of any other checkpoint."""
    run = checkpoint.expanduser().resolve().parents[1]
    if checkpoint.name != "last.ckpt" or not (run / "config.yaml").is_file() or not run.is_relative_to(root.resolve()):
        return None
    return run.relative_to(root.resolve())


# What may be otherwise when a run goes on: where files lie, how things are computed, what is written and decided.
_FREE = {
    *("base", "config", "tokenizer", "compile", "activation_checkpointing", "batch_size", "eval_batch_size"),
    *("num_val_samples", "temperature", "top_p", "line_length_bias", "max_new_tokens", "threshold"),
}
_FREE_OF_SURGERY = {"folder", "dropout", "loraplus_lr_ratio", "init_text"}
_STRATEGIES = ("gpt2_pl.callbacks.DiscriminativeLR", "gpt2_pl.callbacks.GradualUnfreezing")


def _settings_that_stay(settings: dict[str, Any]) -> dict[str, Any]:
    """By key, what a run that goes on goes on with."""
    found = {"seed_everything": settings.get("seed_everything")}
    for part in ("model", "data"):
        stated = settings.get(part) or {}
        found[f"{part}.class_path"] = stated.get("class_path")
        for key, value in (stated.get("init_args") or {}).items():
            if key == "surgery":
                value = [
                    {
                        **one,
                        "init_args": {
                            k: v for k, v in (one.get("init_args") or {}).items() if k not in _FREE_OF_SURGERY
                        },
                    }
                    for one in value or []
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
    content = read_yaml(file)
    before = _settings_that_stay(content if isinstance(content, dict) else {})
    now = _settings_that_stay(settings)
    for key in before.keys() & now.keys():
        if before[key] != now[key]:
            raise InputError(
                f"{key} is {now[key]}; the run that goes on has {before[key]} ({file}): leave it at that, or begin a "
                "run without ckpt_path"
            )


def with_hyperparameters(line: CommandLine, checkpoint: str) -> list[str]:
    """The parser's arguments with the checkpoint's hyperparameters below all files and flags, as a first file."""
    content = read(checkpoint, "ckpt_path", Task)
    stored = dict(content["hyper_parameters"])
    stored.pop("num_classes", None)  # the data's to say
    stored.pop("label_token_ids", None)
    for key, other in (("base", "config"), ("config", "base")):
        if line.states(key):
            stored.pop(other, None)  # a model has one of the two
    if line.states("surgery"):
        stored.pop("surgery", None)  # theirs would be added to it
    else:
        stored["surgery"] = [build(settings).settings() for settings in stored.get("surgery") or []] or None
    layer = {"model": {"class_path": content["task"], "init_args": stored}}
    return [line.command, "--config", yaml.safe_dump(layer), *line.arguments[1:]]
