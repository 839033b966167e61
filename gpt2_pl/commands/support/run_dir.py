"""Configuration files and the TensorBoard logger of a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from gpt2_pl.callbacks import RunSummary
from gpt2_pl.callbacks.run_folder import RunFolder, run_folder
from gpt2_pl.commands.support.process import interrupts
from gpt2_pl.commands.support.training_checks import FINDERS
from gpt2_pl.errors import InputError
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.utils.trainer import find_callbacks
from gpt2_pl.utils.yaml_json import load_yaml


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoardLogger that creates the folder of the run on first use.

    Args:
        folder: folder of the run.
        name: name of the run.
        root: folder of all runs.
    """

    def __init__(self, folder: RunFolder, name: str, root: Path) -> None:
        super().__init__(root, name=name, default_hp_metric=False)
        self.folder = folder

    @property
    def version(self) -> str:
        """Name of the run's folder."""
        return self.folder.version

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The SummaryWriter.

        Raises:
            RunError: the folder cannot be created.
        """
        self.folder.take()
        return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics without the number of the epoch, which has no chart of its own."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class SaveRunConfig(SaveConfigCallback):
    """Callback that writes config.yaml and tokenizer.json into the run's folder.

    It writes them after a checkpoint is restored, so that a rejected checkpoint leaves its run unchanged.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing; the base class would write the files before a checkpoint is restored."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files once, if the run has a folder."""
        if self.already_saved:
            return
        self.already_saved = True
        self.config = self.config.clone()
        self.config.version = None  # it belongs to this call, not to the settings of the run
        if trainer.state.fn == "fit":
            self.config.ckpt_path = None
            if any(find_callbacks(trainer, finder) for finder in FINDERS):
                _set_found_values(self.config, trainer, pl_module)
                for summary in find_callbacks(trainer, RunSummary):
                    summary.settings = load_yaml(self.parser.dump(self.config, skip_none=True), "the configuration")
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / self.config_filename) as file:
                file.write(self.parser.dump(self.config, skip_none=False, skip_validation=True))
            self.save_config(trainer, pl_module, str(trainer.state.fn))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files in commands without training."""
        if trainer.state.fn != "fit":
            self.on_train_start(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Enable a second Ctrl-C, because Lightning ignores the signal after the first."""
        interrupts.rearm()

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the tokenizer, so that the model can be used without the data."""
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        folder = run_folder(trainer)
        if folder is not None and tokenizer is not None:
            with atomic_write(folder / "tokenizer.json") as file:
                file.write(tokenizer.to_str())


def _set_found_values(config: Any, trainer: Trainer, module: LightningModule) -> None:
    """Replace finders of Lightning in a configuration by the values that they found, so that it repeats the run.

    Raises:
        InputError: the configuration has no optimizer whose learning rate could be set.
    """
    for finder in find_callbacks(trainer, BatchSizeFinder):
        name = finder._batch_arg_name
        datamodule: Any = getattr(trainer, "datamodule", None)
        config.data.init_args[name] = getattr(datamodule, name)
    if find_callbacks(trainer, LearningRateFinder) and (rate := getattr(module, "lr", None)) is not None:
        optimizer = config.model.init_args.get("optimizer")
        if not hasattr(optimizer, "init_args"):
            raise InputError("LearningRateFinder requires model.optimizer, whose rate it sets", key="model.optimizer")
        optimizer.init_args.lr = rate
    names = {finder.__name__ for finder in FINDERS}
    config.trainer.callbacks = [
        one for one in config.trainer.callbacks if one.class_path.rpartition(".")[2] not in names
    ]
