"""The argument parser's messages of many lines as one: the file, the key, what it must be, and the nearest name."""

from __future__ import annotations

import inspect
import json
import pydoc
import re
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt2_pl.commands.support.config_merge import CommandLine
from gpt2_pl.commands.support.plugins import CLASS_MODULES, nearest_class
from gpt2_pl.errors import (
    MACHINE_ERRNOS,
    InputError,
    RunError,
    causes,
    describe_failure,
    did_you_mean,
    error_number,
    is_out_of_memory,
    shorten,
)
from gpt2_pl.tasks.checkpoint import arguments
from gpt2_pl.utils.user_code import find_fault, is_installed

_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
    "tip:",
)
_CLASS_EXPECTED = ("Not a valid subclass of", "Expected a dot import path string", "Expected an import path or")
_CALLABLE = re.compile(r"Type \S.* expects a function or a callable class: ")
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "collections.abc.Iterable": "a list",
    "dict": "a mapping",
}
_CLASS = "a class path"
_OF_ARGUMENTS = (  # what unsuitable arguments of a class raise where it does not check them
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(MisconfigurationException, RuntimeError, TypeError, ValueError),
)
_TASK_FIRST = "the task comes first: --config task/sst5 --config strategy/full"
_ABSTRACT = ("gpt2_pl.tasks.Task", "gpt2_pl.tasks.base.Task", "lightning.LightningDataModule")  # until a task is given


class _Problem(NamedTuple):
    """A line of a message, with the key, the class and the value that it is about."""

    depth: int
    key: str
    class_path: str
    text: str
    value: str


def check_keys(line: CommandLine, parser: ArgumentParser) -> None:
    """Refuse unknown keys at the top of a file, which the parser ignores where they hold nothing.

    Raises:
        InputError: naming the file, the key and the nearest one.
    """
    known = {name.removeprefix("--").partition(".")[0] for name in parser._option_string_actions}
    for source in filter(lambda source: source.is_file, line.sources):
        for key in source.settings:
            if (head := key.partition(".")[0].removesuffix("+")) not in known:
                raise InputError(f"{source.name}: there is no key {head}{did_you_mean(head, known)}")


def explain(message: str, line: CommandLine, parser: ArgumentParser) -> str:
    """Rewrite a message of jsonargparse as one line; what is not understood keeps the parser's words.

    Args:
        message: of one or more lines.
        line: what was parsed.
        parser: the subcommand's.
    """
    names = [name for name in parser._option_string_actions if name.startswith("--")]
    if found := re.match(r"unrecognized arguments: (?:.* )?(--[^\s=]+)", message):
        return f"there is no option {found[1]}{_nearest_option(found[1], names)}"
    if found := re.search(r"does not accept option '(.+?)'", message):
        near = _nearest_option(found[1], [name.removeprefix("--") for name in names])
        return f"{_file(line, found[1], '')}there is no key {found[1]}{near}"
    if found := re.match(r"argument (\S+): expected one argument", message):
        alone = [name for name in line.without_value if name.startswith(f"{found[1].partition('.')[0]}.")]
        name = alone[0] if alone else found[1]
        return f"{name} needs a value; one that begins with -- is given as {name}=VALUE"
    if "are required" in message and "Parser key" not in message:
        return f"{' '.join(message.split())}; {_TASK_FIRST}"
    problems = list(_problems(message))
    deepest = [problem for problem in problems if problem.depth == max(problem.depth for problem in problems)]
    if not deepest or not deepest[0].key:
        lines = [text for raw in message.splitlines() if (text := raw.strip()) and not text.startswith(_NOISE)]
        return " ".join(lines or message.split())
    _, key, class_path, _, value = deepest[0]
    for problem in deepest:
        if found := re.search(r"Option '(.+?)\+?' is not accepted", problem.text):
            option, cls = found[1], pydoc.locate(class_path)
            near = did_you_mean(option, arguments(cls)) if inspect.isclass(cls) else ""
            near = f"; {_TASK_FIRST}" if class_path in _ABSTRACT else near
            return f"{_file(line, f'{key}.{option}', '')}{key}: {class_path} has no argument {option!r}{near}"
        if found := re.search(r"following arguments are required: (.+)", problem.text):
            missing = found[1].split(", ")
            flags = " ".join(f"--{key}.{name} VALUE" for name in missing)
            return f"{_file(line, key, value)}{key}: {class_path} needs {' and '.join(missing)}; give {flags}"
    kinds, choices, rest = _expected([problem.text for problem in deepest])
    where, reasons = _file(line, key, value), "; ".join(rest)
    if not kinds and not choices:
        return f"{where}{key}: {reasons}" + (f"; got {value[:200]}" if value and value not in reasons else "")
    if _CLASS in kinds and len(kinds) > 1 and key not in CLASS_MODULES:  # a tensor, where a number is meant
        kinds.remove(_CLASS)
    if "a number" in kinds and "a whole number" in kinds:
        kinds.remove("a whole number")
    expected = [*kinds, *([f"one of {', '.join(choices)}"] if choices else [])]
    near = did_you_mean(value, choices) or (nearest_class(key, value) if _CLASS in kinds else "")
    hint = _quoting(key, value, line) if expected == ["text"] else ""
    reasons = f" ({reasons})" if reasons else ""
    return f"{where}{key} must be {' or '.join(expected)}, got {value}{reasons}{near}{hint}"


def explain_fault(error: Exception, line: CommandLine) -> str | None:
    """Describe in one line an exception in the user's own code: the key and the class, then file, line and reason.

    Args:
        error: what was raised, or what jsonargparse raised from it.
        line: what was parsed.

    Returns:
        The line; None where the exception does not come from code of the user's own, or is a failure of the machine.
    """
    fault = find_fault(error)
    if fault is None or any(is_out_of_memory(c) or error_number(c) in MACHINE_ERRNOS for c in causes(error)):
        return None
    for cls in map(type, fault.objects):
        if where := _stating_class(line, cls.__name__):
            return f"{where}{cls.__module__}.{cls.__qualname__}: {fault.text}"
    return fault.text


def explain_instantiation(error: Exception, line: CommandLine) -> str | None:
    """Describe in one line why a class of the configuration could not be instantiated.

    Args:
        error: what jsonargparse raised.
        line: what was parsed.

    Returns:
        The line; None where the error is not of that kind, or its own message is to be used.
    """
    reason = next((cause for cause in causes(error) if isinstance(cause, InputError | RunError | ImportError)), None)
    message = str(error)
    if (fault := explain_fault(error, line)) is not None:
        return fault
    if isinstance(reason, InputError | RunError) or not (reason or message.startswith("Does not validate against")):
        return None
    problems = list(_problems(message))
    texts = [str(reason)] if reason else _expected([problem.text for problem in problems])[2]
    texts = [text for text in texts if "does not correspond to a subclass of" not in text] or texts
    paths = [problem.class_path for problem in problems if problem.class_path]
    paths += re.findall(r"class_path='(.+?)'", message)
    where = _stating_class(line, paths[0]) if paths else ""
    return f"{where}{f'{paths[0]}: ' if paths else ''}{' '.join('; '.join(texts or [message]).split())}"


def _stating_class(line: CommandLine, path: str) -> str:
    """The file and the key that state a class, before a colon; nothing where none does."""
    where = ""
    for source in line.sources:
        for key, value in source.settings.items():
            if re.search(rf"\b{path.rpartition('.')[2]}\b", str(value)):
                name = key.replace(".class_path", "").removesuffix("+")
                where = f"{source.name}: {name}: " if source.is_file else f"{name}: "
    return where


def explain_use(error: Exception, line: CommandLine, config: Any, trainer: Trainer) -> str | None:
    """Describe in one line an exception that a class of Lightning's or torch's raised when the trainer used it.

    Some classes check their arguments only then, or not at all: a CSVLogger that flushes every 0 steps divides by 0.

    Args:
        error: what was raised.
        line: what was parsed.
        config: the parsed configuration of the subcommand.
        trainer: the trainer, with its loggers, callbacks, profiler, strategy and plugins.

    Returns:
        The line; None where the exception is a failure of the machine, comes from code of this library or the user's
        own, or from an object that the configuration does not name.
    """
    if not isinstance(error, _OF_ARGUMENTS) or describe_failure(error) is not None:
        return None
    if isinstance(error, torch.distributed.DistError):  # other processes did not come
        return None
    if any(isinstance(cause, InputError | RunError) for cause in causes(error)):
        return None
    made: Any = trainer
    strategy = made.strategy
    plugins = [strategy.precision_plugin, strategy.checkpoint_io, getattr(strategy, "cluster_environment", None)]
    objects = [*made.callbacks, *made.loggers, made.profiler, strategy, *plugins]
    user = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        this = frame.f_locals.get("self")
        if not is_installed(frame):
            user = None
        elif any(this is one for one in objects) and type(this).__module__.startswith(("lightning.", "torch.")):
            user = this
    where = "" if user is None else _stating_class(line, type(user).__name__)
    if not where:
        return None
    kind = "" if isinstance(error, MisconfigurationException | ValueError) else f"{type(error).__name__}: "
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    stated = _stated_arguments(config.trainer, type(user))
    return f"{where}{type(user).__name__} cannot be used with {stated}: {kind}{reason}"


def _stated_arguments(config: Any, cls: type) -> str:
    """The arguments of a class in a configuration that are not the class's defaults, as text."""
    found: dict[str, Any] = {}
    for value in config.__dict__.values():
        for one in value if isinstance(value, list) else [value]:
            if str(getattr(one, "class_path", "")).rpartition(".")[2] == cls.__name__ and hasattr(one, "init_args"):
                found.update(one.init_args.__dict__)
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    changed = [f"{name}: {shorten(value)}" for name, value in found.items() if value != defaults.get(name)]
    return ", ".join(changed) or "its defaults"


def _problems(message: str) -> Iterator[_Problem]:
    """What is wrong; the key and the class that it is about stand above it, less indented, and the value below it."""
    above: list[tuple[int, str, str]] = []  # indent, key, class
    lines = message.splitlines()
    for i, raw in enumerate(lines):
        text = _CALLABLE.sub("", raw.strip().removeprefix("- ")).partition(". Got value: Namespace(")[0]
        indent = len(raw) - len(raw.lstrip())
        while text and above and above[-1][0] >= indent:
            above.pop()
        for pattern in (r'Parser key "(?P<key>.+?)":\s*', r"Problem with given class_path '(?P<cls>.+?)':\s*"):
            if found := re.match(pattern, text):
                above.append((indent, found.groupdict().get("key", ""), found.groupdict().get("cls", "")))
                text = text[found.end() :]
        if text and not text.startswith(_NOISE):
            text, _, value = text.partition(" Got value: ")
            classes = [*(cls for *_, cls in above if cls), *re.findall(r"Namespace\(class_path='(.+?)'", raw)]
            key = ".".join(key for _, key, _ in above if key)
            below = _value_below(lines[i + 1 :])
            yield _Problem(len(above), key, classes[-1] if classes else "", text.rstrip("."), value or below)


def _value_below(lines: list[str]) -> str:
    given = next((text for raw in lines if (text := raw.strip()).startswith("Given value: ")), "")
    value = given.removeprefix("Given value: ").partition(". Got value: Namespace(")[0]
    nested = re.match(r"NestedArg\(key='.*?', val='?(.*?)'?\)$", value)
    return nested[1] if nested else value


def _expected(texts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The kinds of values, the choices, and the texts that say neither."""
    kinds: dict[str, None] = {}
    choices: dict[str, None] = {}
    rest: dict[str, None] = {}
    for text in texts:
        if found := re.match(r"Expected a typing\.Literal\[(.+)\]", text):
            choices.update(dict.fromkeys(name.strip("'") for name in found[1].split(", ")))
        elif found := re.match(r"Expected a <class '(.+?)'>", text):
            kinds[_KINDS.get(found[1], found[1])] = None
        elif text.startswith(_CLASS_EXPECTED):
            kinds[_CLASS] = None
            if "valid subclass" in text and "of Tensor" not in text:
                kinds["a mapping"] = None
        else:
            rest[text] = None
    return list(kinds), list(choices), list(rest)


def _file(line: CommandLine, key: str, value: str) -> str:
    """The file that states a key, before a colon; nothing for a flag, or where it is not certain."""
    stating = []
    for source in line.sources:
        for name, stated in source.settings.items():
            plain = name.replace(".init_args.", ".").replace("+", "")
            if f"{plain}.".startswith(f"{key}.") or f"{key}.".startswith(f"{plain}."):
                stating.append((source, plain == key and str(stated) == value))
    sources = {source.name: source for source, same in stating if same or not any(same for _, same in stating)}
    return f"{found[0].name}: " if len(found := list(sources.values())) == 1 and found[0].is_file else ""


def _quoting(key: str, value: str, line: CommandLine) -> str:
    """How to quote what YAML reads as something else than text."""
    stated = next((s.settings[name] for s in line.sources for name in (key, f"{key}+") if name in s.settings), None)
    example = '["no", "1"]' if isinstance(stated, list) else json.dumps(value, ensure_ascii=False)
    if value.startswith("{"):
        example = '"Review: {sentence}"'
    name = key.rpartition(".")[2]
    return f"; quote text that YAML reads as something else: {name}: {example} in a file, --{key} '{example}' as a flag"


def _nearest_option(option: str, names: list[str]) -> str:
    """The option's nearest name, or that of the group before its first dot."""
    head = option.partition(".")[0]
    if within := [name for name in names if name.startswith(f"{head}.")]:
        return did_you_mean(option, within)
    return did_you_mean(option, names) or did_you_mean(head, {name.partition(".")[0] for name in names})
