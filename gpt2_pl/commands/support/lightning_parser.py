"""The argument parser of fit, validate, test and predict."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from gpt2_pl.commands.support.dumps import NOTES, readable
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.utils.yaml_json import check_yaml

_load_yaml = jsonargparse.get_loader("yaml")


def _load_bounded_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does, within limits; this includes files named by files, and the values of flags.

    A value that starts with ``#``, such as a file's name, is text and not a comment.
    """
    check_yaml(text, "a configuration")
    value = _load_yaml(text)
    return text if value is None and text.startswith("#") and "\n" not in text else value


jsonargparse.set_loader("yaml", _load_bounded_yaml, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """LightningCLI's parser with one-line errors, atomic configuration files and help with complete keys.

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
        """Dump a configuration so that it can be read back; see :func:`gpt2_pl.commands.support.dumps.readable`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NOTES)
            text = super().dump(namespace, *args, **kwargs)
        return readable(text, namespace)

    def save(self, namespace: Any, path: Any, *_: Any, **__: Any) -> None:
        """Write a configuration, null values included, atomically.

        Raises:
            RunError: the disk is full; an earlier file is unchanged.
        """
        with atomic_write(Path(path)) as file:
            file.write(self.dump(namespace, skip_none=False))
