"""Files: whether they can be read and written, atomic writes, and folders of the Hugging Face hub."""

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
    OF_THE_MACHINE,
    InputError,
    RunError,
    causes,
    describe_failure,
    error_number,
    is_full,
    is_interrupt,
)

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"  # of a pretrained folder
_WINDOWS, _ATTEMPTS = os.name == "nt", 20
_LONGEST_NAME, _LONGEST_PATH = 230, 3900  # bytes; systems have 255 and 4095, and a part's name has 20 more


def require_file(path: str | Path, key: str) -> Path:
    """The path of a file that is there. A ``~`` at its start is the user's folder unless a file has that very name.

    Raises:
        InputError: naming ``key``, the option that held the path: it is a folder, a device or a pipe, or there is
            nothing.
    """
    special = None
    try:
        file = Path(path)
        if not file.exists():
            file = file.expanduser()
        is_file, is_folder, special = file.is_file(), file.is_dir(), special_kind(file)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL):
            raise InputError(f"{key}: {str(path)[:500]} cannot be read: {error.strerror}") from None
        is_file = is_folder = False
    except RuntimeError:  # an unknown ~user
        is_file = is_folder = False
    if is_folder:
        raise InputError(f"{key}: {path} is a folder, not a file")
    if special is not None:
        raise InputError(f"{key}: {path} is {special}, not a regular file; copy its contents into one and name that")
    if not is_file:
        raise InputError(f"{key}: there is no file {str(path)[:500]}")
    return file


def special_kind(path: Path) -> str | None:
    """What is neither a regular file nor a folder, with an article; None for those and where there is nothing."""
    kinds = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    try:
        return kinds.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError):
        return None


def read_text(path: str | Path, key: str) -> str:
    """The contents of a UTF-8 text file with ``\\n`` at its line ends, without byte order marks at its start.

    Raises:
        InputError: naming ``key``, the option that held the path: there is no such file, or it is not UTF-8.
    """
    try:
        return require_file(path, key).read_text(encoding="utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{key}: {path} is not UTF-8 text: {error}") from None


def require_absent(path: Path, key: str = "out") -> None:
    """Refuse, before anything is computed, a file or folder that exists or that could not be made.

    Raises:
        InputError: naming ``key``, the option that held the path.
    """
    require_writable(path, key)
    if path.exists():
        raise InputError(f"{key}: {path} exists already; give one that does not")


def require_writable(path: Path, key: str) -> None:
    """Refuse, before anything is computed, a place where no file or folder can be made.

    Raises:
        InputError: naming ``key``, the option that held the path: a name or the path is too long, a file is where a
            folder must be, it is a device or a pipe, or nothing can be written there.
    """
    longest = max(len(os.fsencode(name)) for name in (*path.parts, ""))
    try:
        if longest > _LONGEST_NAME or len(os.fsencode(path.absolute())) > _LONGEST_PATH:
            raise InputError(
                f"{key}: {str(path)[:100]} ... is too long; a name has at most {_LONGEST_NAME} bytes, and a path "
                f"{_LONGEST_PATH}"
            )
        above = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
        if above.is_symlink() and not above.exists():
            raise InputError(
                f"{key}: {path} cannot be made: {above} is a link to {os.readlink(above)}, which does not exist"
            )
        if above == path.absolute() and (special := special_kind(above)) is not None:
            raise InputError(f"{key}: {path} is {special}, not a regular file; give the path of a new file")
        folder = above.parent if above == path.absolute() and above.is_file() else above
        if not folder.is_dir():
            raise InputError(f"{key}: {path} cannot be made: {folder} is not a folder")
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{key}: {path} cannot be made: {error.strerror}") from None


@contextmanager
def reraise_disk_full(path: Path) -> Iterator[None]:
    """Report what fails while ``path`` is written.

    Raises:
        RunError: there is no room for it, or the disk fails.
        KeyboardInterrupt: as it was, also where the library that was writing made another error of it.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:  # torch's, pyarrow's and other writers have errors of their own
        if is_interrupt(error):
            raise KeyboardInterrupt from None
        before = "; what was there before is as it was" if os.path.isfile(path) else ""
        if is_full(error):
            raise RunError(f"there is no room to write {path}{before}; free some space and go on") from None
        if any(error_number(cause) in OF_THE_MACHINE and not _names_other(cause, path) for cause in causes(error)):
            raise RunError(f"{path} cannot be written: {describe_failure(error)}{before}") from None
        raise


def _names_other(error: BaseException, path: Path) -> bool:
    """Whether an error names a file that is not ``path`` or its part: it was read, perhaps, to write this one."""
    name = getattr(error, "filename", None)
    return isinstance(name, str | bytes) and path.name not in os.fsdecode(name)


def _replace(part: Path, path: Path) -> None:
    """Rename a file over another; on Windows, that waits a moment for a reader that has the other open."""
    for _ in range(_ATTEMPTS - 1 if _WINDOWS else 0):
        with suppress(PermissionError):
            part.replace(path)
            return
        time.sleep(0.1)
    part.replace(path)


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[Any]:
    """Write a file beside its place and rename it when all is written: nobody ever reads half of it.

    Several processes may write the same file; what one of them leaves unfinished is deleted.

    Args:
        path: its place; folders that are missing are made.
        mode: ``w`` for UTF-8 text, ``wb`` for bytes.

    Raises:
        InputError: no file can be made there.
        RunError: there is no room for it; what stood in its place is as it was.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex[:12]}.part")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with reraise_disk_full(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = part.open(mode, **text)
        except OSError as error:
            if error.errno in OF_THE_MACHINE:
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
            with suppress(OSError):  # on a disk that fails
                part.unlink(missing_ok=True)


def resolve_checkpoint_dir(path_or_id: str | os.PathLike[str], key: str = "base") -> Path:
    """The local folder of a pretrained GPT-2: ``path_or_id`` itself, or the hub's download of that id.

    Args:
        path_or_id: a folder with config.json and model.safetensors (or its shards and their index), or a hub id.
        key: the option that held it, for the error message.

    Raises:
        InputError: no such folder, and no such id within reach.
    """
    try:
        folder = Path(path_or_id).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, an unknown ~user
        raise InputError(f"{key}: there is no folder {str(path_or_id)[:200]} ({error})") from None
    if is_folder:
        return folder
    if exists:
        raise InputError(f"{key}: {path_or_id} is a file; give the folder that holds config.json and {WEIGHTS}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path_or_id)) or str(path_or_id).startswith("."):
        raise InputError(f"{key}: there is no folder {path_or_id}")
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "model*.safetensors", WEIGHTS_INDEX, "tokenizer*.json", "vocab.json", "merges.txt"]
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, httpx's and OSError's classes
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{key}: {path_or_id!r} is neither a folder here nor a model the Hugging Face hub gives us ({reason}); "
            f"give the path of a folder with config.json and {WEIGHTS}"
        ) from error
