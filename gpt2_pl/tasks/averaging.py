"""Support for Lightning's weight averaging callbacks: only trained parameters are averaged and stored twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gpt2_pl.errors import InputError, require
from gpt2_pl.tasks.checkpoint import check_weights
from gpt2_pl.utils.trainer import find_callbacks

if TYPE_CHECKING:
    from gpt2_pl.tasks.checkpointed import CheckpointedModule


class TrainedAverage(AveragedModel):
    """Average of the trained parameters; frozen parameters and buffers are shared with the model.

    Averaging them would be wrong: an average of equal numbers may differ from them by rounding, and an average of token
    ids may be another token.
    """

    _shared: frozenset[int] = frozenset()  # ids of parameters

    def share(self, model: nn.Module) -> None:
        """Replace frozen parameters and all buffers by those of the model, which must be on its device."""
        averaged = dict(self.module.named_modules())
        frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        for name, module in model.named_modules():
            averaged[name]._buffers.update(module._buffers)
            averaged[name]._parameters.update({key: p for key, p in module._parameters.items() if id(p) in frozen})
        self._shared = frozenset(frozen)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Iterate over the averaged parameters."""
        return (parameter for parameter in super().parameters(recurse) if id(parameter) not in self._shared)

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with the model's current parameters."""
        trained = [parameter for parameter in model.parameters() if id(parameter) not in self._shared]
        super().update_parameters(cast("Any", SimpleNamespace(parameters=lambda: trained, buffers=model.buffers)))


def create_averages(task: LightningModule, stage: str) -> None:
    """Create the averages of the averaging callbacks in ``fit``, and remove them in other stages.

    Lightning would copy the model before it is built, or all of it. After ``fit`` it would test the weights that are
    not averaged.
    """
    for averaging in find_callbacks(task._trainer, WeightAveraging):
        averaging._average_model = None  # frees its memory
        if stage == "fit":
            device: Any = averaging._device or task.device
            averaging._average_model = TrainedAverage(task, device=device, **averaging._kwargs)
    if stage != "fit":
        return
    for swa in find_callbacks(task._trainer, StochasticWeightAveraging):
        task.configure_model()
        swa._average_model = copy.deepcopy(task)


def share_untrained(task: LightningModule) -> None:
    """Share frozen parameters and buffers between the model and its averages; the model must be on its device."""
    for averaging in find_callbacks(task._trainer, WeightAveraging):
        if isinstance(average := averaging._average_model, TrainedAverage):
            average.share(task)


def transfer_averages(trainer: Trainer, task: LightningModule) -> None:
    """Copy the average into the model in the last epoch, before its last validation and checkpoint.

    WeightAveraging does so itself. StochasticWeightAveraging does so after the last checkpoint.
    """
    for swa in find_callbacks(trainer, StochasticWeightAveraging):
        if swa._initialized and trainer.current_epoch == swa.swa_end:
            assert swa._average_model is not None
            swa.transfer_weights(swa._average_model, task)


def blocks_resuming(trainer: Trainer) -> bool:
    """Return whether averaging has started in a way that prevents resuming the run; see :func:`expand`."""
    return any(swa._initialized for swa in find_callbacks(trainer, StochasticWeightAveraging))


def compact(checkpoint: dict[str, Any], task: CheckpointedModule) -> None:
    """Keep only trained parameters in ``current_model_state``, and drop the averages that cannot be resumed.

    Lightning stores the averages in ``state_dict``. Its buffers are replaced by the model's, which are not averaged.
    """
    if (current := checkpoint.get("current_model_state")) is not None:
        trained = _trained_names(task)
        checkpoint["current_model_state"] = {name: tensor for name, tensor in current.items() if name in trained}
        checkpoint["state_dict"].update({name: tensor for name, tensor in current.items() if name not in trained})
    for swa in find_callbacks(task._trainer, StochasticWeightAveraging):
        if (state := (checkpoint.get("callbacks") or {}).get(swa.state_key)) is not None:
            state["average_model_state"] = None


def expand(checkpoint: dict[str, Any], task: CheckpointedModule) -> None:
    """Complete ``current_model_state`` from ``state_dict``, and reject averages that cannot be resumed.

    Args:
        checkpoint: content of a checkpoint; its ``state_dict`` was checked and is complete.
        task: the task that loads the checkpoint.

    Raises:
        InputError: averages that this run cannot resume, or that do not fit the model.
    """
    is_fitting, where = task.trainer.state.fn == TrainerFn.FITTING, f"ckpt_path: {task.trainer.ckpt_path}"
    for swa in find_callbacks(task._trainer, StochasticWeightAveraging):
        state = (checkpoint.get("callbacks") or {}).pop(swa.state_key, None)
        if is_fitting and state is not None and state.get("n_averaged") != 0:
            reason = "Lightning cannot resume it; use lightning.pytorch.callbacks.WeightAveraging"
            raise InputError(f"StochasticWeightAveraging has started to average, and {reason}", source=where)
    current: Any = checkpoint.get("current_model_state")
    averaging = checkpoint.get("averaging_state")
    if not is_fitting or (current is None and averaging is None):
        return
    if not find_callbacks(task._trainer, WeightAveraging):
        message = "the checkpoint holds averaged weights; configure the callback that averages them"
        raise InputError(f"{message} (such as EMAWeightAveraging)", key="trainer.callbacks", source=where)
    require(isinstance(current, dict), "current_model_state", current, "a mapping", where)
    trained = {name: checkpoint["state_dict"][name] for name in _trained_names(task)}
    check_weights(current, trained, f"{where}: current_model_state")
    count = averaging.get("n_averaged") if isinstance(averaging, dict) and len(averaging) == 1 else None
    is_count = isinstance(count, Tensor) and count.shape == () and count.dtype == torch.long and bool(count >= 0)
    require(is_count, "averaging_state.n_averaged", averaging, "a count", where)
    checkpoint["current_model_state"] = checkpoint["state_dict"] | current


def _trained_names(task: CheckpointedModule) -> set[str]:
    """Return the names in ``state_dict`` of all parameters except the frozen weights of the base."""
    frozen = {f"gpt2.{name}" for name in task.frozen_names}
    return {name for name, _ in task.named_parameters(remove_duplicate=False)} - frozen
