"""The folder of a run: which one it is, its lock, and the files that say how the run was made."""

from __future__ import annotations

import errno
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from commands.process import interrupts
from gpt2_pl.errors import InputError, RunError
from gpt2_pl.files import whole_file

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


class RunLogger(TensorBoardLogger):
    """A TensorBoardLogger whose version, where none is given, is the next free one until it is taken: two runs that
    begin at once get one each, and one that is refused makes no folder."""

    lock: RunLock | None = None  # of the version's folder

    @property
    def version(self) -> int | str:
        """The version given or taken, or else the next free one."""
        return self._get_next_version() if self._version is None else self._version

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """As TensorBoardLogger's; whoever asks first takes the version, by making its folder, and locks it.

        Raises:
            RunError: it cannot be made.
        """
        if self._version is None:
            self._version = self._take_version()
        return super().experiment

    def _take_version(self) -> int:
        number = -1
        try:
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            while True:
                number = max(number + 1, self._get_next_version())
                folder = Path(self.root_dir, f"version_{number}")
                with suppress(FileExistsError, InputError):  # another run took it since
                    folder.mkdir()
                    self.lock = RunLock(folder)
                    return number
        except OSError as error:
            raise RunError(f"{self.root_dir} cannot be written to: {error.strerror}") from None


class RunFiles(SaveConfigCallback):
    """Writes config.yaml and tokenizer.json into the run's folder.

    That waits until a checkpoint is restored: one that is refused leaves its run as it was.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them where there is a run's folder."""
        self.config = self.config.clone()
        self.config.version = None  # of this one call, and not a setting of the run's
        if trainer.state.fn == "fit":
            self.config.ckpt_path = None
        if trainer.logger is not None:
            super().setup(trainer, pl_module, str(trainer.state.fn))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where nothing trains."""
        if trainer.state.fn != "fit":
            self.on_train_start(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let a second Ctrl-C end the process: Lightning has turned the signal off at the first."""
        interrupts.rearm()

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the tokenizer, so that the run's model can be used without its data."""
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        folder = getattr(trainer.logger, "log_dir", None)  # trainer.log_dir asks all processes; this is one
        if folder is not None and tokenizer is not None:
            with whole_file(Path(folder) / "tokenizer.json") as file:
                file.write(tokenizer.to_str())
