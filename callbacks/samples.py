"""Logging and writing of texts that a model generates."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.callbacks.pictures import log_text
from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.errors import printable
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.tasks.base import Task


class SampleWriter(Callback):
    """Writer of a task's generated texts, to the loggers and to ``<name>_<split>.txt`` in the run's folder.

    The files of a poem generator are ``poems_val.txt`` and ``poems_test.txt``, in the format of its training files. See
    :meth:`Task.samples() <gpt2_pl.tasks.Task.samples>`.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write the texts of the last validation."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write the texts of the test."""
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        folder = run_folder(trainer)
        samples = pl_module.samples(split) if isinstance(pl_module, Task) and trainer.is_global_zero else {}
        if samples and folder is not None:
            with atomic_write(folder / f"{pl_module.samples_name}_{split}.txt") as file:
                file.write("\n".join(samples.values()))
        for name, text in samples.items():
            lines = map(printable, text.split("\n"))
            log_text(trainer, f"{split}/{name}", "  \n".join(lines))  # Two spaces keep a line break in Markdown.
