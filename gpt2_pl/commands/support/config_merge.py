"""Configuration files and flags in their order, before they are parsed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gpt2_pl.commands.support.plugins import CLASS_KEYS, add_working_folder, import_class, import_plugin
from gpt2_pl.configs import config_path
from gpt2_pl.errors import InputError, require, shorten
from gpt2_pl.filesystem import require_file
from gpt2_pl.utils.yaml_json import DuplicateKeyError, load_yaml, read_yaml


class Source(NamedTuple):
    """Configuration file or flag.

    Args:
        name: name of the file on the command line, or name of the flag without dashes.
        settings: values by key without ``init_args``, such as ``model.optimizer.lr``.
        is_file: whether the source is a configuration file.
    """

    name: str
    settings: dict[str, Any]
    is_file: bool = False


def as_list(value: Any) -> list[Any]:
    """Return a setting of one or several values as a list, which is empty for None."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each leaf below a key; lists are leaves, and keys omit ``init_args``."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key.replace(".init_args.", "."), value


def _parse_value(key: str, text: str) -> Any:
    """Return the value of a flag; text that is not YAML, or has a ``#``, is itself the value, as in the parser."""
    try:
        value = load_yaml(text, f"--{key}")
    except DuplicateKeyError:
        raise
    except InputError:
        return text
    return text if "#" in text and isinstance(value, str | None) else value


SHORT_FORMS = ("task", "strategy", "lr")
"""Flags that stand for others: ``--task X`` for ``--config task/X``, ``--lr X`` for the optimizer's learning rate."""
_LEARNING_RATE = "model.optimizer.init_args.lr"
_WITHOUT_VALUE = ("help", "print_config", "print_shtab")  # flags that may have no value


class CommandLine:
    """Arguments of fit, validate, test and predict: files and flags in their order; later ones override earlier ones.

    Args:
        args: the subcommand and its arguments.

    Attributes:
        command: the subcommand.
        sources: files and flags in their order.
        arguments: arguments for the parser: ``args`` without ``--plugin``.
        plugins: modules that ``--plugin`` names.

    Raises:
        InputError: a flag has no value, or a file is missing, is not YAML, is too large or too deeply nested, or has a
            value of the wrong kind.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.command, *rest = args
        self.sources: list[Source] = []
        self.plugins: list[str] = []
        self.arguments = [self.command]
        while rest:
            argument = rest.pop(0)
            if not argument.startswith("--"):
                if argument.startswith("-c"):
                    raise InputError(f"unknown flag {argument}; give a configuration file as --config FILE")
                self.arguments.append(argument)
                continue
            flag, is_joined, text = argument.partition("=")
            if not is_joined and rest and not rest[0].startswith("--"):
                is_joined, text = "=", rest.pop(0)
            self._add_flag(re.sub(r"\+\.help$", ".help", flag), text if is_joined else None)

    def _add_flag(self, flag: str, text: str | None) -> None:
        key = flag.removeprefix("--")
        if text is None and key.rpartition(".")[2] not in _WITHOUT_VALUE:
            raise InputError(f"{flag} needs a value; one that begins with -- is given as {flag}=VALUE", key=key)
        if flag == "--lr":
            flag, key = f"--{_LEARNING_RATE}", _LEARNING_RATE
        if flag == "--plugin":
            self.plugins.append(str(text))
        elif flag == "--config":
            self._add_config(str(text))
        elif key in SHORT_FORMS:
            name = str(text)
            self._add_config(name if "/" in name or name.endswith(".yaml") else f"{key}/{name}", key)
        else:
            self.arguments.append(flag if text is None else f"{flag}={text}")
            value = None if text is None else _parse_value(key, text)
            self.sources.append(Source(key, dict(_flatten(value, key))))

    def _add_config(self, name: str, key: str = "config") -> None:
        file = config_path(name, key)
        self.arguments.append(f"--config={file}")
        content = read_yaml(file)
        check_shape(name, content)
        self.sources.append(Source(name, dict(_flatten(content, "")), is_file=True))

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
        require(isinstance(path, str), "ckpt_path", path, "the path of a file")
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
                is_class = key.endswith((".class_path", ".help")) or key.removesuffix("+") in CLASS_KEYS
                paths = [path for path in as_list(value) if isinstance(path, str)] if is_class else []
                for path in [*paths, *_class_paths(value)]:
                    import_class(path, key, source.name if source.is_file else "")


def _class_paths(value: Any) -> Iterator[str]:
    """Yield all class paths in a list of classes with arguments."""
    if isinstance(value, list):
        for one in value:
            yield from _class_paths(one)
    elif isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        yield from _class_paths(list(value.values()))


def check_order(line: CommandLine) -> None:
    """Check that the file of a task, which names the class of the model, comes first.

    Other files modify the task. The task's file after one of them would silently override its settings.

    Raises:
        InputError: the file of a task overrides a setting of an earlier file about the model or the data.
    """
    names_class = [not source.settings.keys().isdisjoint({"model", "model.class_path"}) for source in line.sources]
    first = names_class.index(True) if True in names_class else 0
    for source in line.sources[:first]:
        task = line.sources[first]
        is_part = source.is_file and any(key.startswith(("model.", "data.")) for key in source.settings)
        if is_part and task.is_file and (changes := _overridden(source, task)):
            raise InputError(
                f"{task.name} comes after {source.name} and would override its {changes}; give the task's file first: "
                f"--config {task.name} --config {source.name}",
                key="config",
            )


def _overridden(earlier: Source, later: Source) -> str:
    """Return key, old value and new value of each setting that a later source changes, as text."""
    changes = []
    for key, value in earlier.settings.items():
        plain = key.removesuffix("+")
        if plain in later.settings and later.settings[plain] != value:
            changes.append(f"{plain} ({value!r} becomes {later.settings[plain]!r})")
    return ", ".join(changes)


def validate_strategy_combination(line: CommandLine) -> None:
    """Check that no file freezes the base while another one trains or adapts it.

    Raises:
        InputError: two files contradict each other.
    """
    trains: dict[bool, str] = {}
    surgery = ""
    for file in filter(lambda source: source.is_file, line.sources):
        if (value := file.settings.get("model.train_base")) is not None:
            trains[bool(value)] = file.name
        if file.settings.get("model.surgery") or file.settings.get("model.surgery+"):
            surgery = file.name
    other = trains.get(True, surgery)
    if other and trains.get(False, other) != other:
        message = f"{other} trains or adapts the base and {trains[False]} freezes it (train_base); use only one"
        raise InputError(message, key="model.train_base")


_CLASS_PARTS = {"class_path": str, "init_args": dict, "dict_kwargs": dict}  # keys of a class, and kinds of their values


def check_shape(file: str, settings: Any) -> None:
    """Check the kinds of values that the parser ignores, or reports without their key.

    Args:
        file: name of the configuration file, for error messages.
        settings: its content.

    Raises:
        InputError: the file or its trainer is not a mapping, or a class has other keys than class_path and init_args.
    """
    require(isinstance(settings, dict), "config", settings, "a mapping of keys to values", file)
    trainer = settings.get("trainer", {})
    require(isinstance(trainer, dict), "trainer", trainer, "a mapping of keys to values", file)
    _check_classes(file, settings, "")


def _check_classes(file: str, settings: Any, key: str) -> None:
    """Check that all classes below a key, which is empty for a whole file, have only the keys of a class."""
    if isinstance(settings, list):
        for i, value in enumerate(settings):
            _check_classes(file, value, f"{key}[{i}]")
    if not isinstance(settings, dict):
        return
    is_class = not settings.keys().isdisjoint(_CLASS_PARTS)
    for name, value in settings.items():
        inner = f"{key}.{name}" if key else str(name)
        if is_class and not isinstance(value, _CLASS_PARTS.get(name, ())):
            parts = "a class has class_path (text) and init_args (a mapping)"
            raise InputError(f"unknown key or value {inner}: {shorten(value)}; {parts}", key=inner, source=file)
        _check_classes(file, value, inner)
