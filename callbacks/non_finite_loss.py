"""Detection of losses that are NaN or infinite."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.errors import RunError, require
from gpt2_pl.tasks.base import Task
from gpt2_pl.tasks.protocols import RowData


class NonFiniteLossGuard(Callback):
    """Guard that stops training at a NaN or infinite loss before it changes the weights, or skips the batch.

    The error names the step, the rows of the batch and the last checkpoint. With several processes, all of them
    stop or skip the batch if one of them has a non-finite loss.

    With gradient accumulation (``accumulate_grad_batches``) the optimizer step uses the remaining batches; in a
    :class:`~gpt2_pl.tasks.base.Task` its gradient is that of the mean over their rows. If no batch remains, the weights
    do not change.

    Args:
        on_non_finite_loss: ``error`` to stop, or ``skip`` to skip the batch; ``skipped`` counts skipped batches.

    Raises:
        InputError: another value of ``on_non_finite_loss``.
        RunError: in training, a loss that is not finite.
    """

    def __init__(self, on_non_finite_loss: Literal["error", "skip"] = "error") -> None:
        is_valid = on_non_finite_loss in ("error", "skip")
        require(is_valid, "on_non_finite_loss", on_non_finite_loss, "error or skip")
        self.on_non_finite_loss = on_non_finite_loss
        self.skipped = 0
        self._batch: Any = None
        self._unread: deque[_Unread] = (
            deque()
        )  # losses of recorded steps, which are read when the GPU has computed them
        self._fitting = False
        self._n_finite = 0  # batches of this step that are not skipped
        self._saved_grads: dict[Tensor, Tensor] | None = None  # gradients before the backward pass of a skipped batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record whether the stage is training, because checkpoints are also loaded for evaluation."""
        self._fitting = stage == "fit"
        self._n_finite, self._saved_grads = 0, None
        self._unread.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped batches.

        Raises:
            RunError: the loss of a recorded step is not finite.
        """
        self._read(0)
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of skipped batches when training resumes."""
        if self._fitting:
            self.skipped = state_dict["skipped"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch for the error message."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss; before a batch that is skipped, save the accumulated gradients.

        The loss of a recorded step, which changes nothing if its loss is not finite, is read two steps later, when the
        GPU has computed it.
        """
        if isinstance(pl_module, Task) and pl_module.recorded_step is not None:
            self._n_finite += 1
            self._unread.append(_Unread(loss.detach(), _position(trainer), self._batch, trainer))
            self._read(2)
            return
        is_finite = bool(torch.isfinite(loss.detach()))
        if trainer.world_size > 1:
            is_finite = trainer.strategy.reduce_boolean_decision(is_finite, all=True)
        if is_finite:
            self._n_finite += 1
            return
        if self.on_non_finite_loss == "error":
            raise RunError(_format_message(trainer, loss.item(), _position(trainer), self._batch))
        self.skipped += 1
        self._saved_grads = {p: p.grad.clone() for p in _parameters(trainer) if p.grad is not None}
        if isinstance(pl_module, Task):
            pl_module.leave_out_batch()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the gradients after the backward pass of a skipped batch."""
        if self._saved_grads is None:
            return
        for parameter in _parameters(trainer):
            if parameter.grad is None:
                continue
            if parameter not in self._saved_grads:
                parameter.grad.zero_()
                continue
            grad = self._saved_grads[parameter]
            if isinstance(trainer.strategy, DDPStrategy):
                # The saved gradients are local to this process, unless DDP has already averaged them. DDP averages in
                # the backward pass of the last batch of a step, which may be this one. Averaging averaged gradients
                # again does not change them.
                grad = trainer.strategy.reduce(grad, reduce_op="mean")
            parameter.grad.copy_(grad)
        self._saved_grads = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Remove all gradients if every batch of the step was skipped: the optimizer then changes nothing."""
        if not self._n_finite:
            optimizer.zero_grad(set_to_none=True)
        self._n_finite = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the losses of the last recorded steps."""
        self._read(0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the losses of the last recorded steps."""
        self._read(0)

    def _read(self, num_unread: int) -> None:
        """Check the losses of recorded steps except the last ones.

        Args:
            num_unread: number of steps that are not read yet.
        """
        while len(self._unread) > num_unread:
            step = self._unread.popleft()
            if math.isfinite(loss := step.read()):
                continue
            if self.on_non_finite_loss == "error":
                self._unread.clear()
                raise RunError(_format_message(step.trainer, loss, step.position, step.batch))
            self.skipped += 1


class _Unread:
    """Loss that is being copied from the GPU.

    Args:
        loss: a scalar.
        position: epoch and step.
        batch: the batch of the step.
        trainer: the trainer.
    """

    def __init__(self, loss: Tensor, position: str, batch: Any, trainer: Trainer) -> None:
        self.position, self.batch, self.trainer = position, batch, trainer
        self._event = None
        if loss.device.type != "cuda":
            self._loss = loss.clone()
            return
        self._loss = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> float:
        """Return the loss, after waiting for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._loss.item()


def _position(trainer: Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1}, step {trainer.global_step + 1}"


def _format_message(trainer: Trainer, loss: float, position: str, batch: Any) -> str:
    rows = batch["row"].tolist() if isinstance(batch, dict) and "row" in batch else []
    datamodule: Any = getattr(trainer, "datamodule", None)
    if isinstance(datamodule, RowData):
        rows = [datamodule.row_number("train", row) for row in rows]
    shown = ", ".join(map(str, rows[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
    checkpoint = "no checkpoint was saved"
    if (folder := run_folder(trainer)) is not None and (last := folder / "checkpoints/last.ckpt").is_file():
        checkpoint = f"the last checkpoint is {last}"
    return (
        f"the loss is {loss} at {position}, rows {shown}; {checkpoint}; try a lower learning rate, or skip "
        "such batches with --on_non_finite_loss skip"
    )


def _parameters(trainer: Trainer) -> list[Tensor]:
    """Return the parameters of the optimizers.

    The parameters of a sharded model are different objects while they are gathered.
    """
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return [parameter for group in groups for parameter in group["params"]]
