"""Bounded reading of JSON and YAML files that may come from anybody: size, nesting and aliases are limited first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gpt2_pl.errors import InputError

MAX_JSON = 2**24  # bytes of a file
MAX_YAML = 2**20  # bytes of a file; twice as many characters with all aliases written out
MAX_DEPTH = 100  # of lists and mappings in one another
_LONGEST_NUMBER = 1000  # characters; YAML's base-60 integers take quadratic time
_NUMBER = re.compile(r"[-+0-9._:]+")


def read_text(file: Path, limit: int) -> str:
    """Read a UTF-8 text file of at most ``limit`` bytes.

    Raises:
        InputError: no such file, a larger one, or one that is not UTF-8.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(limit + 1)
        if len(content) > limit:
            raise InputError(f"{file} is larger than {limit:,} bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}") from None


def read_json(file: Path) -> Any:
    """Read a JSON file of at most ``MAX_JSON`` bytes whose values are at most ``MAX_DEPTH`` deep.

    Raises:
        InputError: naming the file.
    """
    text = read_text(file, MAX_JSON)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{file}: its values are nested more than {MAX_DEPTH} deep") from None
    level = [value for value in [content] if isinstance(value, dict | list)]
    for _ in range(MAX_DEPTH):
        inside = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in inside if isinstance(value, dict | list)]
    if level:
        raise InputError(f"{file}: its values are nested more than {MAX_DEPTH} deep")
    return content


def read_yaml(file: Path) -> Any:
    """Read a YAML file within the limits of :func:`check_yaml`, as plain values; see :func:`load_yaml`.

    Raises:
        InputError: naming the file.
    """
    return load_yaml(read_text(file, MAX_YAML), str(file))


def load_yaml(text: str, name: str) -> Any:
    """Plain values from YAML text within the limits of :func:`check_yaml`.

    Args:
        text: YAML.
        name: of its source, for error messages.

    Raises:
        InputError: text that is not YAML or exceeds a limit.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        check_yaml(text, name)
        return yaml.load(text, Loader=loader)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # also of dates and numbers out of range
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split())[:300]}") from None


class DuplicateKeyError(InputError):
    """A mapping has a key twice."""


class _Keys:
    """The keys of a mapping that is being read event by event."""

    def __init__(self) -> None:
        self.lines: dict[tuple[str, str], int] = {}
        self.is_next = True  # keys and values take turns

    def add(self, event: Any, name: str, resolver: Any) -> None:
        """Note the event that begins a key or a value.

        Raises:
            DuplicateKeyError: the mapping has this key already.
        """
        import yaml

        is_key, self.is_next = self.is_next, not self.is_next
        if not is_key or not isinstance(event, yaml.ScalarEvent) or event.value == "<<":
            return
        tag = event.tag if event.tag not in (None, "!") else resolver(yaml.ScalarNode, event.value, event.implicit)
        mark: Any = event.start_mark
        line = mark.line + 1
        if (first := self.lines.get((tag, event.value))) is not None:
            raise DuplicateKeyError(
                f"{name}, line {line}: the key {event.value!r} is given twice, first in line {first}"
            )
        self.lines[tag, event.value] = line


def check_yaml(text: str, name: str) -> None:
    """Refuse YAML that takes much memory or time: it is read event by event, before any value is built.

    Aliases count as what they stand for, so that nine lists of nine aliases of one another are not nine lines but 9^9
    values. Deep nesting would overflow the C stack of the parser.

    Args:
        text: YAML.
        name: of its source, for error messages.

    Raises:
        InputError: text that is too large or too deep, has an alias within what it stands for, or a key twice in one
            mapping.
        yaml.YAMLError: text that is not YAML.
    """
    import yaml

    if len(text) > MAX_YAML:
        raise InputError(f"{name} has more than {MAX_YAML:,} characters")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sizes: dict[str, int] = {}  # of what anchors name, in characters
    # of every list and mapping being read: anchor, size before it, and a mapping's keys
    open_nodes: list[tuple[str | None, int, _Keys | None]] = []
    resolver = yaml.SafeLoader("").resolve
    total = 0
    for event in yaml.parse(text, Loader=loader):
        begins = isinstance(event, yaml.NodeEvent)  # a value, whatever its kind
        if begins and open_nodes and (keys := open_nodes[-1][2]) is not None:
            keys.add(event, name, resolver)
        anchor = getattr(event, "anchor", None)
        total += 1
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == outer for outer, *_ in open_nodes):
                raise InputError(f"{name}: the alias *{anchor} lies within what it stands for")
            total += sizes.get(str(anchor), 0)
        elif isinstance(event, yaml.ScalarEvent):
            size = len(event.value)
            if size > _LONGEST_NUMBER and _NUMBER.fullmatch(event.value):
                raise InputError(f"{name}: a number has {size:,} characters; it has at most {_LONGEST_NUMBER}")
            total += size
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, total, _Keys() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(open_nodes) > MAX_DEPTH:
                raise InputError(f"{name}: its keys and lists are nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, _ = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        if total > 2 * MAX_YAML:
            raise InputError(f"{name} has more than {2 * MAX_YAML:,} characters with its aliases written out")
