"""The argument parser of fit, validate, test and predict, and its YAML dumps, which can be read back."""

from __future__ import annotations

import inspect
import pydoc
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonargparse
import torch
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

from gpt2_pl.utils.yaml_json import check_yaml, load_yaml

_UNREADABLE = "Unable to serialize instance"  # jsonargparse writes this in place of a value
_NOTES = rf"\s*({_UNREADABLE}|Dump of a value that does not round-trip)"  # warnings of jsonargparse

_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's takes a fifth of the time
_load_yaml = jsonargparse.get_loader("yaml")


def _load_bounded_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does, within limits; this includes files named by files, and the values of flags.

    A value that starts with ``#``, such as a file's name, is text and not a comment.
    """
    check_yaml(text, "a configuration")
    value = _load_yaml(text)
    return text if value is None and text.startswith("#") and "\n" not in text else value


def _dump_yaml(values: Any) -> str:
    """Return plain values as YAML, in their order."""
    return yaml.dump(values, Dumper=_DUMPER, default_flow_style=False, sort_keys=False, allow_unicode=True)


jsonargparse.set_loader("yaml", _load_bounded_yaml, exceptions=(yaml.YAMLError,))
jsonargparse.set_dumper("yaml", _dump_yaml)
register_type(torch.device, str, torch.device)
_DUMPER.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))  # string enums


class Parser(LightningArgumentParser):
    """LightningCLI's parser with one-line errors, dumps that can be read back and help with complete keys.

    Flags cannot be abbreviated, because :class:`CommandLine` reads them before they are parsed.
    """

    introduction = ""
    help_key = ""  # KEY of the option --KEY.help; nested parsers do not know their outer keys

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_class_arguments(self, class_type: Any, nested_key: Any = None, **kwargs: Any) -> Any:
        """Add the arguments of a class; for ``--KEY.help CLASS``, with complete keys and its description."""
        is_help = (self.description or "").startswith(f"Help for --{nested_key}.help=")
        if is_help and f".{self.help_key}".endswith(f".{nested_key}"):
            self.description = (self.description or "").replace(f"--{nested_key}", f"--{self.help_key}", 1)
            nested_key = self.help_key
        added = super().add_class_arguments(class_type, nested_key, **kwargs)
        if is_help and not added:  # without arguments, the description is not displayed
            title = (inspect.getdoc(class_type) or str(class_type)).partition("\n")[0].rstrip(".")
            self.add_argument_group(title, "It has no arguments.")
        return added

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the introduction and the help of all keys."""
        return self.introduction + super().format_help(*args, **kwargs)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: fifty lines of usage would hide the error."""

    def dump(self, namespace: Any, *args: Any, **kwargs: Any) -> str:
        """Dump a configuration without default arguments that YAML cannot represent, such as a function or a tuple.

        Some of them would be read back as other values. An omitted argument takes its default anyway.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_NOTES)
            text = super().dump(namespace, *args, **kwargs)
        if _UNREADABLE not in text and _is_plain(namespace):
            return text
        header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        readable = _readable(load_yaml(text, "the configuration"), namespace)
        return header + _dump_yaml(readable)


def _readable(dumped: Any, values: Any) -> Any:
    """Return dumped values without default arguments that are not plain, or that have no YAML."""
    if isinstance(dumped, dict) and isinstance(values, Mapping | Namespace):
        result = {key: _readable(value, values.get(key)) for key, value in dumped.items()}
        if isinstance(arguments := values.get("init_args"), Namespace) and not _is_plain(arguments):
            defaults = _defaults(pydoc.locate(values["class_path"]))
            for key, text in dumped["init_args"].items():
                value = arguments.get(key)
                if not _is_plain(value) and (_UNREADABLE in str(text) or value == defaults.get(key)):
                    del result["init_args"][key]
        return result
    if isinstance(dumped, list) and isinstance(values, list | tuple):
        return [_readable(one, value) for one, value in zip(dumped, values, strict=True)]
    return values if isinstance(values, str) else dumped  # jsonargparse may import a string where a callable is allowed


@cache
def _defaults(target: Any) -> Namespace:
    """Return the default arguments of a class, or of a function that returns an instance."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_arguments: Any = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
    add_arguments(target, fail_untyped=False)
    return parser.get_defaults()


def _is_plain(value: Any) -> bool:
    """Return whether a value consists only of mappings, lists, strings, numbers, booleans and nulls."""
    if isinstance(value, Mapping | Namespace):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
