"""Argument parser of the commands without configuration files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from gpt2_pl.errors import InputError, did_you_mean, require
from gpt2_pl.filesystem import require_absent


class CommandParser(argparse.ArgumentParser):
    """Argument parser that raises errors of one line.

    Args:
        **kwargs: arguments of ``argparse.ArgumentParser``.

    Attributes:
        options: names of the options of the command that was parsed last, with dashes.
    """

    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """Add an argument whose help ends with its default, or with ``(required)``."""
        default, text = kwargs.get("default"), kwargs.get("help", "")
        if default is not None and default is not argparse.SUPPRESS:
            kwargs["help"] = f"{text} (default: %(default)s)"
        elif names[0].startswith("--") and "(default" not in text:
            absent = "no" if kwargs.get("action") == "store_true" else "none"
            kwargs["help"] = f"{text} (required)" if kwargs.get("required") else f"{text} (default: {absent})"
        return super().add_argument(*names, **kwargs)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse arguments, and keep the names of the options for :func:`with_dashes`."""
        CommandParser.options = frozenset(self._option_string_actions)
        return super().parse_known_args(*args, **kwargs)

    def add_run(self, text: str = "folder of the run") -> None:
        """Add the run whose model is used, with its description, and the modules that its checkpoint needs."""
        self.add_plugin()
        self.add_argument("run", metavar="RUN", type=Path, help=text)

    def add_plugin(self) -> None:
        """Add the modules that a checkpoint needs."""
        self.add_argument(
            "--plugin",
            metavar="MODULE",
            action="append",
            help="module with the task or surgery of the checkpoint, such as mine for mine.py in the working "
            "directory; can be given several times",
        )

    def add_output(self, metavar: str, text: str, required: bool = True) -> None:
        """Add the output file or folder, with its description, and the checkpoint and the base of the model."""
        self.add_argument("--out", type=Path, required=required, metavar=metavar, help=f"{text}; it must not exist")
        self.add_checkpoint()

    def add_checkpoint(self) -> None:
        """Add the checkpoint and the base of the model."""
        self.add_argument("--ckpt_path", type=Path, metavar="FILE", help="checkpoint (default: that of the best epoch)")
        self.add_argument("--base", help="new path or hub id of the pretrained base, if it has moved since training")

    def add_calibrated(self) -> None:
        """Add the option that scales class probabilities."""
        text = "scale the probabilities by the temperature of RUN/calibration.json, which gpt2-pl inspect writes"
        self.add_argument("--calibrated", action="store_true", help=text)

    def add_sampling(self) -> None:
        """Add the length of continuations and the options of sampling, without its seed."""
        add, own = self.add_argument, "(default: that of the task, or"
        add("--max_new_tokens", type=int, metavar="N", help=f"tokens per prompt at most {own} 220)")
        add("--temperature", type=float, metavar="T", help=f"0 for greedy decoding {own} 1.0)")
        add("--top_k", type=int, metavar="K", help=f"sample from the K most likely tokens {own} all)")
        top_p_help = f"sample from the most likely tokens with a total probability of P {own} 0.9)"
        add("--top_p", type=float, metavar="P", help=top_p_help)

    def error(self, message: str) -> NoReturn:
        """Raise an InputError with the message and the nearest option or choice to an unknown one."""
        near = key = ""
        if match := re.match(r"unrecognized arguments: (?:.* )?(--[^\s=]+)", message):
            near, key = did_you_mean(match[1], self._option_string_actions), match[1]
        elif match := re.match(r"argument (\S+): (?:invalid choice: '(.+?)' \(choose from (.+)\))?", message):
            near, key = did_you_mean(match[2] or "", re.findall(r"[\w.-]+", match[3] or "")), match[1]
        raise InputError(f"{message}{near} ({self.prog} --help lists all options)", key=key.removeprefix("--"))


def with_dashes(error: InputError) -> str:
    """Return the message of an error; the name of an option at its start is preceded by dashes."""
    text = str(error)
    is_option = f"--{error.key}" in CommandParser.options and re.match(rf"{re.escape(error.key)}\b", text)
    return f"--{text}" if is_option else text


def require_one(options: argparse.Namespace, first: str, second: str) -> None:
    """Check that exactly one of two options is given.

    Raises:
        InputError: neither or both are.
    """
    given = [key for key in (first, second) if getattr(options, key) is not None]
    if len(given) != 1:
        problem = "are both given; leave one of them out" if given else "is missing; give one of them"
        joined = "and" if given else "or"
        raise InputError(f"--{first} {joined} --{second} {problem}", key=first)


def check_batches(options: argparse.Namespace, extensions: Collection[str]) -> None:
    """Check the output file of a command, unless it is standard output, and the batch size.

    Raises:
        InputError: the file exists, cannot be written or has another extension; or the batch size is below 1.
    """
    if options.out not in (None, Path("-")):
        require_absent(options.out)
        require_extension(options.out, "out", extensions)
    require(options.batch_size >= 1, "batch_size", options.batch_size, "at least 1")


def require_extension(path: Path, key: str, extensions: Collection[str]) -> None:
    """Check that the name of a file has one of the extensions, in lower or upper case.

    Raises:
        InputError: it does not.
    """
    if path.suffix.lower() not in extensions:
        expected = f"a file with one of the extensions {', '.join(extensions)}"
        raise InputError(f"{key} must be {expected}, got {path}", key=key, value=path, expected=expected)
