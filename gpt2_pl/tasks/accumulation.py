"""Mean loss of an optimizer step over several batches and processes."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from gpt2_pl.utils.trainer import find_callbacks


class StepMean:
    """Weights of the losses of an optimizer step, such that its gradient is that of one batch with all its rows.

    Lightning divides the loss of every batch by A (``accumulate_grad_batches``), adds the gradients of the batches of a
    step, and averages them over W processes. The gradient of the mean over all N rows (or targets) of the step is
    therefore that of the losses ``sum * W * A / N``, where ``sum`` is taken over the rows of one batch on one process.

    The datamodules of this library state N in every batch. For other data, the number of rows in the first batch of the
    step is used instead of N. If the batches of the step have another number of rows in total than N, the gradient must
    be multiplied by :meth:`correction`. This occurs for data that do not state N, after a batch was left out, and if a
    resumed run starts within a step.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove all batches, at the start of a new step."""
        self._divisor: int | Tensor | None = None  # N, or the number of rows in the first batch
        self._is_first_count = False  # whether the divisor is the number of rows in the first batch
        self._counts: list[int | Tensor] = []
        self._are_local = False  # whether the counts are those of this process only

    def weight(
        self, trainer: Trainer, count: int | Tensor, count_everywhere: int | None, announced: int | None
    ) -> float | Tensor:
        """Add a batch to the step.

        Args:
            trainer: the trainer.
            count: number of rows of the batch on this process.
            count_everywhere: number of rows of the batch on all processes, if known.
            announced: number of rows of the step, N, if known.

        Returns:
            W A / N, the factor of the sum of the losses of this batch.
        """
        self._are_local = count_everywhere is None
        self._counts.append(count if count_everywhere is None else count_everywhere)
        if self._divisor is None:
            self._is_first_count = announced is None
            self._divisor = self._sum(trainer) if announced is None else announced
        return trainer.world_size * trainer.accumulate_grad_batches / self._divisor

    def leave_out(self) -> None:
        """Remove the batch that was added last, if any, because its gradient is not used."""
        if self._counts:
            self._counts.pop()
        self._is_first_count = False

    def correction(self, trainer: Trainer) -> float:
        """Return the factor of the gradient of the step, which is the same on all processes."""
        if self._divisor is None or not self._counts or (self._is_first_count and len(self._counts) == 1):
            return 1.0
        return float(self._divisor) / float(self._sum(trainer))

    def _sum(self, trainer: Trainer) -> int | Tensor:
        """Return the number of rows of all batches on all processes, at least 1."""
        count = sum(self._counts)
        if self._are_local and trainer.world_size > 1:
            count = torch.as_tensor(count, device=trainer.strategy.root_device).clone()
            count = trainer.strategy.reduce(count, reduce_op="sum")
        return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def accumulation_scheduler(trainer: Trainer) -> GradientAccumulationScheduler | None:
    """Return the callback that schedules the number of batches of an optimizer step, if the trainer has one."""
    return next(iter(find_callbacks(trainer, GradientAccumulationScheduler)), None)


def scheduled_steps(trainer: Trainer, scheduler: GradientAccumulationScheduler) -> int | None:
    """Return the number of optimizer steps of a run with a scheduler, or None if the run is unbounded."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs < 0 or math.isinf(batches):
        return None
    steps = sum(math.ceil(batches / scheduler.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
