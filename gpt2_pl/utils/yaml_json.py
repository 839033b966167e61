"""Safe reading of untrusted JSON and YAML files: size, nesting and aliases are limited."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

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

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        check_yaml(text, name)
        return yaml.load(text, Loader=loader)
    except InputError:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
    ) as error:  # The last two are raised for dates and numbers out of range.
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split())[:300]}") from None


class DuplicateKeyError(InputError):
    """A mapping has a duplicate key."""


class _MappingKeys:
    """Keys of a mapping that is read event by event."""

    def __init__(self) -> None:
        self.lines: dict[tuple[str, str], int] = {}
        self.is_key_next = True  # Keys and values alternate.

    def add(self, event: Any, name: str, resolver: Any) -> None:
        """Record the event that starts a key or a value.

        Raises:
            DuplicateKeyError: the mapping already has this key.
        """
        import yaml

        is_key, self.is_key_next = self.is_key_next, not self.is_key_next
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


class _OpenNode(NamedTuple):
    """List or mapping whose end has not been read yet.

    Attributes:
        anchor: its anchor, if it has one.
        start: number of characters before it.
        keys: the keys of a mapping; None for a list.
    """

    anchor: str | None
    start: int
    keys: _MappingKeys | None


class _YamlLimits:
    """Checks size, nesting, aliases and keys of YAML that is read event by event.

    Args:
        name: the source of the YAML, for error messages.
    """

    def __init__(self, name: str) -> None:
        import yaml

        self.name = name
        self.size = 0  # characters read, with all aliases expanded
        self.anchor_sizes: dict[str, int] = {}
        self.open_nodes: list[_OpenNode] = []
        self._resolver = yaml.SafeLoader("").resolve

    def add(self, event: Any) -> None:
        """Read one event.

        Raises:
            InputError: the event exceeds a limit.
        """
        import yaml

        is_value_start = isinstance(event, yaml.NodeEvent)
        if is_value_start and self.open_nodes and (keys := self.open_nodes[-1].keys) is not None:
            keys.add(event, self.name, self._resolver)
        self.size += 1
        if isinstance(event, yaml.AliasEvent):
            self._add_alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            self._add_scalar(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._open(event, _MappingKeys() if isinstance(event, yaml.MappingStartEvent) else None)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._close()
        if self.size > 2 * MAX_YAML:
            raise InputError(f"{self.name} has more than {2 * MAX_YAML:,} characters with its aliases expanded")

    def _add_alias(self, event: Any) -> None:
        if any(event.anchor == node.anchor for node in self.open_nodes):
            raise InputError(f"{self.name}: the alias *{event.anchor} is recursive")
        self.size += self.anchor_sizes.get(str(event.anchor), 0)

    def _add_scalar(self, event: Any) -> None:
        size = len(event.value)
        if size > _MAX_NUMBER_LENGTH and _NUMBER.fullmatch(event.value):
            raise InputError(f"{self.name}: a number must have at most {_MAX_NUMBER_LENGTH} characters, got {size:,}")
        self.size += size
        if event.anchor is not None:
            self.anchor_sizes[event.anchor] = size

    def _open(self, event: Any, keys: _MappingKeys | None) -> None:
        self.open_nodes.append(_OpenNode(event.anchor, self.size, keys))
        if len(self.open_nodes) > MAX_DEPTH:
            raise InputError(f"{self.name}: its lists and mappings are nested more than {MAX_DEPTH} deep")

    def _close(self) -> None:
        node = self.open_nodes.pop()
        if node.anchor is not None:
            self.anchor_sizes[node.anchor] = self.size - node.start


def check_yaml(text: str, name: str) -> None:
    """Refuse YAML that takes much memory or time: it is read event by event, before any value is built.

    The size counts every alias as the value that it refers to: nine nested lists of nine aliases each would otherwise
    be nine short lines that expand to 9^9 values. Deep nesting is refused because it would overflow the C stack of the
    parser.

    Args:
        text: YAML.
        name: the source of the text, for error messages.

    Raises:
        InputError: text that is too large or nested too deep, a recursive alias, or a duplicate key in a mapping.
        yaml.YAMLError: text that is not YAML.
    """
    import yaml

    if len(text) > MAX_YAML:
        raise InputError(f"{name} has more than {MAX_YAML:,} characters")
    limits = _YamlLimits(name)
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        limits.add(event)
