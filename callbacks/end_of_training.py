"""End of training: validate the last weights, complete the optimizer step, and save a state that resumes exactly."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from gpt2_pl.tasks.averaging import transfer_averages
from gpt2_pl.utils.trainer import find_callbacks


class EndOfTraining(Callback):
    """Validates the final weights and saves the point at which training ended.

    Lightning validates at fixed intervals only. Training that ends between them (``max_steps``, ``max_time``, a
    ``check_val_every_n_epoch`` or ``val_check_interval`` that does not divide its length) would end with weights that
    were never scored, and perhaps without a best checkpoint. Here one more validation runs before the end-of-epoch
    hooks of early stopping and checkpoints, unless validation is switched off or the process was asked to end
    (SIGTERM).

    Lightning also counts an epoch that ends early as complete, so that a resumed run would skip the rest of it.
    Checkpoints hold the true position instead. A stop that is requested while gradients are accumulated takes effect
    after the optimizer step, because a checkpoint does not hold gradients. A run that early stopping has ended stays
    ended when it is resumed.
    """

    def __init__(self) -> None:
        self._validated_step = -1
        self._stop_requested = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once if early stopping had already ended the run."""
        if any(callback.wait_count >= callback.patience for callback in find_callbacks(trainer, EarlyStopping)):
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Defer a stop until the optimizer step; transfer averaged weights before the last validation."""
        self._defer_stop(trainer)
        if trainer.is_last_batch:
            transfer_averages(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the step that was validated; defer a stop as :meth:`on_train_batch_end` does."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated_step = trainer.global_step
        self._defer_stop(trainer)

    def _defer_stop(self, trainer: Trainer) -> None:
        if trainer.fit_loop._should_accumulate():
            self._stop_requested |= trainer.should_stop
            trainer.should_stop = False
        elif self._stop_requested:
            self._stop_requested, trainer.should_stop = False, True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate if training ends with weights that were not validated."""
        if self._validated_step == trainer.global_step or not _training_ends(trainer):
            return
        transfer_averages(trainer, pl_module)
        if not trainer.enable_validation:
            return
        if not trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False):
            _validate(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the progress of an epoch that ended early as that of an unfinished epoch."""
        loop = trainer.fit_loop
        epoch: Any = loop.epoch_progress.current
        if epoch.processed != epoch.started or not _batches_remain(trainer):
            return
        state = checkpoint["loops"]["fit_loop"]
        for progress in state["epoch_progress"].values():
            progress["processed"] = progress["completed"] = progress["started"] - 1
        for name in ("total", "current"):
            progress = state["epoch_loop.batch_progress"][name]
            progress["completed"] = progress["processed"] - 1
        if not loop._should_accumulate():
            state["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def _batches_remain(trainer: Trainer) -> bool:
    """Return whether the epoch has batches left to train on."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return 0 < progress.current.ready < trainer.num_training_batches and not progress.is_last_batch


def _training_ends(trainer: Trainer) -> bool:
    """Return whether no epoch follows. Lightning's ``trainer.fit_loop.done`` would print and change counters."""
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    return (
        (loop.max_steps != -1 and trainer.global_step >= loop.max_steps)
        or (loop.max_epochs not in (None, -1) and epochs.processed >= loop.max_epochs)
        or (trainer.should_stop and loop._can_stop_early)
    )


def _validate(trainer: Trainer) -> None:
    """Run the validation loop from within training, as Lightning's epoch loop does."""
    connector = trainer._logger_connector
    first_batch = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_batch
