"""YAML dumps of configurations that can be read back into the same objects."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import register_type

_UNREADABLE = "Unable to serialize instance"  # jsonargparse writes this in place of a value
NOTES = rf"\s*({_UNREADABLE}|Dump of a value that does not round-trip)"  # warnings of jsonargparse

register_type(torch.device, str, torch.device)
yaml.SafeDumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))  # string enums


def readable(text: str, values: Namespace) -> str:
    """Omit default arguments that YAML cannot represent, such as a device, a function or a tuple, from a dump.

    Some of them would be read back as other values. An omitted argument takes its default anyway.

    Args:
        text: the dump, as YAML.
        values: the dumped configuration.

    Returns:
        The dump without those arguments and with its leading comments; ``text`` itself if there are none.
    """
    if _UNREADABLE not in text and _is_plain(values):
        return text
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return header + yaml.safe_dump(_readable(yaml.safe_load(text), values), sort_keys=False, allow_unicode=True)


def _readable(dumped: Any, values: Any) -> Any:
    if isinstance(dumped, dict) and isinstance(values, Mapping | Namespace):
        result = {key: _readable(value, values.get(key)) for key, value in dumped.items()}
        if isinstance(arguments := values.get("init_args"), Namespace) and not _is_plain(arguments):
            defaults = _defaults(values["class_path"])
            for key in list(result["init_args"]):
                if _is_omitted(dumped["init_args"][key], arguments.get(key), defaults.get(key)):
                    del result["init_args"][key]
        return result
    if isinstance(dumped, list) and isinstance(values, list | tuple):
        return [_readable(one, value) for one, value in zip(dumped, values, strict=True)]
    return values if isinstance(values, str) else dumped  # jsonargparse may import a string where a callable is allowed


def _defaults(class_path: str) -> Namespace:
    """Return the default arguments of a class, or of a function that returns an instance."""
    module, _, name = class_path.rpartition(".")
    target = getattr(import_module(module), name)
    parser = ArgumentParser(exit_on_error=False)
    add_arguments: Any = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
    add_arguments(target, fail_untyped=False)
    return parser.get_defaults()


def _is_omitted(dumped: Any, value: Any, default: Any) -> bool:
    """Return whether an argument is omitted: its value is not plain, and is the default or cannot be written."""
    if _is_plain(value):
        return False
    try:
        return value is default or bool(value == default)
    except RuntimeError:  # the truth value of a tensor
        return _UNREADABLE in str(dumped)


def _is_plain(value: Any) -> bool:
    """Return whether a value consists only of mappings, lists, strings, numbers, booleans and nulls."""
    if isinstance(value, Mapping | Namespace):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
