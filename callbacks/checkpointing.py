"""Checkpointing and early stopping that resume exactly."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.tasks.base import Task
from gpt2_pl.tasks.checkpoint import read

_ROW_TABLES = ("predictions_val.csv", "losses_val.csv")  # outputs of the best model for every validation row


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that replaces files atomically.

    A checkpoint is written to a temporary file in the same folder, which is then renamed, without a second copy in
    memory. Lightning uses a temporary folder that may be on another disk: a process that is killed while the file is
    moved leaves an incomplete checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; an existing file is kept until the new one is complete."""
        with atomic_write(Path(path), "wb") as file:
            torch.save(checkpoint, file)


class ResumableModelCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose checkpoints resume a run exactly.

    A resumed run keeps its best checkpoint and score, even in another working directory or folder; Lightning forgets
    the best score if the path of the folder changes. Steps that are followed by a validation are not saved, because
    Lightning would skip that validation in the resumed run.

    Args:
        every_n_steps: save every so many optimizer steps, in addition to the checkpoints of ModelCheckpoint.
        on_sigterm: save a checkpoint when the process receives SIGTERM during training.
        **kwargs: arguments of ModelCheckpoint.
    """

    def __init__(self, every_n_steps: int | None = None, on_sigterm: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.every_n_steps, self.on_sigterm = every_n_steps, on_sigterm

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the folder of the checkpoints to that of the run, independently of the loggers."""
        if self.dirpath is None and (folder := run_folder(trainer)) is not None:
            self.dirpath = str(folder / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint every ``every_n_steps`` optimizer steps or on SIGTERM."""
        every = trainer.val_check_batch  # None if validation is scheduled by time, infinite without validation
        if trainer.is_last_batch or (every and (batch_idx + 1) % every == 0):
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        is_due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        is_terminating = self.on_sigterm and trainer.received_sigterm
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if (is_due or is_terminating) and ends_step and self._last_global_step_saved < trainer.global_step:
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the epoch, even if its last step is already saved: the epoch's state holds more."""
        if self.every_n_steps is not None:
            self._last_global_step_saved = -1
        super().on_train_epoch_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the folder of the loaded checkpoint and the class of the module."""
        self._source_dir = Path(str(trainer.ckpt_path)).parent
        self._module_class = type(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best checkpoint of the interrupted run, and copy its file if this run has another folder.

        The file is copied from the folder of the loaded checkpoint, not from the path that is stored in it.

        Raises:
            InputError: the best checkpoint in that folder was not written by the same task.
        """
        best = Path(str(self.dirpath), f"{self.filename}.ckpt")
        state = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = _relocate(state[key], best)
        scores = state["best_k_models"].items()
        state["best_k_models"] = {str(best): score for path, score in scores if _relocate(path, best)}
        if not best.exists() and state["best_model_path"]:
            self._copy_best(best)
        if not best.exists() or not state["best_model_path"]:
            state.update(best_model_path="", best_k_models={}, best_model_score=None, kth_value=None)
            state["kth_best_model_path"] = ""
        super().load_state_dict(state)
        if self.kth_value is None:
            self.kth_value = torch.tensor(math.inf if self.mode == "min" else -math.inf)

    def _copy_best(self, best: Path) -> None:
        """Copy the best checkpoint and its tables of rows, if they exist, from the folder of the loaded checkpoint."""
        source = self._source_dir / best.name
        if not source.is_file():
            return
        if issubclass(self._module_class, Task):
            read(source, "ckpt_path", self._module_class)
        best.parent.mkdir(parents=True, exist_ok=True)
        folder = self._source_dir.parent.resolve()
        tables = (
            table for name in _ROW_TABLES for table in (folder / name, *folder.glob(f"validations/step_*/{name}"))
        )
        for table in tables:
            if table.is_file() and table.resolve() == table:  # no symbolic link to a file elsewhere
                target = best.parent.parent / table.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(table, target)
        shutil.copyfile(source, best)


def _relocate(path: str, best: Path) -> str:
    """Return ``best`` if ``path`` has the same file name, otherwise an empty string."""
    return str(best) if Path(path).name == best.name else ""


class ResumableEarlyStopping(EarlyStopping):
    """EarlyStopping that ignores a missing score, and whose patience may change when a run is resumed.

    A score is missing until the first validation has run.
    """

    def __init__(self, monitor: str, **kwargs: Any) -> None:
        super().__init__(monitor, strict=False, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything except the patience, which is a setting."""
        super().load_state_dict({**state_dict, "patience": self.patience})
