"""The poems that a model writes, in TensorBoard and in the run folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpt2_pl.files import whole_file
from gpt2_pl.tasks.poem import PoemGenerator


class PoemWriter(Callback):
    """Shows a :class:`~gpt2_pl.tasks.PoemGenerator`'s poems as TensorBoard text after every epoch; writes
    ``poems_test.txt`` into the run folder, in the format that poems are read from."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation poems."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the test poems and write them to a file."""
        self._show(trainer, pl_module, "test")
        folder = trainer.log_dir
        if isinstance(pl_module, PoemGenerator) and trainer.is_global_zero and folder is not None:
            with whole_file(Path(folder) / "poems_test.txt") as file:
                file.write("\n".join(f"{poem.number}\n\n{poem.text}" for poem in pl_module.written))

    def _show(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        if not isinstance(pl_module, PoemGenerator) or not isinstance(trainer.logger, TensorBoardLogger):
            return
        if trainer.is_global_zero:
            for poem in pl_module.written:
                text = "  \n".join(poem.lines)  # two spaces keep a line end in Markdown
                trainer.logger.experiment.add_text(f"{split}/poem_{poem.number}", text, trainer.global_step)
