"""Losses that are no numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from gpt2_pl.errors import InputError, RunError


class FiniteLoss(Callback):
    """Stops training at a loss that is NaN or infinite, before it reaches the weights, or leaves such steps out.

    The error names the step, the rows of the batch and the last good checkpoint. With several processes all of them
    stop, or leave the step out, when one of them has such a loss.

    Args:
        bad_batches: ``error``, or ``skip`` the optimizer step of such a batch; the run's account says how many.

    Raises:
        InputError: another value.
        RunError: in training, at such a loss.
    """

    def __init__(self, bad_batches: Literal["error", "skip"] = "error") -> None:
        if bad_batches not in ("error", "skip"):
            raise InputError(f"bad_batches is {bad_batches!r}; it must be error or skip")
        self.bad_batches = bad_batches
        self.skipped = 0
        self._batch: Any = None
        self._bad = self._fitting = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this is training: checkpoints are also loaded to be tested."""
        self._fitting = stage == "fit"

    def state_dict(self) -> dict[str, Any]:
        """How many steps were left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where a run goes on."""
        if self._fitting:
            self.skipped = state_dict["skipped"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to say of it what it is."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss."""
        good = bool(torch.isfinite(loss.detach()))
        if trainer.world_size > 1:
            good = trainer.strategy.reduce_boolean_decision(good, all=True)
        if good:
            return
        if self.bad_batches == "error":
            raise RunError(self._told(trainer, loss))
        self._bad = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Leave the step out: without gradients the optimizer changes nothing."""
        if self._bad:
            optimizer.zero_grad(set_to_none=True)
            self.skipped += 1
            self._bad = False

    def _told(self, trainer: Trainer, loss: Tensor) -> str:
        rows = self._batch["row"].tolist() if isinstance(self._batch, dict) and "row" in self._batch else []
        datamodule: Any = getattr(trainer, "datamodule", None)
        if hasattr(datamodule, "number"):
            rows = [datamodule.number("train", row) for row in rows]
        shown = ", ".join(map(str, rows[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        folder = getattr(trainer.logger, "log_dir", None)
        last = None if folder is None else Path(folder, "checkpoints", "last.ckpt")
        good = (
            f"the last good checkpoint is {last}" if last is not None and last.is_file() else "there is no checkpoint"
        )
        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step + 1}"
        return (
            f"the loss is {loss.item()} at {where}, rows {shown}; {good}; try a lower learning rate, or leave such "
            "batches out with --bad_batches skip"
        )
