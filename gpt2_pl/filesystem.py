"""File checks, atomic writes, and model folders from the Hugging Face hub."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

from gpt2_pl.errors import (
    MACHINE_ERRNOS,
    InputError,
    RunError,
    causes,
    describe_failure,
    error_number,
    is_full,
    is_interrupt,
    nearest,
)

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"  # in a pretrained folder
_IS_WINDOWS, _RENAME_ATTEMPTS = os.name == "nt", 20
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def require_file(path: str | Path, key: str) -> Path:
    """Return the path of an existing regular file.

    A leading ``~`` is expanded to the user's folder unless a file of that literal name exists.

    Args:
        path: the path of the file.
        key: the option that holds the path, for the error message.

    Raises:
        InputError: the path does not exist, cannot be read, or is a folder, a device, a pipe or a socket.
    """
    shown = str(path)[:500]
    try:
        file = Path(path) if Path(path).exists() else Path(path).expanduser()
        is_regular = stat.S_ISREG(file.stat().st_mode)
        if is_regular:
            file.open("rb").close()  # it may not be readable
    except (OSError, RuntimeError, ValueError) as error:  # the last two: an unknown ~user, a null character
        if isinstance(error, OSError) and error.errno not in _NO_SUCH_FILE:
            raise InputError(f"{key}: {shown} cannot be read: {error.strerror}", key=key) from None
        raise InputError(f"{key}: there is no file {shown}{_near_file(Path(path))}", key=key) from None
    if not is_regular:
        raise InputError(f"{key}: {shown} is not a regular file", key=key)
    return file


def _near_file(path: Path) -> str:
    """Return a hint ``"; did you mean FILE?"`` with the file of the most similar name in the same folder, or ``""``."""
    try:
        names = [entry.name for entry in os.scandir(path.parent.expanduser()) if entry.is_file()]
    except (OSError, RuntimeError, ValueError):  # see require_file
        return ""
    near = nearest(path.name, names)
    return "" if near is None else f"; did you mean {path.with_name(near)}?"


def read_text(path: str | Path, key: str) -> str:
    r"""Read a UTF-8 text file, with ``\n`` as line end and without leading byte order marks.

    Args:
        path: the path of the file.
        key: the option that holds the path, for the error message.

    Raises:
        InputError: the file does not exist, or is not UTF-8.
    """
    try:
        return require_file(path, key).read_text(encoding="utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{key}: {path} is not UTF-8 text: {error}", key=key) from None


def require_absent(path: Path, key: str = "out") -> None:
    """Check, before anything is computed, that a new file or folder can be created.

    Args:
        path: the path of the new file or folder.
        key: the option that holds the path, for the error message.

    Raises:
        InputError: the path exists already or cannot be created.
    """
    require_writable(path, key)
    if path.exists():
        raise InputError(f"{key}: {path} exists already; give a new path", key=key)


def require_writable(path: Path, key: str) -> None:
    """Check, before anything is computed, that a file or folder can be written.

    Args:
        path: the path of the file or folder.
        key: the option that holds the path, for the error message.

    Raises:
        InputError: a name or the path is too long, a parent is not a folder, the path is a device, a pipe or a socket,
            or the folder is not writable.
    """
    full = path.absolute()
    existing = next(part for part in (full, *full.parents) if os.path.lexists(part))
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            _temporary_path(full).lstat()  # its name may be too long
        with TemporaryFile(dir=full.parent if full.is_file() else existing):
            pass
    except OSError as error:
        raise InputError(f"{key}: {str(path)[:500]} cannot be created, {existing}: {error.strerror}", key=key) from None


@contextmanager
def reraise_disk_full(path: Path) -> Iterator[None]:
    """Convert errors of the disk or the system while ``path`` is written to RunError.

    Args:
        path: the file that is written in the ``with`` block.

    Raises:
        RunError: the disk is full or fails.
        KeyboardInterrupt: the block was interrupted, even if the writing library raised an error of its own class.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:  # torch, pyarrow and other writers raise their own classes
        if is_interrupt(error):
            raise KeyboardInterrupt from None
        previous = "; the previous file is unchanged" if os.path.isfile(path) else ""
        if is_full(error):
            raise RunError(f"disk full while writing {path}{previous}; free some space and try again") from None
        if any(error_number(cause) in MACHINE_ERRNOS and not _names_other(cause, path) for cause in causes(error)):
            raise RunError(f"{path} cannot be written: {describe_failure(error)}{previous}") from None
        raise


def _names_other(error: BaseException, path: Path) -> bool:
    """Return whether an error names a file other than ``path`` and its temporary file, such as an input file."""
    name = getattr(error, "filename", None)
    return isinstance(name, str | bytes) and path.name not in os.fsdecode(name)


def _temporary_path(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid4().hex[:12]}.part"


def _replace(part: Path, path: Path) -> None:
    """Rename a file over another; on Windows, wait up to two seconds for a reader that has the other open."""
    for _ in range(_RENAME_ATTEMPTS - 1 if _IS_WINDOWS else 0):
        with suppress(PermissionError):
            part.replace(path)
            return
        time.sleep(0.1)
    part.replace(path)


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[Any]:
    """Write a file atomically: write a temporary file in the same folder, then rename it.

    Readers never see a partial file. Several processes may write the same file. Unfinished temporary files are deleted.

    Args:
        path: the final path; missing folders are created.
        mode: ``w`` for UTF-8 text, ``wb`` or ``w+b`` for bytes.

    Yields:
        The open temporary file.

    Raises:
        InputError: the file cannot be created.
        RunError: the disk is full or fails; a previous file at ``path`` is unchanged.
    """
    part = _temporary_path(path)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with reraise_disk_full(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = part.open(mode, **text)
        except OSError as error:
            if error.errno in MACHINE_ERRNOS:
                raise
            raise InputError(f"{str(path)[:500]} cannot be written: {error.strerror}") from None
        try:
            with opened as file:
                yield file
                if not file.closed:
                    file.flush()
                    os.fsync(file.fileno())
            _replace(part, path)
        finally:
            with suppress(OSError):  # a failing disk cannot delete either
                part.unlink(missing_ok=True)


def hub_id(path_or_id: str | os.PathLike[str]) -> str | None:
    """Return an id of the Hugging Face hub; None for a path that exists, and for what cannot be an id."""
    try:
        is_id = bool(HUB_ID.fullmatch(str(path_or_id))) and not Path(path_or_id).expanduser().exists()
    except (OSError, RuntimeError):  # a name that is too long, an unknown ~user
        is_id = False
    return str(path_or_id) if is_id else None


def resolve_checkpoint_dir(path_or_id: str | os.PathLike[str], key: str = "base") -> Path:
    """Return the local folder of a pretrained GPT-2; download it if it is a hub id.

    Args:
        path_or_id: a folder with config.json and model.safetensors (or its shards and their index), or a hub id.
        key: the option that holds it, for the error message.

    Raises:
        InputError: there is no such folder, and the hub id does not exist or cannot be downloaded.
    """
    with suppress(OSError, RuntimeError):  # a name that is too long, an unknown ~user
        folder = Path(path_or_id).expanduser()
        if folder.is_dir():
            return folder
    advice = f"give the path of a folder with config.json and {WEIGHTS}"
    if hub_id(path_or_id) is None:
        raise InputError(f"{key}: there is no folder {str(path_or_id)[:200]}; {advice}", key=key)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "model*.safetensors", WEIGHTS_INDEX, "tokenizer*.json", "vocab.json", "merges.txt"]
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own classes, httpx's and OSError
        problem = "is neither a local folder nor an available Hugging Face hub model"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{key}: {path_or_id!r} {problem} ({reason}); {advice}", key=key) from error
