"""One-line errors: exceptions without a traceback, descriptions of system failures, and text made safe to print.

:class:`InputError` (exit status 2) and :class:`RunError` (exit status 1) end a command with one line.
:func:`describe_failure` gives such a line for a failure of the disk, a file or memory. :func:`printable` and
:func:`shorten` escape and bound text from files, models and other programs.
"""

from __future__ import annotations

import errno
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import chain
from typing import Any

# Control characters (C0, DEL, C1), line and paragraph separators, bidirectional embeddings, overrides and isolates,
# and lone surrogates: characters that move the cursor, hide text, break a line or cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_MESSAGE = 4000  # characters
_MAX_VALUE = 120  # characters of a shortened value

_OUT_OF_MEMORY = {  # class of an exception -> texts of which its message contains one if memory is exhausted
    MemoryError: ("",),
    RuntimeError: ("DefaultCPUAllocator", "not enough memory", "std::bad_alloc"),  # torch and other C++ libraries
    ImportError: ("failed to map segment", os.strerror(errno.ENOMEM)),  # no address space for a shared library
    SystemError: ("without exception set", "without setting an exception"),  # C code that set no exception
}


def _errnos(*names: str) -> set[int]:
    """Return the numbers of the named errors; not every system has all of them."""
    return {number for number, name in errno.errorcode.items() if name in names}


_DISK_FULL_ERRNOS = _errnos("ENOSPC", "EFBIG", "EDQUOT")
_PROGRAM_ERRNOS = _errnos("EBADF", "EFAULT", "EINVAL", "ENOTTY")  # program faults, if no path is named
# Failures of the machine and not of a path: one of them among an error's causes is the reason of the error.
MACHINE_ERRNOS = _DISK_FULL_ERRNOS | _errnos("EIO", "EMFILE", "ENFILE", "ENOMEM", "EROFS", "ESTALE")


def printable(text: object, keep: str = "") -> str:
    r"""Escape the characters of a text that would control a terminal or a page instead of being displayed.

    Use it for all printed text that comes from a file, a model or another program. Escapes are Python's (``\x1b``,
    ``\n``, ``\u202e``). Other Unicode text, and text that is already escaped, is unchanged.

    Args:
        text: any text; other objects are converted by ``str``.
        keep: characters that are not escaped, such as a line end in text of several lines.

    Returns:
        The escaped text.
    """
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], str(text))


class _ShortRepr(reprlib.Repr):
    """``repr`` of bounded length, in bounded time, for plain values and tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 4
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        """Return the digits of a number, or the number of its bits; Python does not format more than 4,300 digits."""
        return repr(value) if value.bit_length() <= 256 else f"a number of {value.bit_length():,} bits"

    def repr_instance(self, value: Any, level: int) -> str:
        """Return the first items of any mapping, and the shape and type of a tensor instead of its values."""
        if isinstance(value, Mapping):
            return self.repr_dict(dict(value), level)
        if all(hasattr(value, name) for name in ("shape", "dtype", "layout")):
            return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, {value.layout}"
        return super().repr_instance(value, level)


_short_repr = _ShortRepr()


def shorten(value: object) -> str:
    """Format a value as escaped source text of at most 120 characters, on one line, for error messages.

    Time and memory are bounded for any value: nested or recursive containers, megabytes of text.
    """
    text = printable(_short_repr.repr(value))
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def _message(text: object) -> str:
    """Return a message as one escaped line of bounded length."""
    line = printable(text)
    if len(line) <= _MAX_MESSAGE:
        return line
    return f"{line[: _MAX_MESSAGE - 500]} ... ({len(line) - _MAX_MESSAGE:,} characters) ... {line[-500:]}"


def listing(names: Iterable[str], limit: int = 4) -> str:
    """Join the sorted names with commas; names beyond ``limit`` are only counted."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of ``names``, ignoring case, or None if no name is similar."""
    by_lower = {other.lower(): other for other in names}
    near = get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[near[0]] if near else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean NAME?"`` with the most similar of ``names``, or ``""`` if no name is similar."""
    near = nearest(name, names)
    return "" if near is None else f"; did you mean {near}?"


class InputError(ValueError):
    """Error in a value, file or folder that the user gave.

    The message is ``SOURCE: KEY must be EXPECTED, got VALUE`` unless ``message`` is given. It is one line, escaped by
    :func:`printable`. The command line prints it without a traceback and exits with status 2.

    Args:
        message: the text after ``SOURCE: ``; other objects are converted by ``str``.
        key: the setting, argument or key of a file that is wrong, such as ``data.batch_size``; empty for errors of a
            whole file or folder.
        value: its value.
        expected: the valid values, such as ``at least 1``.
        source: the file, and the row if there is one; empty for values from the command line or from code.

    Attributes:
        key, value, expected: the arguments.
        source: the argument, as text.
    """

    def __init__(
        self, message: object = None, *, key: str = "", value: object = None, expected: str = "", source: object = ""
    ) -> None:
        self.key, self.value, self.expected, self.source = key, value, expected, str(source)
        if message is None:
            message = f"{key} must be {expected}, got {shorten(value)}"
        super().__init__(_message(f"{source}: {message}" if source else message))


def require(is_valid: bool, key: str, value: object, expected: str, source: object = "") -> None:
    """Refuse a value that is not valid.

    Args:
        is_valid: the condition.
        key: as in :class:`InputError`.
        value: as in :class:`InputError`.
        expected: as in :class:`InputError`.
        source: as in :class:`InputError`.

    Raises:
        InputError: ``is_valid`` is false.
    """
    if not is_valid:
        raise InputError(key=key, value=value, expected=expected, source=source)


class RunError(RuntimeError):
    """Error that stops a run, such as a full disk or a loss that is not a number.

    The message names the step that failed and the results that are kept. It is one line, escaped by :func:`printable`.
    The command line prints it without a traceback and exits with status 1.

    Args:
        message: the text; other objects are converted by ``str``.
    """

    def __init__(self, message: object) -> None:
        super().__init__(_message(message))


def describe_failure(error: BaseException) -> str | None:
    """Describe a failure of the disk, a file or memory in one line.

    Libraries wrap such failures in their own exception classes, and libraries written in Rust only print the errno in
    the text. Therefore the causes of ``error`` are searched too.

    Args:
        error: any exception.

    Returns:
        The description, or None if the error has another reason.
    """
    machine_failures = (cause for cause in causes(error) if error_number(cause) in MACHINE_ERRNOS)
    reasons = chain(
        map(_describe_memory, causes(error)),
        map(_describe_os_error, causes(error, contexts=False)),
        map(_describe_os_error, machine_failures),
    )
    return next(filter(None, reasons), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports exhausted memory, of the host or of a device."""
    return _describe_memory(error) is not None


def _describe_memory(error: BaseException) -> str | None:
    text, is_runtime_error = str(error), isinstance(error, RuntimeError)
    is_device = is_runtime_error and (type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in text)
    signs = next((signs for kind, signs in _OUT_OF_MEMORY.items() if isinstance(error, kind)), ())
    if not is_device and not any(sign in text for sign in signs):
        return None
    where = " on the device" if is_device else ""
    advice = "; a smaller batch size needs less" if is_runtime_error else ""
    size = re.search(r"(?:tried to allocate|Unable to allocate) ([\d.]+ \w+)", text, flags=re.IGNORECASE)
    return f"there is not enough memory{where}{f' for another {size[1]}' if size else ''}{advice}"


def _describe_os_error(error: BaseException) -> str | None:
    number = error_number(error)
    if number is None:
        return None
    reason = getattr(error, "strerror", None) or os.strerror(number)
    names = [getattr(error, name, None) for name in ("filename", "filename2")]
    path = " -> ".join(os.fsdecode(name) for name in names if isinstance(name, str | bytes))
    if not path and number in _PROGRAM_ERRNOS:
        return None
    return f"{path[:500]}: {reason}" if path else str(reason)


def error_number(error: BaseException) -> int | None:
    """Return the errno of an exception, or None if it has none.

    The dynamic loader, libraries written in Rust and worker processes only print the errno or its text in the message.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in errno.errorcode else None
    text = str(error)
    if isinstance(error, ImportError):  # from loading a shared library
        return next((number for number in (errno.EMFILE, errno.ENFILE, errno.EIO) if os.strerror(number) in text), None)
    match = re.search(r"\[Errno (\d+)\]" if isinstance(error, OSError) else r"\(os error (\d+)\)", text)
    return None if match is None else int(match[1])


def causes(error: BaseException, contexts: bool = True) -> Iterator[BaseException]:
    """Yield an exception and its chain of causes.

    Args:
        error: the exception.
        contexts: follow ``__context__`` (the exception that was being handled) where ``__cause__`` is not set.

    Yields:
        ``error``, then its causes, each once.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and not any(cause is other for other in seen):
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or (cause.__context__ if contexts else None)


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception is a KeyboardInterrupt or was caused by one.

    An interrupted library may raise an exception of its own class.
    """
    return any(isinstance(cause, KeyboardInterrupt) for cause in causes(error))


def is_full(error: BaseException) -> bool:
    """Return whether an exception, or one of its causes, reports a full disk or an exhausted quota."""
    return any(error_number(cause) in _DISK_FULL_ERRNOS for cause in causes(error))
