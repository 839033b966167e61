"""Exceptions in code of the user's own: in which file and line, and in a method of which object."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from gpt2_pl.errors import InputError, RunError, causes

PACKAGES: set[str] = set()  # top-level names of the modules that were imported because the user names them

_LIBRARY = {"gpt2_pl", "cli"}
_DEPENDENCIES = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "tokenizers", "datasets"}
_STDLIB = sysconfig.get_path("stdlib")


class Fault(NamedTuple):
    """An exception in code of the user's own.

    Attributes:
        text: ``FILE, line N: TYPE: MESSAGE``.
        objects: those whose methods were running in code of the user's own, innermost first.
    """

    text: str
    objects: list[Any]


def is_installed(frame: FrameType) -> bool:
    """Whether code is Python's or an installed package's, neither this library's nor one that the user names."""
    package = _package(frame)
    if package in _LIBRARY or package in PACKAGES - _DEPENDENCIES:
        return False
    file = frame.f_code.co_filename
    installed = file.startswith((_STDLIB, "<")) or {"site-packages", "dist-packages"} & {*Path(file).parts}
    return package in _DEPENDENCIES or bool(installed)


def find_fault(error: BaseException) -> Fault | None:
    """Find the line of the user's own code in which an exception was raised, or that called the package that did.

    Args:
        error: an exception, or one that was raised from it.

    Returns:
        The fault; None if the exception comes from this library, from no code of the user's own, or is one whose
        message is complete as it is (:class:`InputError` and :class:`RunError`).
    """
    if any(isinstance(cause, InputError | RunError) for cause in causes(error)):
        return None
    for cause in causes(error):
        if isinstance(cause, SyntaxError) and cause.filename:
            continue
        called = [(frame, line) for frame, line in traceback.walk_tb(cause.__traceback__) if not is_installed(frame)]
        if called and _package(called[-1][0]) not in _LIBRARY:
            own = [frame for frame, _ in reversed(called) if _package(frame) not in _LIBRARY]
            frame, line = called[-1]
            return Fault(located(cause, frame.f_code.co_filename, line), [*filter(_is_object, map(_receiver, own))])
    return None


def located(error: BaseException, file: str, line: int | None) -> str:
    """Describe an exception as ``FILE, line N: TYPE: MESSAGE``, in one line."""
    return f"{file}, line {line}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _receiver(frame: FrameType) -> Any:
    """The first argument of the function that a frame runs, which is the object for a method; None without one."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _is_object(value: Any) -> bool:
    """Whether a value is an instance of a class that is neither Python's nor a dependency's."""
    package = type(value).__module__.partition(".")[0]
    return package not in ("builtins", *_DEPENDENCIES) and package not in _LIBRARY
