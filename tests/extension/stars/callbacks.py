"""A callback."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback


class StepFile(Callback):
    """Writes the number of optimizer steps into a file of the working directory when training ends."""

    def on_fit_end(self, trainer, pl_module):
        Path("steps.txt").write_text(str(trainer.global_step))
