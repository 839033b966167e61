"""Lock of a run's folder."""

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

LOCK = ".lock"  # name of the file in the folder of a run


class RunLock:
    """Exclusive lock of a run's folder, held until :meth:`release` or the end of the process.

    The operating system releases the lock when the process ends for any reason. The file that remains after a process
    was killed does not block other processes.

    Args:
        folder: folder of the run; it is created if it does not exist.

    Raises:
        InputError: another process holds the lock.
        OSError: the folder cannot be created, or the file of the lock cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        self._created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.file, thread_local=False, fallback_to_soft=False, on_acquired=_write_holder)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            holder = _read_holder(self.file)
            raise InputError(f"{folder} is in use: {holder} writes into it; wait until it ends") from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            reason = f"the file system of {folder} has no locks; do not start another process on this run"
            print(f"gpt2-pl: {reason}", file=sys.stderr)

    def release(self) -> None:
        """Release the lock, and remove its file and the folders that were created for it and are empty."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows does not remove open files
                self.file.unlink()  # before the release, after which another process may use the file
            self._lock.release()
            with suppress(OSError):
                for folder in self._created:
                    folder.rmdir()


_WITHOUT_LOCKS = {
    getattr(errno, name) for name in ("ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP") if hasattr(errno, name)
}


def _write_holder(descriptor: int) -> None:
    """Write the id and the host of this process into the file of a lock."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())


def _read_holder(file: Path) -> str:
    """Return the process that holds a lock, or ``another process`` if its file is invalid or outdated."""
    with suppress(OSError, ValueError):
        number, host = file.read_text(encoding="utf-8").split()
        if host != socket.gethostname():
            return f"process {int(number)} on {host}"
        if psutil.pid_exists(int(number)):
            return f"process {int(number)}"
    return "another process"
