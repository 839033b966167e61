"""Checks of the trainer's settings and of the optimizer, before data are read."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from gpt2_pl.callbacks import ResumableModelCheckpoint
from gpt2_pl.errors import InputError, shorten
from gpt2_pl.tasks import Task
from gpt2_pl.tasks.base import OptimizerCallable
from gpt2_pl.utils.trainer import callbacks_of

_UNSUPPORTED: dict[type[Callback], str] = {
    BaseFinetuning: (
        "adds parameters to the optimizer during training, which a checkpoint cannot resume; use "
        "gpt2_pl.callbacks.GradualUnfreezing"
    ),
    LearningRateFinder: "sets an attribute that tasks do not have; give --model.optimizer.init_args.lr",
    BatchSizeFinder: "changes the batch size after the schedule is computed; give --data.batch_size",
    ModelPruning: "replaces weights by masked ones, which checkpoints of this library do not store",
}


def check_processes(trainer: Trainer) -> None:
    """Check that the strategy does not spawn or fork this process.

    Such processes return the weights, but neither the state of callbacks nor the path of the best checkpoint.

    Raises:
        InputError: the strategy spawns or forks processes.
    """
    if isinstance(launcher := trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "trainer.strategy must start its processes as separate programs, as ddp does, got one that starts "
            f"them by {launcher._start_method} (as ddp_spawn, ddp_fork and ddp_notebook do)"
        )


def check_training(trainer: Trainer, model: Task) -> None:
    """Check that a trainer has something to train and that its settings and callbacks support tasks.

    Args:
        trainer: the trainer before its start.
        model: the task.

    Raises:
        InputError: they do not; the message names the setting.
    """
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, key) == 0:
            raise InputError(
                f"trainer.{key} must not be 0, as fit would not train; evaluate with gpt2-pl validate or test"
            )
    callbacks = callbacks_of(trainer)
    endless = trainer.max_epochs == -1 or (trainer.max_epochs is None and any(isinstance(c, Timer) for c in callbacks))
    model.check_schedule(endless and trainer.max_steps == -1)
    for callback in callbacks:
        _check_callback(callback, trainer)


def check_optimizer(make: OptimizerCallable) -> None:
    """Check that an optimizer can be created with its settings and can train a task.

    Args:
        make: creates the optimizer from parameter groups.

    Raises:
        InputError: a setting is invalid, or the optimizer does not accept parameter groups, needs sparse gradients, or
            evaluates the loss several times per step.
    """
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]  # all optimizers accept matrices
    groups: list[dict[str, Any]] = [{"params": [parameter], "lr_scale": 1.0} for parameter in parameters]
    try:
        optimizer = make([groups[0], {**groups[1], "weight_decay": 0.0}])
        if type(optimizer).__module__.startswith("torch.optim"):  # other optimizers may need a GPU
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        hint = (
            "; tasks set learning rates and weight decay per parameter group, as torch.optim.AdamW supports"
            if "group" in str(error)
            else ""
        )
        raise InputError(f"model.optimizer: {' '.join(str(error).split())}{hint}") from None
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            "model.optimizer must evaluate the loss once per step, as tasks do, got "
            f"{type(optimizer).__name__}, whose step needs a closure"
        )


def _check_callback(callback: Callback, trainer: Trainer) -> None:
    name = f"trainer.callbacks: {type(callback).__name__}"
    for unsupported, reason in _UNSUPPORTED.items():
        if isinstance(callback, unsupported):
            raise InputError(f"{name} {reason}")
    averages = isinstance(callback, StochasticWeightAveraging | WeightAveraging)
    if averages and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise InputError(f"{name} averages complete models, but trainer.strategy shards the model; use ddp")
    monitor = str(getattr(callback, "monitor", ""))
    if isinstance(callback, EarlyStopping | ModelCheckpoint) and monitor.startswith("val/"):
        if trainer.limit_val_batches == 0:
            raise InputError(f"{name} monitors {shorten(monitor)}, but trainer.limit_val_batches is 0")
    elif isinstance(callback, GradientAccumulationScheduler) and trainer.accumulate_grad_batches != 1:
        raise InputError(
            f"{name} and trainer.accumulate_grad_batches ({trainer.accumulate_grad_batches}) both set the number of "
            "batches in an optimizer step; use only one of them"
        )
    _check_checkpoint_name(callback, name)


def _check_checkpoint_name(callback: Callback, name: str) -> None:
    """Check that a ModelCheckpoint of the user does not overwrite the checkpoints that every run has."""
    if not isinstance(callback, ModelCheckpoint) or isinstance(callback, ResumableModelCheckpoint):
        return
    if callback.dirpath is not None:
        return
    names = [callback.filename, "last" if callback.save_last else None]
    if reserved := [one for one in names if one in ("best", "last")]:
        raise InputError(
            f"{name} would overwrite checkpoints/{reserved[0]}.ckpt of the run; give it another filename or a dirpath, "
            "and save_last: null"
        )
