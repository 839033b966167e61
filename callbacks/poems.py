"""The poems that a model writes, as text for loggers and in the run folder."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.callbacks.pictures import log_text
from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.errors import printable
from gpt2_pl.filesystem import whole_file
from gpt2_pl.tasks.poetry import PoemGenerator


class PoemWriter(Callback):
    """Gives a :class:`~gpt2_pl.tasks.PoemGenerator`'s poems to loggers as text after every evaluation, and writes
    ``poems_val.txt`` or ``poems_test.txt`` into the run folder, in the format that poems are read from."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show and write the validation poems of the last epoch."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show and write the test poems."""
        self._show(trainer, pl_module, "test")

    def _show(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        folder = run_folder(trainer)
        if not isinstance(pl_module, PoemGenerator) or not trainer.is_global_zero or not pl_module.written:
            return
        if folder is not None:
            with whole_file(folder / f"poems_{split}.txt") as file:
                file.write("\n".join(f"{poem.number}\n\n{poem.text}" for poem in pl_module.written))
        for poem in pl_module.written:
            text = "  \n".join(map(printable, poem.lines))  # two spaces keep a line end in Markdown
            log_text(trainer, f"{split}/poem_{poem.number}", text)
