"""Safe reading of untrusted JSON and YAML files: size, nesting and aliases are limited."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

from gpt2_pl.errors import InputError

MAX_JSON = 2**24  # bytes of a file
MAX_YAML = 2**20  # bytes of a file; twice as many characters with all aliases expanded
MAX_DEPTH = 100  # nested lists and mappings
_MAX_NUMBER_LENGTH = 1000  # characters; parsing YAML's base-60 integers takes quadratic time
_NUMBER = re.compile(r"[-+0-9._:]+")


def read_text(file: Path, limit: int) -> str:
    """Read a UTF-8 text file of at most ``limit`` bytes.

    Raises:
        InputError: a file that does not exist, is larger, or is not UTF-8.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise InputError(f"{file} is larger than {limit:,} bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}") from None


def read_json(file: Path) -> Any:
    """Read a JSON file of at most ``MAX_JSON`` bytes and at most ``MAX_DEPTH`` levels of nesting.

    Raises:
        InputError: naming the file.
    """
    text = read_text(file, MAX_JSON)
    too_deep = InputError(f"its values are nested more than {MAX_DEPTH} deep", source=file)
    try:
        content = json.loads(text)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    level = [content]
    for _ in range(MAX_DEPTH):
        containers = [value for value in level if isinstance(value, dict | list)]
        level = [inner for value in containers for inner in (value.values() if isinstance(value, dict) else value)]
    if any(isinstance(value, dict | list) for value in level):
        raise too_deep
    return content


def read_yaml(file: Path) -> Any:
    """Read a YAML file as plain values, within the limits of :func:`check_yaml`.

    Raises:
        InputError: naming the file.
    """
    return load_yaml(read_text(file, MAX_YAML), str(file))


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML text to plain values, within the limits of :func:`check_yaml`.

    Args:
        text: YAML.
        name: the source of the text, for error messages.

    Raises:
        InputError: text that is not YAML or exceeds a limit.
    """
    import yaml

    try:
        node = check_yaml(text, name)
        return None if node is None else yaml.SafeLoader("").construct_document(node)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the last two for dates and numbers out of range
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split())[:300]}") from None


class DuplicateKeyError(InputError):
    """A mapping has a duplicate key."""


def check_yaml(text: str, name: str) -> Any:
    """Reject YAML that takes much memory or time, before any value is built.

    The size counts every alias as the value that it refers to: nine nested lists of nine aliases each would otherwise
    be nine short lines that expand to 9^9 values. Deep nesting is rejected because it would overflow the C stack of the
    parser.

    Args:
        text: YAML.
        name: the source of the text, for error messages.

    Returns:
        The root node (``yaml.Node``), or None for an empty text.

    Raises:
        InputError: text that is too large or nested too deep, a recursive alias, or a duplicate key in a mapping.
        yaml.YAMLError: text that is not YAML.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if len(text) > MAX_YAML:
        raise InputError(f"{name} has more than {MAX_YAML:,} characters")
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(f"its lists and mappings are nested more than {MAX_DEPTH} deep", source=name)
    node = yaml.compose(text, Loader=loader)
    if node is not None:
        _expanded_size(node, name, {})
    return node


def _expanded_size(node: Any, name: str, sizes: dict[Any, int]) -> int:
    """Return the number of characters of a YAML node with all aliases expanded; see :func:`check_yaml`.

    Args:
        node: the node (``yaml.Node``).
        name: the source of the text, for error messages.
        sizes: the sizes of the nodes before it, and 0 for the lists and mappings around it.
    """
    import yaml

    if node in sizes:  # an alias
        if sizes[node] == 0:
            raise InputError(f"{name}: the value in line {node.start_mark.line + 1} contains itself, by an alias")
        return sizes[node]
    if isinstance(node, yaml.ScalarNode):
        length = len(node.value)
        if length > _MAX_NUMBER_LENGTH and _NUMBER.fullmatch(node.value):
            raise InputError(f"{name}: a number must have at most {_MAX_NUMBER_LENGTH} characters, got {length:,}")
        sizes[node] = 1 + length
        return sizes[node]
    sizes[node], size, children = 0, 1, node.value
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, name)
        children = chain.from_iterable(node.value)
    for child in children:
        size += _expanded_size(child, name, sizes)
        if size > 2 * MAX_YAML:
            raise InputError(f"{name} has more than {2 * MAX_YAML:,} characters with its aliases expanded")
    sizes[node] = size
    return size


def _check_keys(mapping: Any, name: str) -> None:
    """Raise a DuplicateKeyError if a mapping has a key twice; only merge keys (``<<``) may be repeated."""
    import yaml

    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        line = key.start_mark.line + 1
        if first := lines.get((key.tag, key.value)):
            problem = f"the key {key.value!r} is given twice, first in line {first}"
            raise DuplicateKeyError(problem, key=key.value, source=f"{name}, line {line}")
        lines[key.tag, key.value] = line
