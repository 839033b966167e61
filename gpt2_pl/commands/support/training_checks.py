"""Checks of a trainer's settings against each other and against the task, made before any data are read."""

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

_REFUSED: dict[type[Callback], str] = {
    BaseFinetuning: (
        "adds parameters to the optimizer during training, which a checkpoint cannot resume; use "
        "gpt2_pl.callbacks.GradualUnfreezing"
    ),
    LearningRateFinder: "sets an attribute that tasks do not have; give --model.optimizer.init_args.lr",
    BatchSizeFinder: "changes the batch size after the schedule was laid out; give --data.batch_size",
    ModelPruning: "replaces weights by masked ones, which checkpoints of this library do not hold",
}


def check_processes(trainer: Trainer) -> None:
    """Refuse strategies that spawn or fork this process.

    Such processes return the weights, but not the state of callbacks, nor which checkpoint is the best.

    Raises:
        InputError: the strategy is one of them.
    """
    if isinstance(launcher := trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "trainer.strategy must start its processes as programs of their own, as ddp does, got one that starts "
            f"them by {launcher._start_method} (as ddp_spawn, ddp_fork and ddp_notebook do)"
        )


def check_training(trainer: Trainer, model: Task) -> None:
    """Refuse a trainer that would train nothing, or whose settings or callbacks a task cannot be trained with.

    Args:
        trainer: the trainer, not started yet.
        model: the task to be trained.

    Raises:
        InputError: naming the setting.
    """
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, key) == 0:
            raise InputError(f"trainer.{key} is 0, and fit would train nothing; gpt2-pl validate and test only score")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    endless = trainer.max_epochs == -1 or (trainer.max_epochs is None and any(isinstance(c, Timer) for c in callbacks))
    model.check_schedule(endless and trainer.max_steps == -1)
    for callback in callbacks:
        _check_callback(callback, trainer)


def check_optimizer(make: OptimizerCallable) -> None:
    """Refuse an optimizer whose settings are out of range, or that a task cannot be trained with.

    Args:
        make: makes the optimizer from parameter groups.

    Raises:
        InputError: the settings cannot be used, or the optimizer takes no parameter groups, needs sparse gradients, or
            evaluates the loss more than once a step.
    """
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]  # every optimizer takes matrices
    groups: list[dict[str, Any]] = [{"params": [parameter], "lr_scale": 1.0} for parameter in parameters]
    try:
        optimizer = make([groups[0], {**groups[1], "weight_decay": 0.0}])
        if type(optimizer).__module__.startswith("torch.optim"):  # others may need a GPU
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        hint = (
            "; tasks set rates and weight decay by group, as torch.optim.AdamW takes them"
            if "group" in str(error)
            else ""
        )
        raise InputError(f"model.optimizer: {' '.join(str(error).split())}{hint}") from None
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"model.optimizer: {type(optimizer).__name__} evaluates the loss more than once a step (its step needs a "
            "closure), and a task evaluates it once"
        )


def _check_callback(callback: Callback, trainer: Trainer) -> None:
    name = f"trainer.callbacks: {type(callback).__name__}"
    for refused, reason in _REFUSED.items():
        if isinstance(callback, refused):
            raise InputError(f"{name} {reason}")
    averages = isinstance(callback, StochasticWeightAveraging | WeightAveraging)
    if averages and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise InputError(f"{name} averages whole models, and trainer.strategy shards this one; use ddp")
    monitor = str(getattr(callback, "monitor", ""))
    if isinstance(callback, EarlyStopping | ModelCheckpoint) and monitor.startswith("val/"):
        if trainer.limit_val_batches == 0:
            raise InputError(f"{name} monitors {shorten(monitor)}, and trainer.limit_val_batches is 0")
    elif isinstance(callback, GradientAccumulationScheduler) and trainer.accumulate_grad_batches != 1:
        raise InputError(
            f"{name} and trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} both say how many batches "
            "make an optimizer step; leave one of them out"
        )
    if (
        isinstance(callback, ModelCheckpoint)
        and not isinstance(callback, ResumableModelCheckpoint)
        and callback.dirpath is None
    ):
        written = [callback.filename, "last" if callback.save_last else None]
        if taken := [one for one in written if one in ("best", "last")]:
            raise InputError(
                f"{name} would write checkpoints/{taken[0]}.ckpt, which every run writes by itself; give it "
                "another filename or a dirpath, and save_last: null"
            )
