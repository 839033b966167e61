"""One-line versions of the argument parser's messages: file, key, expected values and the nearest name."""

from __future__ import annotations

import inspect
import pydoc
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import NamedTuple

from gpt2_pl.commands.support.config_merge import SHORT_FORMS, CommandLine
from gpt2_pl.errors import InputError, did_you_mean, nearest
from gpt2_pl.tasks.checkpoint import arguments

_IGNORED_LINE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Expected a (<class 'NoneType'>|path but)|tip:|"
    r"Subclass types expect one of:|a class path \(str\)|a dict with"
)
_HEADING = re.compile(r"""Parser key "(?P<key>.+?)":\s*|Problem with given class_path '(?P<cls>.+?)':\s*""")
_CALLABLE = re.compile(r"Type \S.* expects a function or a callable class: ")
_EXPECTED = {  # the beginning of a line, and what the value must be
    r"Expected a typing\.Literal\[(.+)\]": r"one of \1",
    "Expected a <class 'int'>": "a whole number",
    "Expected a <class 'float'>": "a number",
    "Expected a <class 'bool'>": "true or false",
    "Expected a <class 'str'>": "text",
    "Expected a <class '(list|collections.abc.Iterable)'>": "a list",
    "Expected a <class 'dict'>": "a mapping",
    "Expected a <class '(.+?)'>": r"\1",
    "Not a valid subclass of|Expected a dot import path string|Expected an import path or": (
        "a class path, such as gpt2_pl.surgery.LoRA"
    ),
}
_TASK_FIRST = "the task comes first: --config task/sst5 --config strategy/full"
_ABSTRACT = ("gpt2_pl.tasks.Task", "gpt2_pl.tasks.base.Task", "lightning.LightningDataModule")  # without a task's file


class Problem(NamedTuple):
    """Line of a message with its indentation level and the key, class and value that it is about."""

    depth: int
    key: str
    class_path: str
    text: str
    value: str


def explain(message: str, line: CommandLine, parser: ArgumentParser) -> InputError:
    """Convert a message of jsonargparse to an error of one line, with its key and file.

    Args:
        message: one or more lines.
        line: the command line.
        parser: parser of the subcommand.

    Returns:
        The error; an unknown message is only joined to one line.
    """
    if (explained := _explain_option(message, line, parser)) is not None:
        return explained
    problems = list(parse_problems(message))
    deepest = [problem for problem in problems if problem.depth == max(problem.depth for problem in problems)]
    if not deepest or not deepest[0].key:
        lines = [text for raw in message.splitlines() if (text := raw.strip()) and not _IGNORED_LINE.match(text)]
        return InputError(" ".join(lines or message.split()))
    explanations = (_explain_arguments(problem, line) for problem in deepest)
    return next(filter(None, explanations), None) or _explain_value(deepest, line)


def _explain_option(message: str, line: CommandLine, parser: ArgumentParser) -> InputError | None:
    """Explain an unknown option or key, or a missing option; None for other messages."""
    names = {name.removeprefix("--") for name in parser._option_string_actions if not name.endswith(".help")}
    pattern = r"unrecognized arguments: (?:.* )?--([^\s=]+)|.* does not accept option '(.+?)'"
    if match := re.match(pattern, message):
        key = match[1] or match[2]
        if match[1]:
            options = [f"--{name}" for name in names.union(SHORT_FORMS)]
            message = f"unknown option --{key}{did_you_mean(f'--{key}', options)}"
        else:
            message = f"unknown key {key}{did_you_mean(key, names)}"
        return InputError(message, key=key, source=_file_of_key(line, key, ""))
    if "are required" in message and "Parser key" not in message:
        return InputError(f"{' '.join(message.split())}; {_TASK_FIRST}", key="config")
    return None


def _explain_arguments(problem: Problem, line: CommandLine) -> InputError | None:
    """Explain unknown or missing arguments of a class; None for other problems."""
    _, key, class_path, text, value = problem
    if match := re.search(r"Option '(.+?)\+?' is not accepted", text):
        option, cls = match[1], pydoc.locate(class_path)
        near = did_you_mean(option, arguments(cls)) if inspect.isclass(cls) else ""
        near = f"; {_TASK_FIRST}" if class_path in _ABSTRACT else near
        source = _file_of_key(line, f"{key}.{option}", "")
        message = f"{key}: {class_path} has no argument {option!r}{near}"
        return InputError(message, key=f"{key}.{option}", source=source)
    if match := re.match(r"unrecognized arguments: --([^\s=]+)", text):
        option, cls = match[1], pydoc.locate(class_path or str(line.last(f"{key}.class_path")))
        first, dot, rest = option.partition(".")
        meant = nearest(first, arguments(cls)) if inspect.isclass(cls) else None
        hint = "" if meant is None else f"; did you mean --{key}.{meant}{dot}{rest}?"
        return InputError(f"unknown option --{key}.{option}{hint}", key=f"{key}.{option}")
    if match := re.search(r"following arguments are required: (.+)", text):
        first = match[1].partition(",")[0]
        message = f"{key}: {class_path} needs {match[1]}, as in --{key}.{first} VALUE"
        return InputError(message, key=f"{key}.{first}", source=_file_of_key(line, key, value))
    return None


def _explain_value(problems: list[Problem], line: CommandLine) -> InputError:
    """Explain an invalid value: the kinds of values or the choices that are valid."""
    key, value = problems[0].key, problems[0].value
    kinds, reasons = expected_values(problems)
    source = _file_of_key(line, key, value)
    if not kinds:
        got = f"; got {value[:200]}" if value and value not in reasons else ""
        return InputError(f"{key}: {reasons}{got}", key=key, value=value, source=source)
    expected = " or ".join(kinds)
    near = did_you_mean(value, re.findall(r"[\w-]+", expected)) if "one of" in expected else ""
    reasons = f" ({reasons})" if reasons else ""
    quoting = "; quote text that YAML reads as another type" if "text" in kinds else ""
    message = f"{key} must be {expected}, got {value}{reasons}{near}{quoting}"
    return InputError(message, key=key, value=value, expected=expected, source=source)


def parse_problems(message: str) -> Iterator[Problem]:
    """Yield the problems in a message; their key and class are above them, less indented, and their value below."""
    above: list[tuple[int, str, str]] = []  # indentation, key, class
    lines = message.splitlines()
    for i, raw in enumerate(lines):
        text = _CALLABLE.sub("", raw.strip().removeprefix("- ")).partition(". Got value: Namespace(")[0]
        indent = len(raw) - len(raw.lstrip())
        while text and above and above[-1][0] >= indent:
            above.pop()
        while match := _HEADING.match(text):
            above.append((indent, match["key"] or "", match["cls"] or ""))
            text = text[match.end() :]
        if text and not _IGNORED_LINE.match(text):
            text, _, value = text.partition(" Got value: ")
            classes = [*(cls for *_, cls in above if cls), *re.findall(r"Namespace\(class_path='(.+?)'", raw)]
            key = ".".join(key for _, key, _ in above if key)
            below = _value_below(lines[i + 1 :])
            yield Problem(len(above), key, classes[-1] if classes else "", text.rstrip("."), value or below)


def _value_below(lines: list[str]) -> str:
    text = next((text for raw in lines if (text := raw.strip()).startswith("Given value: ")), "")
    value = text.removeprefix("Given value: ").partition(". Got value: Namespace(")[0]
    nested = re.match(r"NestedArg\(key='.*?', val='?(.*?)'?\)$", value)
    return nested[1] if nested else value


def expected_values(problems: list[Problem]) -> tuple[list[str], str]:
    """Return the valid kinds of values, and the other problems as one text."""
    kinds: dict[str, None] = {}
    reasons: dict[str, None] = {}
    for problem in problems:
        matches = ((re.match(pattern, problem.text), kind) for pattern, kind in _EXPECTED.items())
        kind = next((match.expand(kind).replace("'", "") for match, kind in matches if match), "")
        if kind:
            kinds[kind] = None
        else:
            reasons[problem.text] = None
    return list(kinds), "; ".join(reasons)


def _file_of_key(line: CommandLine, key: str, value: str) -> str:
    """Return the name of the file that sets a key; empty for a flag or if there are several."""
    sources: set[str] = set()  # with the key, a part of it or a group with it
    exact: set[str] = set()  # with this value
    for source in line.sources:
        name_of_file = source.name if source.is_file else ""
        for name, setting in source.settings.items():
            plain = name.removesuffix("+")
            if f"{plain}.".startswith(f"{key}.") or f"{key}.".startswith(f"{plain}."):
                sources.add(name_of_file)
            if plain == key and str(setting) == value:
                exact.add(name_of_file)
    candidates = exact or sources
    return candidates.pop() if len(candidates) == 1 else ""
