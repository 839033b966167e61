"""Location of exceptions in user code: the file, the line and the object."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from gpt2_pl.errors import InputError, RunError, causes

PACKAGES: set[str] = set()  # top-level names of the user's own modules that were imported at the user's request

_LIBRARY = {"gpt2_pl", "cli"}
_DEPENDENCIES = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "tokenizers", "datasets"}
_STDLIB = sysconfig.get_path("stdlib")


class Fault(NamedTuple):
    """Exception in user code.

    Attributes:
        text: ``FILE, line N: TYPE: MESSAGE``.
        objects: the objects whose methods were running in user code, innermost first.
    """

    text: str
    objects: list[Any]


def add_package(module: str) -> None:
    """Note that the user named a module, unless it belongs to this library or to one of its dependencies.

    Args:
        module: dotted name of the module.
    """
    name = module.partition(".")[0]
    if name not in _LIBRARY | _DEPENDENCIES:
        PACKAGES.add(name)


def is_installed(frame: FrameType) -> bool:
    """Return whether a frame runs code of Python or of an installed package.

    This library and packages that were imported at the user's request do not count as installed.
    """
    package = _package(frame)
    if package in _LIBRARY or package in PACKAGES:
        return False
    file = frame.f_code.co_filename
    installed = file.startswith((_STDLIB, "<")) or {"site-packages", "dist-packages"} & {*Path(file).parts}
    return package in _DEPENDENCIES or bool(installed)


def find_fault(error: BaseException) -> Fault | None:
    """Find the innermost line of user code in the traceback of an exception or of one of its causes.

    Args:
        error: the exception.

    Returns:
        The fault, or None if no user code is involved, if the exception was raised by this library, or if it is an
        :class:`InputError` or a :class:`RunError`, whose message is complete.
    """
    if any(isinstance(cause, InputError | RunError) for cause in causes(error)):
        return None
    for cause in causes(error):
        if isinstance(cause, SyntaxError) and cause.filename:
            continue
        calls = [(frame, line) for frame, line in traceback.walk_tb(cause.__traceback__) if not is_installed(frame)]
        if calls and _package(calls[-1][0]) not in _LIBRARY:
            user_frames = [frame for frame, _ in reversed(calls) if _package(frame) not in _LIBRARY]
            objects = [*filter(_is_user_object, map(_first_argument, user_frames))]
            frame, line = calls[-1]
            return Fault(located(cause, frame.f_code.co_filename, line), objects)
    return None


def located(error: BaseException, file: str, line: int | None) -> str:
    """Format an exception as ``FILE, line N: TYPE: MESSAGE``, in one line."""
    return f"{file}, line {line}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _first_argument(frame: FrameType) -> Any:
    """Return the first argument of a frame's function (``self`` in a method), or None if it has no arguments."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _is_user_object(value: Any) -> bool:
    """Return whether a value is an instance of a class that belongs to neither Python, a dependency nor gpt2_pl."""
    package = type(value).__module__.partition(".")[0]
    return package not in ("builtins", *_DEPENDENCIES) and package not in _LIBRARY
