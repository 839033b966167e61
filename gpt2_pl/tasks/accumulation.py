"""The mean loss of an optimizer step whose rows are spread over several batches and processes."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor


class StepMean:
    """Makes the gradient of an optimizer step that of one batch of all its rows.

    Lightning divides the loss of every batch by A (``accumulate_grad_batches``), adds the gradients of the batches of a
    step, and averages them over W processes. The gradient of the mean over all N rows (or targets) of the step is thus
    that of the losses ``sum * W * A / N``, where ``sum`` is taken over the rows of one batch on one process.

    Our data announce N with every batch. With other data the rows in the first batch of the step stand in for N. Where
    the batches of the step turn out to have another number of rows than N, the gradient must be multiplied by
    :meth:`correction`: with data that announce nothing, where a batch was left out, and where a resumed run begins
    within a step.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the batches entered: a new step begins."""
        self._divisor: int | Tensor | None = None  # N, or what stands in for it
        self._is_first_count = False  # what stands in for it
        self._counts: list[int | Tensor] = []
        self._are_local = False  # whether the counts are of this process only

    def weight(
        self, trainer: Trainer, count: int | Tensor, count_everywhere: int | None, announced: int | None
    ) -> float | Tensor:
        """Enter a batch.

        Args:
            trainer: the trainer.
            count: rows of the batch on this process.
            count_everywhere: rows of the batch on all processes, if known.
            announced: N, if known.

        Returns:
            W A / N: what the sum of the losses of this batch is to be multiplied by.
        """
        self._are_local = count_everywhere is None
        self._counts.append(count if count_everywhere is None else count_everywhere)
        if self._divisor is None:
            self._is_first_count = announced is None
            self._divisor = self._sum(trainer) if announced is None else announced
        return trainer.world_size * trainer.accumulate_grad_batches / self._divisor

    def leave_out(self) -> None:
        """Take back the batch entered last, if any: it adds nothing to the gradient."""
        if self._counts:
            self._counts.pop()
        self._is_first_count = False

    def correction(self, trainer: Trainer) -> float:
        """What the gradient of the step is to be multiplied by, the same on all processes."""
        if self._divisor is None or not self._counts or (self._is_first_count and len(self._counts) == 1):
            return 1.0
        return float(self._divisor) / float(self._sum(trainer))

    def _sum(self, trainer: Trainer) -> int | Tensor:
        """The rows of all batches entered, on all processes; at least 1."""
        count = sum(self._counts)
        if self._are_local and trainer.world_size > 1:
            count = torch.as_tensor(count, device=trainer.strategy.root_device).clone()
            count = trainer.strategy.reduce(count, reduce_op="sum")
        return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def accumulation_scheduler(trainer: Trainer) -> GradientAccumulationScheduler | None:
    """The callback that sets how many batches make an optimizer step, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)), None)


def scheduled_steps(trainer: Trainer, scheduler: GradientAccumulationScheduler) -> int | None:
    """Optimizer steps of the run under a scheduler; None if the epochs or their batches are not limited."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs < 0 or math.isinf(batches):
        return None
    steps = sum(math.ceil(batches / scheduler.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
