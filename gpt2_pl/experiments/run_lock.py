"""The lock of a run's folder."""

from __future__ import annotations

import errno
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from gpt2_pl.errors import InputError

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
