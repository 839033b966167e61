"""Writing of a task's outputs: tables of rows, generated texts and images."""

from __future__ import annotations

import csv
import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.errors import printable
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.tasks.base import Task
from gpt2_pl.tasks.protocols import PredictionForm
from gpt2_pl.utils.columns import choose_columns
from gpt2_pl.utils.plots import png

VALIDATIONS = "validations/step_{step}"
"""Folder of the table of a validation, within the folder of a run."""


def goodness(pl_module: LightningModule, score: float) -> float:
    """Return a value of the task's ``monitor``, greater is better; NaN is the least, as in ModelCheckpoint."""
    return -math.inf if math.isnan(score) else score if pl_module.mode == "max" else -score


class PredictionWriter(Callback):
    """Writer of a task's table of rows, ``<name>_<split>.csv`` in the run's folder, after every evaluation.

    In training it keeps the validation table of the best epoch by the task's ``monitor``. The table of a classifier is
    ``predictions``: for every row its number in its file (from 1), its text, its label, the predicted class and the
    probability of each class. The table of a language model is ``losses``: for every poem or context its number, the
    number of scored tokens, and the sum of their losses in nats. See
    :meth:`Task.row_table() <gpt2_pl.tasks.Task.row_table>`.

    Args:
        save_predictions: ``best`` to keep the validation table of the best epoch, or ``every_epoch`` to keep in
            addition that of every validation, in ``validations/step_N`` after N optimizer steps.
    """

    def __init__(self, save_predictions: Literal["best", "every_epoch"] = "best") -> None:
        self.save_predictions = save_predictions
        self.best: float | None = None
        self.wrote = False  #: whether this process has written a file
        self.keeps_best = False  #: whether an evaluation outside training also keeps the table of the best epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score so far."""
        self.best = state_dict.get("best")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation rows; in training, only if the score is the best so far."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit" or self.keeps_best:
            if self.save_predictions == "every_epoch":
                self._write(trainer, pl_module, "val", VALIDATIONS.format(step=trainer.global_step))
            score = float(trainer.callback_metrics[str(pl_module.monitor)])
            if self.best is not None and goodness(pl_module, score) <= goodness(pl_module, self.best):
                return
            self.best = score
        self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the test rows."""
        self._write(trainer, pl_module, "test")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the predicted rows."""
        self._write(trainer, pl_module, "predict")

    def _write(self, trainer: Trainer, pl_module: LightningModule, split: str, subfolder: str = "") -> None:
        table = pl_module.row_table(split) if isinstance(pl_module, Task) else None
        folder = run_folder(trainer)
        if table is None or folder is None or not trainer.is_global_zero:
            return
        data: Any = getattr(trainer, "datamodule", None)
        chosen = data.predict_columns if split == "predict" and isinstance(data, PredictionForm) else None
        pick, names = choose_columns(table.columns, chosen, "data.predict_columns")
        file_name = folder / subfolder / f"{table.name}_{split}.csv"
        file_name.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file_name) as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(map(pick, table.rows))
        self.wrote = True


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


class ImageWriter(Callback):
    """Writer of a task's images of every epoch, such as a confusion matrix, to all loggers that accept images.

    If no logger accepts them, they are written into the run's folder, such as ``confusion_val.png``; each epoch
    overwrites the images of the epoch before.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the images of the training epoch."""
        self._log(trainer, pl_module, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the images of the validation."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the images of the test."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        images = pl_module.images(split) if isinstance(pl_module, Task) else {}
        for name, image in images.items():
            if not log_image(trainer, f"{split}/{name}", image) and (folder := run_folder(trainer)) is not None:
                with atomic_write(folder / f"{name}_{split}.png", "wb") as file:
                    file.write(png(image))


def log_image(trainer: Trainer, tag: str, image: NDArray[Any]) -> bool:
    """Log an image to every logger of a trainer that accepts images; call this on the first process only.

    A logger accepts images if it has ``log_image(key, images, step)``, like that of Weights & Biases, or if its
    experiment has ``add_image(tag, image, step, dataformats)``, like that of TensorBoard.

    Args:
        trainer: the trainer.
        tag: tag of the image, such as ``val/confusion``.
        image: pixels (H, W, 3), from 0 to 255.

    Returns:
        Whether at least one logger accepted the image.
    """
    is_logged = False
    for logger in trainer.loggers:
        if callable(method := getattr(logger, "log_image", None)):
            method(key=tag, images=[image], step=trainer.global_step)
        elif callable(method := getattr(getattr(logger, "experiment", None), "add_image", None)):
            method(tag, image, trainer.global_step, dataformats="HWC")
        else:
            continue
        is_logged = True
    return is_logged


def log_text(trainer: Trainer, tag: str, text: str) -> None:
    """Log a text to every logger of a trainer that accepts text; call this on the first process only.

    A logger accepts text if it has ``log_text(key, columns, data, step)``, like that of Weights & Biases, or if its
    experiment has ``add_text(tag, text, step)``, like that of TensorBoard.

    Args:
        trainer: the trainer.
        tag: tag of the text, such as ``val/poem_7``.
        text: the text, in Markdown.
    """
    for logger in trainer.loggers:
        if callable(method := getattr(logger, "log_text", None)):
            method(key=tag, columns=["text"], data=[[text]], step=trainer.global_step)
        elif callable(method := getattr(getattr(logger, "experiment", None), "add_text", None)):
            method(tag, text, trainer.global_step)
