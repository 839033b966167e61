"""The parser of commands that read no configuration."""

from __future__ import annotations

import argparse
import os
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from gpt2_pl.commands.support.plugins import import_plugin
from gpt2_pl.errors import InputError, did_you_mean, nearest
from gpt2_pl.experiments.run import RUNS


def best_checkpoint(run: Path) -> Path:
    """The best checkpoint in a run's folder.

    Raises:
        InputError: there is no such folder, or it is no run's; the message names runs that may be meant.
    """
    file = run / "checkpoints" / "best.ckpt"
    if not os.path.isdir(run):  # also where the name is too long for a folder
        raise InputError(f"RUN: there is no folder {run}{similar_run(run)}; a run's folder is {RUNS}/NAME/version_N")
    if not os.path.exists(file):
        below = sorted(str(found.parents[1]) for found in islice(run.rglob("checkpoints/best.ckpt"), 100))
        hint = f"; runs below it are {', '.join(below[:5])}" if below else f"; a run's folder is {RUNS}/NAME/version_N"
        raise InputError(f"RUN: {run} has no checkpoints/best.ckpt{hint}")
    return file


def similar_run(run: Path) -> str:
    """Return ``"; did you mean FOLDER?"`` for the folder of a run that is not there; for a number, ``version_N``."""
    names = [folder.name for folder in run.parent.iterdir() if folder.is_dir()] if os.path.isdir(run.parent) else []
    if (numbered := f"version_{run.name}") in names:
        return f"; did you mean {run.with_name(numbered)}?"
    near = nearest(run.name, names)
    return "" if near is None else f"; did you mean {run.with_name(near)}?"


class _Import(argparse.Action):
    """Imports the module that an option names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Import it."""
        import_plugin(values)


class CommandParser(argparse.ArgumentParser):
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

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, after refusing options that do not exist: argparse first asks for those that are missing."""
        args = list(sys.argv[1:] if args is None else args)
        for option in (arg.partition("=")[0] for arg in args[: args.index("--") if "--" in args else None]):
            if re.fullmatch(r"--[a-zA-Z][\w-]*", option) and option not in self._option_string_actions:
                near = did_you_mean(option, self._option_string_actions)
                self.error(f"there is no option {option}{near}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise it, with the nearest choice where one is not known."""
        found = re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message)
        near = did_you_mean(found[1], re.findall(r"[\w.-]+", found[2])) if found else ""
        raise InputError(f"{message}{near} ({self.prog} --help lists all options)")
