"""Bounded reading of JSON and YAML files that may come from anybody: size, nesting and aliases are limited first."""

from __future__ import annotations

import json
import re
from collections import Counter
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


def read_yaml(file: Path, unique_keys: bool = False) -> Any:
    """Read a YAML file within the limits of :func:`check_yaml`, as plain values; see :func:`load_yaml`.

    Raises:
        InputError: naming the file.
    """
    return load_yaml(read_text(file, MAX_YAML), str(file), unique_keys)


def load_yaml(text: str, name: str, unique_keys: bool = False) -> Any:
    """Plain values from YAML text within the limits of :func:`check_yaml`.

    Args:
        text: YAML.
        name: of its source, for error messages.
        unique_keys: refuse a mapping that has a key twice; otherwise the last one counts, as is PyYAML's habit.

    Raises:
        InputError: text that is not YAML or exceeds a limit.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if unique_keys:
        loader = type("UniqueKeyLoader", (loader,), {"construct_mapping": _construct_unique})
    try:
        check_yaml(text, name)
        return yaml.load(text, Loader=loader)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # also of dates and numbers out of range
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split())[:300]}") from None


def _construct_unique(loader: Any, node: Any, deep: bool = False) -> dict[Any, Any]:
    """Construct a mapping as PyYAML's safe loader does, unless it has a key twice."""
    import yaml

    keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
    twice = [key for key, times in keys.items() if times > 1]
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


def check_yaml(text: str, name: str) -> None:
    """Refuse YAML that takes much memory or time: it is read event by event, before any value is built.

    Aliases count as what they stand for, so that nine lists of nine aliases of one another are not nine lines but 9^9
    values. Deep nesting would overflow the C stack of the parser.

    Args:
        text: YAML.
        name: of its source, for error messages.

    Raises:
        InputError: text that is too large or too deep, or has an alias within what it stands for.
        yaml.YAMLError: text that is not YAML.
    """
    import yaml

    if len(text) > MAX_YAML:
        raise InputError(f"{name} has more than {MAX_YAML:,} characters")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sizes: dict[str, int] = {}  # of what anchors name, in characters
    open_nodes: list[tuple[str | None, int]] = []  # of every list and mapping being read: anchor, size before it
    total = 0
    for event in yaml.parse(text, Loader=loader):
        anchor = getattr(event, "anchor", None)
        total += 1
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == outer for outer, _ in open_nodes):
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
            open_nodes.append((anchor, total))
            if len(open_nodes) > MAX_DEPTH:
                raise InputError(f"{name}: its keys and lists are nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        if total > 2 * MAX_YAML:
            raise InputError(f"{name} has more than {2 * MAX_YAML:,} characters with its aliases written out")
