"""Pictures and text, for whatever loggers a run has."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.utils.plots import png


class PictureWriter(Callback):
    """Gives a task's pictures of every epoch, such as a confusion matrix, to all loggers that take pictures.

    Where no logger takes them they are written into the run's folder, as ``confusion_val.png``; the last epoch's stay.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the pictures of the training epoch."""
        self._show(trainer, pl_module, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the pictures of the validation."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the pictures of the test."""
        self._show(trainer, pl_module, "test")

    def _show(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        pictures: Any = getattr(pl_module, "pictures", None)
        for name, picture in pictures(split).items() if callable(pictures) else ():
            if not log_picture(trainer, f"{split}/{name}", picture) and (folder := run_folder(trainer)) is not None:
                with atomic_write(folder / f"{name}_{split}.png", "wb") as file:
                    file.write(png(picture))


def log_picture(trainer: Trainer, tag: str, picture: NDArray[Any]) -> bool:
    """Give a picture to every logger of a trainer that takes pictures; call it on the first process only.

    A logger takes pictures if it has ``log_image(key, images, step)``, as Weights & Biases', or if its experiment has
    ``add_image(tag, image, step, dataformats)``, as TensorBoard's.

    Args:
        trainer: whose loggers they are.
        tag: of the picture, such as ``val/confusion``.
        picture: (H, W, 3), from 0 to 255.

    Returns:
        Whether any logger has taken it.
    """
    taken = False
    for logger in trainer.loggers:
        if callable(take := getattr(logger, "log_image", None)):
            take(key=tag, images=[picture], step=trainer.global_step)
        elif callable(take := getattr(getattr(logger, "experiment", None), "add_image", None)):
            take(tag, picture, trainer.global_step, dataformats="HWC")
        else:
            continue
        taken = True
    return taken


def log_text(trainer: Trainer, tag: str, text: str) -> None:
    """Give a text in Markdown to every logger of a trainer that takes text; call it on the first process only.

    A logger takes text if it has ``log_text(key, columns, data, step)``, as Weights & Biases', or if its experiment has
    ``add_text(tag, text, step)``, as TensorBoard's.
    """
    for logger in trainer.loggers:
        if callable(take := getattr(logger, "log_text", None)):
            take(key=tag, columns=["text"], data=[[text]], step=trainer.global_step)
        elif callable(take := getattr(getattr(logger, "experiment", None), "add_text", None)):
            take(tag, text, trainer.global_step)
