"""The folder of a run: which one it is, and the files that say how the run was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from gpt2_pl.errors import RunError
from gpt2_pl.files import whole_file


class RunLogger(TensorBoardLogger):
    """A TensorBoardLogger whose version, where none is given, is the next free one until it is taken: two runs that
    begin at once get one each, and one that is refused makes no folder."""

    @property
    def version(self) -> int | str:
        """The version given or taken, or else the next free one."""
        return self._get_next_version() if self._version is None else self._version

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """As TensorBoardLogger's; whoever asks first takes the version, by making its folder.

        Raises:
            RunError: it cannot be made.
        """
        number = -1
        while self._version is None:
            number = max(number + 1, self._get_next_version())
            try:
                Path(self.root_dir, f"version_{number}").mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise RunError(f"{self.root_dir} cannot be written to: {error.strerror}") from None
            self._version = number
        return super().experiment


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

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the tokenizer, so that the run's model can be used without its data."""
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        folder = getattr(trainer.logger, "log_dir", None)  # trainer.log_dir asks all processes; this is one
        if folder is not None and tokenizer is not None:
            with whole_file(Path(folder) / "tokenizer.json") as file:
                file.write(tokenizer.to_str())
