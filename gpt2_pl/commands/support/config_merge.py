"""Configuration files and flags in their order, before they are parsed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gpt2_pl.commands.support.plugins import CLASS_MODULES, add_working_folder, import_class, import_plugin
from gpt2_pl.configs import config_path
from gpt2_pl.errors import InputError
from gpt2_pl.filesystem import require_file
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


def as_list(value: Any) -> list[Any]:
    """Return a setting of one or several values as a list, which is empty for None."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each leaf below a key; lists are leaves, and keys omit the top ``init_args``."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        yield re.sub(r"^(model|data)\.init_args\.", r"\1.", key), value


def _parse_value(key: str, text: str) -> Any:
    """Return the value of a flag; text that is not YAML, or has a ``#``, is itself the value, as in the parser."""
    try:
        value = load_yaml(text, f"--{key}")
    except DuplicateKeyError:
        raise
    except InputError:
        return text
    return text if "#" in text and isinstance(value, str | None) else value


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
            name, is_joined, text = argument.partition("=")
            value: str | None = text if is_joined else None
            if not is_joined and name.startswith("-") and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            if name == "--plugin":
                self.plugins.append(value or "")
            elif name in ("-c", "--config") and value is not None:
                self._add_config(value)
            elif name.startswith("--"):
                self._add_flag(name, value, bool(is_joined))
            elif not name.startswith("-c"):
                self.arguments += [argument] if is_joined or value is None else [argument, value]
            else:
                raise InputError(f"unknown flag {argument}; give a configuration file as --config FILE")

    def _add_config(self, name: str) -> None:
        file = config_path(name)
        self.arguments.append(f"--config={file}")
        content = read_yaml(file)
        if content is None:
            message = f"config: {name} is empty; it must have keys, such as model, data and trainer"
            raise InputError(message, key="config")
        if isinstance(content, dict):
            check_shape(name, content)
            self.sources.append(Source(name, dict(_flatten(content, "")), is_file=True))

    def _add_flag(self, flag: str, text: str | None, is_joined: bool) -> None:
        key = flag.removeprefix("--")
        value: Any = text
        if text is None:
            self.without_value.append(flag)
            self.arguments.append(flag)
        else:
            is_joined |= text.startswith("-") and text not in ("-c", "-h")
            self.arguments += [f"{flag}={text}"] if is_joined else [flag, text]
            value = _parse_value(key, text)
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
            raise InputError(key="ckpt_path", value=path, expected="the path of a file")
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
    names_class = [not source.settings.keys().isdisjoint({"model", "model.class_path"}) for source in line.sources]
    first_with_class = [*names_class, True].index(True)
    for i, source in enumerate(line.sources):
        later = [other for other in line.sources[i + 1 :] if other.is_file]
        if not source.is_file:
            warnings += [
                f"{other.name} comes after --{key} {was!r} and overrides it by {now!r}; give flags after files"
                for other in later
                for key, was, now in _overridden(source, other)
            ]
        elif i < first_with_class:
            task = next((other for other in later if "model.class_path" in other.settings), None)
            if task is None:
                continue
            changes = ", ".join(f"{key} ({was!r} becomes {now!r})" for key, was, now in _overridden(source, task))
            if changes and any(key.startswith(("model.", "data.")) for key in source.settings):
                raise InputError(
                    f"{task.name} comes after {source.name} and would override its {changes}; give the task's file "
                    f"first: --config {task.name} --config {source.name}",
                    key="config",
                )
            if changes:
                warnings.append(f"{task.name} comes after {source.name} and overrides its {changes}")
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
    message = ""
    if len(trains) == 2:
        message = f"{trains[True]} trains the base and {trains[False]} does not (train_base)"
    elif surgery is not None and trains.get(False, surgery) != surgery:
        message = f"{surgery} adapts the base and {trains[False]} freezes it (a linear probe)"
    if message:
        raise InputError(f"{message}; use only one of them", key="model.train_base")


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
        value = settings.get(group, {})
        if not isinstance(value, kinds):
            raise InputError(key=group, value=value, expected="a mapping of keys to values", source=file)
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
                raise InputError(key=f"{prefix}{name}", value=settings[name], expected=expected, source=file)
        if unknown := [
            f"{prefix}{name}" for name in settings if name not in ("class_path", "init_args", "dict_kwargs")
        ]:
            hint = "a class has class_path and init_args"
            raise InputError(f"unknown key {unknown[0]}; {hint}", key=unknown[0], source=file)
    for name, value in settings.items():
        _check_classes(file, value, f"{prefix}{name}")
