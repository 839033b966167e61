"""The folder of a run, ``lightning_logs/NAME/VERSION``, whatever its loggers, and its lock."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.errors import InputError, RunError

LOCK = ".lock"  # in the folder of a run


class RunLock:
    """Exclusive use of a run's folder: no other process writes into it until :meth:`release`, or until this one ends.

    The lock is the operating system's, which gives it up when the process ends, however it ends. The file that remains
    after a process was killed says nothing and hinders nobody.

    Args:
        folder: the run's; it is made where it is missing.

    Raises:
        InputError: another process writes into the folder.
        OSError: the folder cannot be made or its files cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        self._made = [above for above in (folder, *folder.parents) if not above.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.file, thread_local=False, fallback_to_soft=False, on_acquired=_name_holder)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"{folder} is in use: {_holder(self.file)} writes into it; wait until it ends") from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            reason = f"the file system of {folder} has no locks; do not start another process on this run"
            print(f"gpt2-pl: {reason}", file=sys.stderr)

    def release(self) -> None:
        """Give the lock up, and remove its file and those folders that are empty and were made for it."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows removes no open file
                self.file.unlink()  # before the release: another process may have it from then on
            self._lock.release()
            with suppress(OSError):
                for folder in self._made:
                    folder.rmdir()


_WITHOUT_LOCKS = {
    getattr(errno, name) for name in ("ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP") if hasattr(errno, name)
}


def _name_holder(descriptor: int) -> None:
    """Write into the file of a lock which process holds it."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())


def _holder(file: Path) -> str:
    """The process that holds a lock, as far as its file can be read and is not of one that has ended."""
    with suppress(OSError, ValueError):
        number, host = file.read_text(encoding="utf-8").split()
        if host != socket.gethostname():
            return f"process {int(number)} on {host}"
        if psutil.pid_exists(int(number)):
            return f"process {int(number)}"
    return "another process"


class RunFolder(Callback):
    """The folder that a run writes into.

    Without a version the folder is the next free ``version_N`` until it is taken. Two runs that begin at once get one
    each, and a run that is refused makes no folder.

    Args:
        root: the folder of all runs.
        name: the run's name, a path below ``root``.
        version: the folder's name below that.
        lock: the lock of a folder that is known beforehand.
    """

    def __init__(self, root: Path, name: str, version: str | None = None, lock: RunLock | None = None) -> None:
        self.parent = root / name
        self.lock = lock
        self._version = version

    @property
    def version(self) -> str:
        """The folder's name: the version given or taken, or else the next free one."""
        return self._version or f"version_{self._next_number()}"

    @property
    def path(self) -> Path:
        """The folder."""
        return self.parent / self.version

    def _next_number(self) -> int:
        with suppress(OSError):
            names = [path.name for path in self.parent.iterdir()]
            numbers = [int(name.removeprefix("version_")) for name in names if re.fullmatch(r"version_\d+", name)]
            return max(numbers, default=-1) + 1
        return 0

    def take(self) -> None:
        """Make the folder and lock it; only the first call does anything.

        Raises:
            RunError: it cannot be made.
        """
        number = -1
        try:
            while self._version is None:
                number = max(number + 1, self._next_number())
                self.parent.mkdir(parents=True, exist_ok=True)
                folder = self.parent / f"version_{number}"
                with suppress(FileExistsError, InputError):  # another run took it since
                    folder.mkdir()
                    self.lock = RunLock(folder)
                    self._version = folder.name
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.parent} cannot be written to: {error.strerror}") from None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the folder on one process and tell the others."""
        if trainer.is_global_zero:
            self.take()
        self._version = trainer.strategy.broadcast(self._version)


def run_folder(trainer: Trainer) -> Path | None:
    """Return the folder that a run writes into: that of :class:`RunFolder`, or else a logger's, or None."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, RunFolder):
            return callback.path
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return next((Path(folder) for folder in folders if folder is not None), None)
