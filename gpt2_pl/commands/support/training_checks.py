"""Checks of the trainer's settings and of the optimizer, before data are read."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from gpt2_pl.callbacks import ResumableModelCheckpoint
from gpt2_pl.errors import InputError
from gpt2_pl.surgery import Surgery
from gpt2_pl.tasks import Task
from gpt2_pl.tasks.base import OptimizerCallable
from gpt2_pl.utils.trainer import callbacks_of

FINDERS = (callbacks.LearningRateFinder, callbacks.BatchSizeFinder)
_UNSUPPORTED: dict[type[callbacks.Callback], str] = {
    callbacks.BaseFinetuning: (
        "adds parameters to the optimizer during training, which a checkpoint cannot resume; use "
        "gpt2_pl.callbacks.GradualUnfreezing"
    ),
    callbacks.ModelPruning: "replaces weights by masked ones, which checkpoints of this library do not store",
}


def check_processes(trainer: Trainer) -> None:
    """Check that the strategy does not spawn or fork this process.

    Such processes return the weights, but neither the state of callbacks nor the path of the best checkpoint.

    Raises:
        InputError: the strategy spawns or forks processes.
    """
    if isinstance(launcher := trainer.strategy.launcher, _MultiProcessingLauncher):
        expected = "start its processes as separate programs, as ddp does"
        got = f"one that starts them by {launcher._start_method} (as ddp_spawn, ddp_fork and ddp_notebook do)"
        raise InputError(f"trainer.strategy must {expected}, got {got}", key="trainer.strategy")


def needs_training(model: Any) -> bool:
    """Return whether a task has random parameters, so that it predicts nothing before training."""
    is_random = model.base is None or getattr(model, "head_name", None) == "linear"
    return is_random and all(type(surgery).load_head is Surgery.load_head for surgery in model.surgery)


def check_training(trainer: Trainer, model: Task, resumes: bool = False) -> None:
    """Check that a trainer has something to train and that its settings and callbacks support tasks.

    With ``trainer.max_epochs: 0``, a task that needs no training is only evaluated.

    Args:
        trainer: the trainer before its start.
        model: the task.
        resumes: whether a checkpoint is resumed.

    Raises:
        InputError: they do not; the message names the setting.
    """
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, key) == 0 and (key != "max_epochs" or needs_training(model)):
            message = f"trainer.{key} must not be 0, as fit would not train; evaluate with gpt2-pl validate or test"
            raise InputError(message, key=f"trainer.{key}", value=0)
    used = callbacks_of(trainer)
    has_timer = any(isinstance(callback, callbacks.Timer) for callback in used)
    endless = trainer.max_epochs == -1 or (trainer.max_epochs is None and has_timer)
    model.check_schedule(endless and trainer.max_steps == -1)
    for callback in used:
        if resumes and isinstance(callback, FINDERS):
            advice = "resume a run with the config.yaml of its folder, which has the value that was found"
            message = f"trainer.callbacks: {type(callback).__name__} searches at the start of training; {advice}"
            raise InputError(message, key="trainer.callbacks")
        if reason := _unsuitable(callback, trainer):
            raise InputError(f"trainer.callbacks: {type(callback).__name__} {reason}", key="trainer.callbacks")


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
        hint = "; tasks set learning rates and weight decay per parameter group, as torch.optim.AdamW supports"
        message = f"model.optimizer: {' '.join(str(error).split())}{hint if 'group' in str(error) else ''}"
        raise InputError(message, key="model.optimizer") from None
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        expected = "evaluate the loss once per step, as tasks do"
        got = f"{type(optimizer).__name__}, whose step needs a closure"
        raise InputError(f"model.optimizer must {expected}, got {got}", key="model.optimizer")


def _unsuitable(callback: callbacks.Callback, trainer: Trainer) -> str:
    """Return why a callback does not support tasks or contradicts the trainer's settings; empty if it can be used."""
    for unsupported, reason in _UNSUPPORTED.items():
        if isinstance(callback, unsupported):
            return reason
    averages = isinstance(callback, callbacks.StochasticWeightAveraging | callbacks.WeightAveraging)
    if averages and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        return "averages complete models, but trainer.strategy shards the model; use ddp"
    monitor = getattr(callback, "monitor", None)
    if str(monitor).startswith("val/") and trainer.limit_val_batches == 0:
        return f"monitors {monitor}, but trainer.limit_val_batches is 0; early_stopping_patience must be null as well"
    is_own = isinstance(callback, ResumableModelCheckpoint)  # of every run
    if isinstance(callback, callbacks.ModelCheckpoint) and not is_own and callback.dirpath is None:
        names = {callback.filename, "last" if callback.save_last else None}
        if reserved := [name for name in ("best", "last") if name in names]:
            file = f"checkpoints/{reserved[0]}.ckpt"
            return f"would overwrite {file} of the run; give it another filename or a dirpath, and save_last: null"
    return ""
