"""Folder of a run, ``lightning_logs/NAME/VERSION``, independent of its loggers."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.errors import InputError, RunError
from gpt2_pl.experiments.run_lock import RunLock
from gpt2_pl.utils.trainer import find_callbacks


class RunFolder(Callback):
    """Output folder of a run.

    Without a version, the folder is the next free ``version_N`` when it is created. Runs that start at the same time
    get different folders, and a run that is rejected creates none.

    Args:
        root: folder of all runs.
        name: name of the run, a path below ``root``.
        version: name of the folder below ``root/name``; by default the next free ``version_N``.
        lock: lock of the folder, if the folder is already locked.
    """

    def __init__(self, root: Path, name: str, version: str | None = None, lock: RunLock | None = None) -> None:
        self.parent = root / name
        self.lock = lock
        self._version = version

    @property
    def version(self) -> str:
        """Name of the folder: the given or created version, or the next free one."""
        return self._version or f"version_{self._next_number()}"

    @property
    def path(self) -> Path:
        """Path of the folder."""
        return self.parent / self.version

    def _next_number(self) -> int:
        with suppress(OSError):
            names = [path.name for path in self.parent.iterdir()]
            numbers = [int(name.removeprefix("version_")) for name in names if re.fullmatch(r"version_\d+", name)]
            return max(numbers, default=-1) + 1
        return 0

    def take(self) -> None:
        """Create the folder and lock it; later calls have no effect.

        Raises:
            RunError: the folder cannot be created.
        """
        number = -1
        try:
            while self._version is None:
                number = max(number + 1, self._next_number())
                self.parent.mkdir(parents=True, exist_ok=True)
                folder = self.parent / f"version_{number}"
                with suppress(FileExistsError, InputError):  # Another run has created it in the meantime.
                    folder.mkdir()
                    self.lock = RunLock(folder)
                    self._version = folder.name
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.parent} cannot be written to: {error.strerror}") from None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the folder on the first process, and broadcast its name to the others."""
        if trainer.is_global_zero:
            self.take()
        self._version = trainer.strategy.broadcast(self._version)


def run_folder(trainer: Trainer) -> Path | None:
    """Return the output folder of a run: that of :class:`RunFolder`, else that of a logger, else None."""
    for callback in find_callbacks(trainer, RunFolder):
        return callback.path
    folders = (logger.log_dir for logger in trainer.loggers)
    return next((Path(folder) for folder in folders if folder is not None), None)
