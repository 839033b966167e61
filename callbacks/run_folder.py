"""The folder of a run, ``lightning_logs/NAME/VERSION``, whatever its loggers."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.errors import InputError, RunError
from gpt2_pl.experiments.run_lock import RunLock


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
