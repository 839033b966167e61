"""Exceptions that end a command with one line instead of a traceback, such a line for failures of the machine, and text
of others made safe to print."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from difflib import get_close_matches
from typing import Any

# Control characters (C0, DEL, C1), line and paragraph separators, bidirectional embeddings, overrides and isolates,
# and halves of surrogate pairs: what moves the cursor, hides text, breaks a line or cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_MESSAGE = 4000  # characters
_MAX_ITEMS, _MAX_DEPTH = 4, 3  # of containers in shortened values

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quotas
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "std::bad_alloc")
_OF_THE_PROGRAM = {errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTTY}  # where no path is named
# Failures of the machine and not of a path: wherever one is found among an error's causes, it is the reason.
OF_THE_MACHINE = _FULL | {
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EROFS,
    getattr(errno, "ESTALE", errno.EIO),
}


def printable(text: object, keep: str = "") -> str:
    r"""Escape the characters of a text that would act on a terminal or a page instead of being shown.

    Use it wherever text that comes from a file, a model or another program is printed. Escapes are Python's
    (``\x1b``, ``\n``, ``\u202e``); all other Unicode text stays as it is, and so does text that is escaped already.

    Args:
        text: any text; other objects are converted by ``str``.
        keep: characters to leave alone, such as a line end in text of several lines.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], str(text))


def shorten(value: object, limit: int = 80) -> str:
    """A value as source text of at most about ``limit`` characters, escaped, for error messages.

    Takes little time and memory whatever the value: nested containers, aliases of themselves, megabytes of text.
    """
    text = _source(value, limit, _MAX_DEPTH)
    return text if len(text) <= limit + 40 else f"{text[:limit]}..."


def _source(value: object, limit: int, depth: int) -> str:
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}... ({len(value):,} characters)"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length():,} bits"
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if isinstance(value, Mapping | list | tuple | Set):
        opening, closing = "{}" if isinstance(value, Mapping | Set) else "()" if isinstance(value, tuple) else "[]"
        if not value:
            return opening + closing
        if depth == 0:
            return f"{opening}...{closing}"
        parts = []
        for item in list(zip(range(_MAX_ITEMS), value, strict=False)):
            part = _source(item[1], limit, depth - 1)
            if isinstance(value, Mapping):
                part += f": {_source(value[item[1]], limit, depth - 1)}"
            parts.append(part)
        more = [f"... {len(value) - _MAX_ITEMS:,} more"] if len(value) > _MAX_ITEMS else []
        return f"{opening}{', '.join([*parts, *more])}{closing}"
    described = _describe_tensor(value)
    return printable(described or f"{type(value).__name__} {str(value)[:limit]}")


def _describe_tensor(value: Any) -> str | None:
    """Shape, type and layout of a tensor; None of anything else."""
    if not all(hasattr(value, name) for name in ("shape", "dtype", "layout")):
        return None
    layout = str(value.layout).removeprefix("torch.")
    kind = [str(value.dtype).removeprefix("torch."), *([] if layout == "strided" else [layout])]
    return f"a tensor of shape {tuple(value.shape)}, {', '.join(kind)}"


def _message(text: object) -> str:
    """A message as one line of bounded length."""
    line = printable(text)
    if len(line) <= _MAX_MESSAGE:
        return line
    return f"{line[: _MAX_MESSAGE - 500]} ... ({len(line) - _MAX_MESSAGE:,} characters) ... {line[-500:]}"


def listing(names: Iterable[str], limit: int = 4) -> str:
    """Return sorted names, separated by commas; those beyond ``limit`` are counted."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of ``names``, whatever its case, or None if none is similar."""
    by_lower = {other.lower(): other for other in names}
    near = get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[near[0]] if near else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean NAME?"`` with the most similar of ``names``, or nothing if none is similar."""
    near = nearest(name, names)
    return "" if near is None else f"; did you mean {near}?"


class InputError(ValueError):
    """A value, file or folder the user gave cannot be used.

    The message names the key or file, the row where there is one, the value found, and what would be right. It is one
    line, escaped by :func:`printable`. The command line prints it without a traceback and ends with status 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(_message(message))


class RunError(RuntimeError):
    """A run cannot go on: the disk is full, or the loss is not a number.

    The message says where the run stood and what is left of it. It is one line, escaped by :func:`printable`. The
    command line prints it without a traceback and ends with status 1.
    """

    def __init__(self, message: object) -> None:
        super().__init__(_message(message))


def describe_failure(error: BaseException) -> str | None:
    """Describe in one line a failure of the machine or the system: of a disk, a file, memory.

    Libraries report these by errors of their own, and Rust's by a number in the text; the causes of an error are looked
    through as well.

    Returns:
        The line, or None where the error has another reason.
    """
    for cause in causes(error):
        if (reason := _describe_memory(cause)) is not None:
            return reason
    for cause in causes(error, contexts=False):
        if (reason := _describe_os_error(cause)) is not None:
            return reason
    for cause in causes(error):
        if error_number(cause) in OF_THE_MACHINE:
            return _describe_os_error(cause)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that there is no memory left, on the machine or on a device."""
    return _describe_memory(error) is not None


def _describe_memory(error: BaseException) -> str | None:
    text, where, advice = str(error), "", ""
    if isinstance(error, RuntimeError):  # torch's and other libraries' in C++
        of_device = type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in text
        if not of_device and not any(sign in text for sign in _OUT_OF_MEMORY):
            return None
        where, advice = " on the device" if of_device else "", "; a smaller batch size needs less"
    elif isinstance(error, ImportError):  # of a library that finds no room in the address space
        if not any(sign in text for sign in ("failed to map segment", os.strerror(errno.ENOMEM))):
            return None
    elif isinstance(error, SystemError):  # C code that was refused memory and forgot to say so
        if "without exception set" not in text and "without setting an exception" not in text:
            return None
    elif not isinstance(error, MemoryError):
        return None
    asked = re.search(r"(?:tried to allocate|Unable to allocate) ([\d.]+ \w+)", text, flags=re.IGNORECASE)
    return f"there is not enough memory{where}{f' for another {asked[1]}' if asked else ''}{advice}"


def _describe_os_error(error: BaseException) -> str | None:
    number = error_number(error)
    if number is None:
        return None
    reason = getattr(error, "strerror", None) or os.strerror(number)
    names = [getattr(error, name, None) for name in ("filename", "filename2")]
    path = " -> ".join(os.fsdecode(name) for name in names if isinstance(name, str | bytes))
    if not path and number in _OF_THE_PROGRAM:
        return None
    return f"{path[:500]}: {reason}" if path else str(reason)


def error_number(error: BaseException) -> int | None:
    """The system's number of an error; the loader, libraries that are written in Rust and workers only print it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in errno.errorcode else None
    text = str(error)
    if isinstance(error, ImportError):  # of a shared library
        return next((number for number in (errno.EMFILE, errno.ENFILE, errno.EIO) if os.strerror(number) in text), None)
    found = re.search(r"\[Errno (\d+)\]" if isinstance(error, OSError) else r"\(os error (\d+)\)", text)
    return None if found is None else int(found[1])


def causes(error: BaseException, contexts: bool = True) -> Iterator[BaseException]:
    """An error and what it was raised from; with ``contexts``, also what was being handled when it was raised."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and not any(cause is other for other in seen):
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or (cause.__context__ if contexts else None)


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is a Ctrl-C, or came from one: a library that is interrupted may raise an error of its own."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in causes(error))


def is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is that there is no room on the disk."""
    return any(error_number(cause) in _FULL for cause in causes(error))
