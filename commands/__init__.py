"""The subcommands of ``gpt2-pl``, a file each."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from commands.plugins import import_plugin
from gpt2_pl.errors import InputError, did_you_mean

RUNS = Path("lightning_logs")  # the folder of runs, below the working directory


class _Import(argparse.Action):
    """Imports the module that an option names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Import it."""
        import_plugin(values)


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are one line.

    Args:
        plugins: whether the command reads checkpoints, which may name classes of the user's own modules: ``--plugin``
            imports such a module when the arguments are parsed.
    """

    def __init__(self, plugins: bool = False, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        if plugins:
            self.add_argument(
                "--plugin",
                metavar="MODULE",
                action=_Import,
                help="import a module of your own, such as mine for mine.py in the working folder, whose tasks or "
                "surgery the checkpoint names; can be given several times",
            )

    def error(self, message: str) -> NoReturn:
        """Raise it, with the nearest option where one is not known."""
        near = ""
        if found := re.search(r"unrecognized arguments: (?:.* )?(--[^\s=]+)", message):
            message = f"there is no option {found[1]}"
            near = did_you_mean(found[1], self._option_string_actions)
        elif found := re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message):
            near = did_you_mean(found[1], re.findall(r"[\w.-]+", found[2]))
        raise InputError(f"{message}{near} ({self.prog} --help lists all options)")
