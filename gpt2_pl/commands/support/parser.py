"""Argument parser of the commands without configuration files."""

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

_RUN_FOLDER = f"{RUNS}/NAME/version_N"


def best_checkpoint(run: Path) -> Path:
    """Return the path of the best checkpoint in the folder of a run.

    Raises:
        InputError: the folder does not exist or has no such checkpoint; the message names similar runs.
    """
    file = run / "checkpoints" / "best.ckpt"
    if not os.path.isdir(run):  # unlike Path.is_dir, it does not raise an error for names that are too long
        raise InputError(f"RUN: there is no folder {run}{similar_run(run)}; the folder of a run is {_RUN_FOLDER}")
    if not os.path.exists(file):
        below = sorted(str(path.parents[1]) for path in islice(run.rglob("checkpoints/best.ckpt"), 100))
        hint = f"; runs below it are {', '.join(below[:5])}" if below else f"; the folder of a run is {_RUN_FOLDER}"
        raise InputError(f"RUN: {run} has no checkpoints/best.ckpt{hint}")
    return file


def similar_run(run: Path) -> str:
    """Return a hint ``"; did you mean FOLDER?"`` for a run folder that does not exist, or an empty string.

    A number N suggests ``version_N``.
    """
    names = [folder.name for folder in run.parent.iterdir() if folder.is_dir()] if os.path.isdir(run.parent) else []
    if (numbered := f"version_{run.name}") in names:
        return f"; did you mean {run.with_name(numbered)}?"
    near = nearest(run.name, names)
    return "" if near is None else f"; did you mean {run.with_name(near)}?"


class _ImportAction(argparse.Action):
    """Action that imports the module that an option names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Import the module."""
        import_plugin(values)


class CommandParser(argparse.ArgumentParser):
    """Argument parser that raises errors of one line.

    Args:
        plugins: whether to add the option ``--plugin``, which imports a module with classes that checkpoints name.
        **kwargs: arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, plugins: bool = False, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        if plugins:
            self.add_argument(
                "--plugin",
                metavar="MODULE",
                action=_ImportAction,
                help="module with the task or surgery of the checkpoint, such as mine for mine.py in the working "
                "folder; can be given several times",
            )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; report unknown options before missing ones, in contrast to argparse."""
        args = list(sys.argv[1:] if args is None else args)
        for option in (arg.partition("=")[0] for arg in args[: args.index("--") if "--" in args else None]):
            if re.fullmatch(r"--[a-zA-Z][\w-]*", option) and option not in self._option_string_actions:
                near = did_you_mean(option, self._option_string_actions)
                self.error(f"unknown option {option}{near}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise an InputError with the message and, for an invalid choice, the nearest valid one."""
        match = re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message)
        near = did_you_mean(match[1], re.findall(r"[\w.-]+", match[2])) if match else ""
        raise InputError(f"{message}{near} ({self.prog} --help lists all options)")
