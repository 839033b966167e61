"""One-line versions of the argument parser's messages: file, key, expected values and the nearest name."""

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

_IGNORED_LINES = (
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
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "collections.abc.Iterable": "a list",
    "dict": "a mapping",
}
_CLASS = "a class path"
_ARGUMENT_ERRORS = (  # raised by unsuitable arguments that a class does not check
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(MisconfigurationException, RuntimeError, TypeError, ValueError),
)
_TASK_FIRST = "the task comes first: --config task/sst5 --config strategy/full"
_ABSTRACT = ("gpt2_pl.tasks.Task", "gpt2_pl.tasks.base.Task", "lightning.LightningDataModule")  # without a task's file


class _Problem(NamedTuple):
    """Line of a message with its indentation level and the key, class and value that it is about."""

    depth: int
    key: str
    class_path: str
    text: str
    value: str


def check_keys(line: CommandLine, parser: ArgumentParser) -> None:
    """Check that files have only known keys at their top; the parser ignores unknown ones with empty values.

    Args:
        line: the command line.
        parser: parser of the subcommand.

    Raises:
        InputError: a key is unknown; the message names the file and the nearest known key.
    """
    known = {name.removeprefix("--").partition(".")[0] for name in parser._option_string_actions}
    for source in filter(lambda source: source.is_file, line.sources):
        for key in source.settings:
            if (head := key.partition(".")[0].removesuffix("+")) not in known:
                raise InputError(f"{source.name}: unknown key {head}{did_you_mean(head, known)}")


def explain(message: str, line: CommandLine, parser: ArgumentParser) -> str:
    """Rewrite a message of jsonargparse as one line.

    Args:
        message: one or more lines.
        line: the command line.
        parser: parser of the subcommand.

    Returns:
        The line; an unknown message is only joined to one line.
    """
    if (explanation := _explain_option(message, line, parser)) is not None:
        return explanation
    problems = list(_problems(message))
    deepest = [problem for problem in problems if problem.depth == max(problem.depth for problem in problems)]
    if not deepest or not deepest[0].key:
        lines = [text for raw in message.splitlines() if (text := raw.strip()) and not text.startswith(_IGNORED_LINES)]
        return " ".join(lines or message.split())
    for problem in deepest:
        if (explanation := _explain_arguments(problem.text, deepest[0], line)) is not None:
            return explanation
    return _explain_value(deepest, line)


def _explain_option(message: str, line: CommandLine, parser: ArgumentParser) -> str | None:
    """Explain an unknown option or key, or a missing value or option; None for other messages."""
    names = [name for name in parser._option_string_actions if name.startswith("--")]
    if match := re.match(r"unrecognized arguments: (?:.* )?(--[^\s=]+)", message):
        return f"unknown option {match[1]}{_nearest_option(match[1], names)}"
    if match := re.search(r"does not accept option '(.+?)'", message):
        near = _nearest_option(match[1], [name.removeprefix("--") for name in names])
        return f"{_file_of_key(line, match[1], '')}unknown key {match[1]}{near}"
    if match := re.match(r"argument (\S+): expected one argument", message):
        group = f"{match[1].partition('.')[0]}."
        name = next((flag for flag in line.without_value if flag.startswith(group)), match[1])
        return f"{name} needs a value; one that begins with -- is given as {name}=VALUE"
    if "are required" in message and "Parser key" not in message:
        return f"{' '.join(message.split())}; {_TASK_FIRST}"
    return None


def _explain_arguments(text: str, problem: _Problem, line: CommandLine) -> str | None:
    """Explain unknown or missing arguments of a class.

    Args:
        text: a line of the message.
        problem: the first line of the same level, whose key and class are those of ``text``.
        line: the command line.

    Returns:
        The explanation; None if the line is about something else.
    """
    key, class_path = problem.key, problem.class_path
    if match := re.search(r"Option '(.+?)\+?' is not accepted", text):
        option, cls = match[1], pydoc.locate(class_path)
        near = did_you_mean(option, arguments(cls)) if inspect.isclass(cls) else ""
        near = f"; {_TASK_FIRST}" if class_path in _ABSTRACT else near
        return f"{_file_of_key(line, f'{key}.{option}', '')}{key}: {class_path} has no argument {option!r}{near}"
    if match := re.search(r"following arguments are required: (.+)", text):
        missing = match[1].split(", ")
        flags = " ".join(f"--{key}.{name} VALUE" for name in missing)
        where = _file_of_key(line, key, problem.value)
        return f"{where}{key}: {class_path} needs {' and '.join(missing)}; give {flags}"
    return None


def _explain_value(problems: list[_Problem], line: CommandLine) -> str:
    """Explain an invalid value: the kinds of values or the choices that are valid."""
    _, key, _, _, value = problems[0]
    kinds, choices, rest = _expected_values([problem.text for problem in problems])
    where, reasons = _file_of_key(line, key, value), "; ".join(rest)
    if not kinds and not choices:
        return f"{where}{key}: {reasons}" + (f"; got {value[:200]}" if value and value not in reasons else "")
    if _CLASS in kinds and len(kinds) > 1 and key not in CLASS_MODULES:  # a tensor is accepted where a number is meant
        kinds.remove(_CLASS)
    if "a number" in kinds and "an integer" in kinds:
        kinds.remove("an integer")
    expected = [*kinds, *([f"one of {', '.join(choices)}"] if choices else [])]
    near = did_you_mean(value, choices) or (nearest_class(key, value) if _CLASS in kinds else "")
    hint = _quoting_hint(key, value, line) if expected == ["text"] else ""
    reasons = f" ({reasons})" if reasons else ""
    return f"{where}{key} must be {' or '.join(expected)}, got {value}{reasons}{near}{hint}"


def explain_fault(error: Exception, line: CommandLine) -> str | None:
    """Describe an exception in the user's own code in one line: key and class, then file, line and reason.

    Args:
        error: the exception, or an exception that jsonargparse raised from it.
        line: the command line.

    Returns:
        The line; None if the exception was not raised in the user's own code, or is a failure of the machine.
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
        error: an exception of jsonargparse.
        line: the command line.

    Returns:
        The line; None if the exception has another reason, or its own message is better.
    """
    reason = next((cause for cause in causes(error) if isinstance(cause, InputError | RunError | ImportError)), None)
    message = str(error)
    if (fault := explain_fault(error, line)) is not None:
        return fault
    if isinstance(reason, InputError | RunError) or not (reason or message.startswith("Does not validate against")):
        return None
    problems = list(_problems(message))
    texts = [str(reason)] if reason else _expected_values([problem.text for problem in problems])[2]
    texts = [text for text in texts if "does not correspond to a subclass of" not in text] or texts
    paths = [problem.class_path for problem in problems if problem.class_path]
    paths += re.findall(r"class_path='(.+?)'", message)
    where = _stating_class(line, paths[0]) if paths else ""
    return f"{where}{f'{paths[0]}: ' if paths else ''}{' '.join('; '.join(texts or [message]).split())}"


def _stating_class(line: CommandLine, path: str) -> str:
    """Return the file and the key that name a class, followed by a colon, or an empty string."""
    where = ""
    for source in line.sources:
        for key, value in source.settings.items():
            if re.search(rf"\b{path.rpartition('.')[2]}\b", str(value)):
                name = key.replace(".class_path", "").removesuffix("+")
                where = f"{source.name}: {name}: " if source.is_file else f"{name}: "
    return where


def explain_use(error: Exception, line: CommandLine, config: Any, trainer: Trainer) -> str | None:
    """Describe in one line an exception of a class of Lightning or torch while the trainer used it.

    Some classes do not check their arguments when they are instantiated: a CSVLogger that flushes every 0 steps divides
    by 0 when it is used.

    Args:
        error: the exception.
        line: the command line.
        config: the parsed configuration of the subcommand.
        trainer: the trainer, with its loggers, callbacks, profiler, strategy and plugins.

    Returns:
        The line; None if the exception is a failure of the machine, or was raised by this library, the user's own code,
        or an object that is not in the configuration.
    """
    if not isinstance(error, _ARGUMENT_ERRORS) or describe_failure(error) is not None:
        return None
    if isinstance(error, torch.distributed.DistError):  # other processes did not connect
        return None
    if any(isinstance(cause, InputError | RunError) for cause in causes(error)):
        return None
    culprit = _find_raising_object(error, trainer)
    where = "" if culprit is None else _stating_class(line, type(culprit).__name__)
    if not where:
        return None
    kind = "" if isinstance(error, MisconfigurationException | ValueError) else f"{type(error).__name__}: "
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    given_arguments = _changed_arguments(config.trainer, type(culprit))
    return f"{where}{type(culprit).__name__} cannot be used with {given_arguments}: {kind}{reason}"


def _find_raising_object(error: Exception, trainer: Any) -> Any:
    """Return the innermost object of the trainer, of a class of Lightning or torch, in whose call an error was raised.

    Returns:
        The object; None if there is none, or if the call has led to code outside installed packages.
    """
    strategy = trainer.strategy
    plugins = [strategy.precision_plugin, strategy.checkpoint_io, getattr(strategy, "cluster_environment", None)]
    objects = [*trainer.callbacks, *trainer.loggers, trainer.profiler, strategy, *plugins]
    innermost = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        this = frame.f_locals.get("self")
        if not is_installed(frame):
            innermost = None
        elif any(this is one for one in objects) and type(this).__module__.startswith(("lightning.", "torch.")):
            innermost = this
    return innermost


def _changed_arguments(config: Any, cls: type) -> str:
    """Return the arguments of a class in a configuration that differ from their defaults, as text."""
    arguments_of_class: dict[str, Any] = {}
    for value in config.__dict__.values():
        for one in value if isinstance(value, list) else [value]:
            if str(getattr(one, "class_path", "")).rpartition(".")[2] == cls.__name__ and hasattr(one, "init_args"):
                arguments_of_class.update(one.init_args.__dict__)
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    changed = [f"{name}: {shorten(value)}" for name, value in arguments_of_class.items() if value != defaults.get(name)]
    return ", ".join(changed) or "its defaults"


def _problems(message: str) -> Iterator[_Problem]:
    """Yield the problems in a message; their key and class are above them, less indented, and their value below."""
    above: list[tuple[int, str, str]] = []  # indentation, key, class
    lines = message.splitlines()
    for i, raw in enumerate(lines):
        text = _CALLABLE.sub("", raw.strip().removeprefix("- ")).partition(". Got value: Namespace(")[0]
        indent = len(raw) - len(raw.lstrip())
        while text and above and above[-1][0] >= indent:
            above.pop()
        for pattern in (r'Parser key "(?P<key>.+?)":\s*', r"Problem with given class_path '(?P<cls>.+?)':\s*"):
            if match := re.match(pattern, text):
                above.append((indent, match.groupdict().get("key", ""), match.groupdict().get("cls", "")))
                text = text[match.end() :]
        if text and not text.startswith(_IGNORED_LINES):
            text, _, value = text.partition(" Got value: ")
            classes = [*(cls for *_, cls in above if cls), *re.findall(r"Namespace\(class_path='(.+?)'", raw)]
            key = ".".join(key for _, key, _ in above if key)
            below = _value_below(lines[i + 1 :])
            yield _Problem(len(above), key, classes[-1] if classes else "", text.rstrip("."), value or below)


def _value_below(lines: list[str]) -> str:
    text = next((text for raw in lines if (text := raw.strip()).startswith("Given value: ")), "")
    value = text.removeprefix("Given value: ").partition(". Got value: Namespace(")[0]
    nested = re.match(r"NestedArg\(key='.*?', val='?(.*?)'?\)$", value)
    return nested[1] if nested else value


def _expected_values(texts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the valid kinds of values, the valid choices, and the texts that contain neither."""
    kinds: dict[str, None] = {}
    choices: dict[str, None] = {}
    rest: dict[str, None] = {}
    for text in texts:
        if match := re.match(r"Expected a typing\.Literal\[(.+)\]", text):
            choices.update(dict.fromkeys(name.strip("'") for name in match[1].split(", ")))
        elif match := re.match(r"Expected a <class '(.+?)'>", text):
            kinds[_KINDS.get(match[1], match[1])] = None
        elif text.startswith(_CLASS_EXPECTED):
            kinds[_CLASS] = None
            if "valid subclass" in text and "of Tensor" not in text:
                kinds["a mapping"] = None
        else:
            rest[text] = None
    return list(kinds), list(choices), list(rest)


def _file_of_key(line: CommandLine, key: str, value: str) -> str:
    """Return the name of the file that sets a key, followed by a colon; empty for a flag or if there are several."""
    candidates = []  # source, and whether it has this value
    for source in line.sources:
        for name, setting in source.settings.items():
            plain = name.replace(".init_args.", ".").replace("+", "")
            if f"{plain}.".startswith(f"{key}.") or f"{key}.".startswith(f"{plain}."):
                candidates.append((source, plain == key and str(setting) == value))
    exact = [source for source, is_exact in candidates if is_exact]
    sources = {source.name: source for source in exact or [source for source, _ in candidates]}
    only_source = next(iter(sources.values())) if len(sources) == 1 else None
    return f"{only_source.name}: " if only_source is not None and only_source.is_file else ""


def _quoting_hint(key: str, value: str, line: CommandLine) -> str:
    """Return how to quote text that YAML reads as another type."""
    setting = next((s.settings[name] for s in line.sources for name in (key, f"{key}+") if name in s.settings), None)
    example = '["no", "1"]' if isinstance(setting, list) else json.dumps(value, ensure_ascii=False)
    if value.startswith("{"):
        example = '"Review: {sentence}"'
    name = key.rpartition(".")[2]
    return f"; quote text that YAML reads as another type: {name}: {example} in a file, --{key} '{example}' as a flag"


def _nearest_option(option: str, names: list[str]) -> str:
    """Return a hint with the nearest option, or with the nearest group of options."""
    head = option.partition(".")[0]
    if within := [name for name in names if name.startswith(f"{head}.")]:
        return did_you_mean(option, within)
    return did_you_mean(option, names) or did_you_mean(head, {name.partition(".")[0] for name in names})
