"""The subcommands of ``gpt2-pl``, a file each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from gpt2_pl.errors import InputError

RUNS = Path("lightning_logs")  # the folder of runs, below the working directory


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise InputError(f"{message} ({self.prog} --help lists all options)")
