"""Writing whole files or none."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from gpt2_pl.errors import InputError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def existing_file(path: str | Path, key: str) -> Path:
    """The path of a file that is there, with ``~`` for the user's folder.

    Raises:
        InputError: naming ``key``, the option that held the path: it is a folder, or there is nothing.
    """
    try:
        file = Path(path).expanduser()
        is_file, is_folder = file.is_file(), file.is_dir()
    except (OSError, RuntimeError):  # a name that is too long, an unknown ~user
        is_file = is_folder = False
    if is_folder:
        raise InputError(f"{key}: {path} is a folder, not a file")
    if not is_file:
        raise InputError(f"{key}: there is no file {str(path)[:500]}")
    return file


def check_new(path: Path, key: str = "out") -> None:
    """Refuse, before anything is computed, a file or folder that exists or that could not be made.

    Raises:
        InputError: naming ``key``, the option that held the path.
    """
    if path.exists():
        raise InputError(f"{key}: {path} exists already; give one that does not")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"{key}: {path} cannot be made: {above} is not a folder")


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[Any]:
    """Write a file beside its place and rename it when all is written: nobody ever reads half of it.

    Several processes may write the same file; what one of them leaves unfinished is deleted.

    Args:
        path: its place; folders that are missing are made.
        mode: ``w`` for UTF-8 text, ``wb`` for bytes.

    Raises:
        RunError: there is no room for it; what stood in its place is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex[:12]}.part")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with part.open(mode, **text) as file:
            yield file
            if not file.closed:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        # torch's writer replaces the error of a full disk by one of its own
        causes = (error, error.__cause__, error.__context__)
        if any(isinstance(cause, OSError) and cause.errno in _FULL for cause in causes):
            before = "; what was there before is as it was" if path.exists() else ""
            raise RunError(f"there is no room to write {path}{before}; free some space and go on") from None
        raise
    finally:
        part.unlink(missing_ok=True)
