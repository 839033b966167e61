"""Losses that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.errors import InputError, RunError
from gpt2_pl.tasks.base import Task


class NonFiniteLossGuard(Callback):
    """Stops training at a loss that is NaN or infinite, before it reaches the weights, or leaves such batches out.

    The error names the step, the rows of the batch and the last good checkpoint. With several processes all of them
    stop, or leave the batch out, when one of them has such a loss.

    Where several batches make an optimizer step (``accumulate_grad_batches``), it is made with those that are left, and
    by a :class:`~gpt2_pl.tasks.base.Task` with the mean over their rows. Where none is left, no step is made.

    Args:
        on_non_finite_loss: ``error``, or ``skip`` such batches; ``skipped`` counts them.

    Raises:
        InputError: another value.
        RunError: in training, at such a loss.
    """

    def __init__(self, on_non_finite_loss: Literal["error", "skip"] = "error") -> None:
        if on_non_finite_loss not in ("error", "skip"):
            raise InputError(f"on_non_finite_loss is {on_non_finite_loss!r}; it must be error or skip")
        self.on_non_finite_loss = on_non_finite_loss
        self.skipped = 0
        self._batch: Any = None
        self._fitting = False
        self._good = 0  # batches of this step that are not left out
        self._kept: dict[Tensor, Tensor] | None = None  # gradients before the backward pass of a batch to leave out

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this is training: checkpoints are also loaded to be tested."""
        self._fitting = stage == "fit"
        self._good, self._kept = 0, None

    def state_dict(self) -> dict[str, Any]:
        """How many batches were left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where a run goes on."""
        if self._fitting:
            self.skipped = state_dict["skipped"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to say of it what it is."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss; keep the gradients of the batches before one to leave out."""
        good = bool(torch.isfinite(loss.detach()))
        if trainer.world_size > 1:
            good = trainer.strategy.reduce_boolean_decision(good, all=True)
        if good:
            self._good += 1
            return
        if self.on_non_finite_loss == "error":
            raise RunError(self._format_message(trainer, loss))
        self.skipped += 1
        self._kept = {p: p.grad.clone() for p in _parameters(trainer) if p.grad is not None}
        if isinstance(pl_module, Task):
            pl_module.leave_out_batch()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the gradients after a batch to leave out."""
        if self._kept is None:
            return
        for parameter in _parameters(trainer):
            if parameter.grad is None:
                continue
            if parameter not in self._kept:
                parameter.grad.zero_()
                continue
            grad = self._kept[parameter]
            if isinstance(trainer.strategy, DDPStrategy):
                # This process's, unless averaged already. The backward pass of the last batch of a step averages them,
                # and may have been this one; an average of averages is the same.
                grad = trainer.strategy.reduce(grad, reduce_op="mean")
            parameter.grad.copy_(grad)
        self._kept = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Make no step where every batch is left out: without gradients the optimizer changes nothing."""
        if not self._good:
            optimizer.zero_grad(set_to_none=True)
        self._good = 0

    def _format_message(self, trainer: Trainer, loss: Tensor) -> str:
        rows = self._batch["row"].tolist() if isinstance(self._batch, dict) and "row" in self._batch else []
        datamodule: Any = getattr(trainer, "datamodule", None)
        if hasattr(datamodule, "number"):
            rows = [datamodule.row_number("train", row) for row in rows]
        shown = ", ".join(map(str, rows[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        folder = run_folder(trainer)
        last = None if folder is None else Path(folder, "checkpoints", "last.ckpt")
        good = (
            f"the last good checkpoint is {last}" if last is not None and last.is_file() else "there is no checkpoint"
        )
        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step + 1}"
        return (
            f"the loss is {loss.item()} at {where}, rows {shown}; {good}; try a lower learning rate, or leave such "
            "batches out with --on_non_finite_loss skip"
        )


def _parameters(trainer: Trainer) -> list[Tensor]:
    """The parameters of the optimizers. A sharded model's own are others while they are gathered."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return [parameter for group in groups for parameter in group["params"]]
