"""What makes a run that was stopped end like one that was not: whole checkpoints, the best of them, and patience."""

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

_ROWS = ("predictions_val.csv", "losses_val.csv")  # what the best model said of every row


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their place and renames them, without a second copy in memory.

    Lightning's own go through a temporary folder, which may lie on another disk: a process that ends while they are
    moved leaves half of one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; the file that was there stays until the new one is whole."""
        with atomic_write(Path(path), "wb") as file:
            torch.save(checkpoint, file)


class ResumableModelCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint from which a run ends as if it had not been stopped.

    It remembers its best when the run goes on, also from another working directory or folder: Lightning forgets the
    best score as soon as the folder is called otherwise. Among steps it saves only such as no validation follows:
    Lightning would leave that validation out when the run goes on.

    Args:
        every_n_steps: save after this many optimizer steps too, besides what ModelCheckpoint does.
        on_sigterm: save before the process ends at a SIGTERM that reaches it in training.
        kwargs: ModelCheckpoint's.
    """

    def __init__(self, every_n_steps: int | None = None, on_sigterm: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.every_n_steps, self.on_sigterm = every_n_steps, on_sigterm

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the run's folder, whatever its loggers."""
        if self.dirpath is None and (folder := run_folder(trainer)) is not None:
            self.dirpath = str(folder / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save as often as is wanted, or because the process is asked to end."""
        every = trainer.val_check_batch  # None where validation goes by the clock, infinite where there is none
        if trainer.is_last_batch or (every and (batch_idx + 1) % every == 0):
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        wanted = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        asked = self.on_sigterm and trainer.received_sigterm
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if (wanted or asked) and whole_step and self._last_global_step_saved < trainer.global_step:
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the epoch, also one that ends at a step that is saved already: it is more than the step."""
        if self.every_n_steps is not None:
            self._last_global_step_saved = -1
        super().on_train_epoch_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the folder that the checkpoint lies in, and whose it is."""
        self._source = Path(str(trainer.ckpt_path)).parent
        self._task = type(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best checkpoint of the run that was stopped, and copy its file where the folder is another.

        It is copied from the folder that this checkpoint was read from, whatever folder this checkpoint says.

        Raises:
            InputError: the best checkpoint there is none of the same task.
        """
        own = Path(str(self.dirpath), f"{self.filename}.ckpt")
        state = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = _moved(state[key], own)
        scores = {_moved(path, own): score for path, score in state["best_k_models"].items()}
        state["best_k_models"] = {path: score for path, score in scores.items() if path}
        if not own.exists() and state["best_model_path"]:
            found = self._source / own.name
            if found.is_file():
                if issubclass(self._task, Task):
                    read(found, "ckpt_path", self._task)
                own.parent.mkdir(parents=True, exist_ok=True)
                for name in _ROWS:
                    if (rows := self._source.parent / name).is_file() and not rows.is_symlink():
                        shutil.copyfile(rows, own.parent.parent / name)
                shutil.copyfile(found, own)
        if not own.exists() or not state["best_model_path"]:
            state.update(best_model_path="", best_k_models={}, best_model_score=None, kth_value=None)
            state["kth_best_model_path"] = ""
        super().load_state_dict(state)
        if self.kth_value is None:
            self.kth_value = torch.tensor(math.inf if self.mode == "min" else -math.inf)


def _moved(path: str, own: Path) -> str:
    """``own`` for a path of its name; nothing for any other."""
    return str(own) if Path(path).name == own.name else ""


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping that waits for the first validation, and whose patience may change when a run is resumed."""

    def __init__(self, monitor: str, **kwargs: Any) -> None:
        super().__init__(monitor, strict=False, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything but the patience, which is a setting."""
        super().load_state_dict({**state_dict, "patience": self.patience})
