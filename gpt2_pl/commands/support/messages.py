"""One-line versions of the argument parser's messages: file, key, expected values and the nearest name."""

from __future__ import annotations

import inspect
import json
import pydoc
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import NamedTuple

from gpt2_pl.commands.support.config_merge import CommandLine
from gpt2_pl.commands.support.plugins import CLASS_MODULES, nearest_class
from gpt2_pl.errors import InputError, did_you_mean
from gpt2_pl.tasks.checkpoint import arguments

_IGNORED_LINE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Expected a (<class 'NoneType'>|path but)|tip:|"
    r"Subclass types expect one of:|a class path \(str\)|a dict with"
)
_CLASS_EXPECTED = ("Not a valid subclass of", "Expected a dot import path string", "Expected an import path or")
_HEADING = re.compile(r"""Parser key "(?P<key>.+?)":\s*|Problem with given class_path '(?P<cls>.+?)':\s*""")
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
_TASK_FIRST = "the task comes first: --config task/sst5 --config strategy/full"
_ABSTRACT = ("gpt2_pl.tasks.Task", "gpt2_pl.tasks.base.Task", "lightning.LightningDataModule")  # without a task's file


class Problem(NamedTuple):
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
                raise InputError(f"unknown key {head}{did_you_mean(head, known)}", key=head, source=source.name)


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
    explanations = (_explain_arguments(problem.text, deepest[0], line) for problem in deepest)
    return next(filter(None, explanations), None) or _explain_value(deepest, line)


def _explain_option(message: str, line: CommandLine, parser: ArgumentParser) -> InputError | None:
    """Explain an unknown option or key, or a missing value or option; None for other messages."""
    names = [name.removeprefix("--") for name in parser._option_string_actions if name.startswith("--")]
    if match := re.match(r"unrecognized arguments: (?:.* )?--([^\s=]+)", message):
        near = _nearest_option(match[1], names).replace("did you mean ", "did you mean --")
        return InputError(f"unknown option --{match[1]}{near}", key=match[1])
    if match := re.search(r"does not accept option '(.+?)'", message):
        key = match[1]
        source = _file_of_key(line, key, "")
        return InputError(f"unknown key {key}{_nearest_option(key, names)}", key=key, source=source)
    if match := re.match(r"argument (\S+): expected one argument", message):
        group = f"{match[1].partition('.')[0]}."
        name = next((flag for flag in line.without_value if flag.startswith(group)), match[1])
        text = f"{name} needs a value; one that begins with -- is given as {name}=VALUE"
        return InputError(text, key=name.removeprefix("--"))
    if "are required" in message and "Parser key" not in message:
        return InputError(f"{' '.join(message.split())}; {_TASK_FIRST}", key="config")
    return None


def _explain_arguments(text: str, problem: Problem, line: CommandLine) -> InputError | None:
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
        source = _file_of_key(line, f"{key}.{option}", "")
        message = f"{key}: {class_path} has no argument {option!r}{near}"
        return InputError(message, key=f"{key}.{option}", source=source)
    if match := re.search(r"following arguments are required: (.+)", text):
        missing = match[1].split(", ")
        flags = " ".join(f"--{key}.{name} VALUE" for name in missing)
        message = f"{key}: {class_path} needs {' and '.join(missing)}; give {flags}"
        return InputError(message, key=f"{key}.{missing[0]}", source=_file_of_key(line, key, problem.value))
    return None


def _explain_value(problems: list[Problem], line: CommandLine) -> InputError:
    """Explain an invalid value: the kinds of values or the choices that are valid."""
    _, key, _, _, value = problems[0]
    kinds, choices, rest = expected_values([problem.text for problem in problems])
    source, reasons = _file_of_key(line, key, value), "; ".join(rest)
    if not kinds and not choices:
        got = f"; got {value[:200]}" if value and value not in reasons else ""
        return InputError(f"{key}: {reasons}{got}", key=key, value=value, source=source)
    if _CLASS in kinds and len(kinds) > 1 and key not in CLASS_MODULES:  # a tensor is accepted where a number is meant
        kinds.remove(_CLASS)
    if "a number" in kinds and "a whole number" in kinds:
        kinds.remove("a whole number")
    expected = " or ".join([*kinds, *([f"one of {', '.join(choices)}"] if choices else [])])
    near = did_you_mean(value, choices) or (nearest_class(key, value) if _CLASS in kinds else "")
    hint = _quoting_hint(key, value, line) if expected == "text" else ""
    reasons = f" ({reasons})" if reasons else ""
    message = f"{key} must be {expected}, got {value}{reasons}{near}{hint}"
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


def expected_values(texts: list[str]) -> tuple[list[str], list[str], list[str]]:
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
    """Return the name of the file that sets a key; empty for a flag or if there are several."""
    sources, exact = {}, {}  # those with the key, a part of it or a group with it; and those with this value
    for source in line.sources:
        for name, setting in source.settings.items():
            plain = name.replace(".init_args.", ".").replace("+", "")
            if f"{plain}.".startswith(f"{key}.") or f"{key}.".startswith(f"{plain}."):
                sources[source.name] = source
                if plain == key and str(setting) == value:
                    exact[source.name] = source
    candidates = [*(exact or sources).values()]
    return candidates[0].name if len(candidates) == 1 and candidates[0].is_file else ""


def _quoting_hint(key: str, value: str, line: CommandLine) -> str:
    """Return how to quote text that YAML reads as another type."""
    setting = next((s.settings[name] for s in line.sources for name in (key, f"{key}+") if name in s.settings), None)
    name, advice = key.rpartition(".")[2], "quote text that YAML reads as another type"
    if isinstance(setting, list):
        return f"""; {advice}: {name}: ["no", "1"] in a file, --{key} '["no", "1"]' as a flag"""
    example = '"Review: {sentence}"' if value.startswith("{") else json.dumps(value, ensure_ascii=False)
    return f"; {advice}, in a file: {name}: {example}"  # the parser keeps the quotes of a flag


def _nearest_option(option: str, names: list[str]) -> str:
    """Return a hint with the nearest option, or with the nearest group of options."""
    head = option.partition(".")[0]
    within = [name for name in names if name.startswith(f"{head}.")]
    near = did_you_mean(option, within or names)
    return near if near or within else did_you_mean(head, {name.partition(".")[0] for name in names})
