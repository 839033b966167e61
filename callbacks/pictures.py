"""Logging of pictures and text, for every kind of logger."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.utils.plots import png


class PictureWriter(Callback):
    """Writer of a task's pictures of every epoch, such as a confusion matrix, to all loggers that accept pictures.

    If no logger accepts them, they are written into the run's folder, such as ``confusion_val.png``; each epoch
    overwrites the pictures of the epoch before.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pictures of the training epoch."""
        self._log(trainer, pl_module, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pictures of the validation."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pictures of the test."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        pictures: Any = getattr(pl_module, "pictures", None)
        for name, picture in pictures(split).items() if callable(pictures) else ():
            if not log_picture(trainer, f"{split}/{name}", picture) and (folder := run_folder(trainer)) is not None:
                with atomic_write(folder / f"{name}_{split}.png", "wb") as file:
                    file.write(png(picture))


def log_picture(trainer: Trainer, tag: str, picture: NDArray[Any]) -> bool:
    """Log a picture to every logger of a trainer that accepts pictures; call this on the first process only.

    A logger accepts pictures if it has ``log_image(key, images, step)``, like that of Weights & Biases, or if its
    experiment has ``add_image(tag, image, step, dataformats)``, like that of TensorBoard.

    Args:
        trainer: the trainer.
        tag: tag of the picture, such as ``val/confusion``.
        picture: pixels (H, W, 3), from 0 to 255.

    Returns:
        Whether at least one logger accepted the picture.
    """
    is_logged = False
    for logger in trainer.loggers:
        if callable(method := getattr(logger, "log_image", None)):
            method(key=tag, images=[picture], step=trainer.global_step)
        elif callable(method := getattr(getattr(logger, "experiment", None), "add_image", None)):
            method(tag, picture, trainer.global_step, dataformats="HWC")
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
