"""Optimizer, learning-rate schedule, gradient accumulation and gradient clipping of tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2
from gpt2_pl.optim import NamedParameters, Schedule, parameter_groups
from gpt2_pl.surgery import Adapter
from gpt2_pl.tasks.accumulation import StepMean, accumulation_scheduler, scheduled_steps
from gpt2_pl.tasks.checkpointed import CheckpointedModule
from gpt2_pl.utils.trainer import find_callbacks

Closure = Callable[[], Any] | None
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
Unit = Literal["rows", "targets"]


@contextmanager
def joined_groups(optimizer: Optimizer) -> Iterator[None]:
    """Replace parameter groups with equal settings by one group, for one step of PyTorch's Adam or AdamW.

    Both update all parameters of a group in a few calls. Parameters are updated one by one, so that the result is the
    same. Other optimizers may compute something over a group and are not changed.

    Args:
        optimizer: its groups are restored at the end.
    """
    groups = optimizer.param_groups
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        joined: dict[tuple[Any, ...], dict[str, Any]] = {}
        for group in groups:
            values = (group[name] for name in optimizer.defaults)
            settings = tuple(tuple(value) if isinstance(value, list) else value for value in values)
            if settings in joined:
                joined[settings]["params"] += group["params"]
            else:
                joined[settings] = {**group, "params": list(group["params"])}
        optimizer.param_groups = list(joined.values())
    try:
        yield
    finally:
        optimizer.param_groups = groups


def gpt2_layers(model: GPT2) -> dict[str, NamedParameters]:
    """Return the named parameters of each layer of a GPT-2, from input to output."""
    blocks = [f"block.{i}" for i in range(len(model.h))]
    layers: dict[str, NamedParameters] = {name: [] for name in ("embeddings", *blocks, "ln_f", "prefix", "prompt")}
    for name, parameter in model.named_parameters():
        top, _, rest = name.partition(".")
        block = f"block.{rest.partition('.')[0]}"
        if top in ("wte", "wpe"):
            layer = "embeddings"
        elif top == "h" and block in layers:
            layer = block
        else:
            layer = f"gpt2.{top}" if top in ("h", "head", "embeddings") else top
        layers.setdefault(layer, []).append((f"gpt2.{name}", parameter))
    return {name: parameters for name, parameters in layers.items() if parameters or name not in ("prefix", "prompt")}


class OptimizedModule(CheckpointedModule):
    """Module with one optimizer, whose step uses the gradient of the mean loss over all rows of the step.

    :class:`~gpt2_pl.tasks.Task` sets the attributes.

    Attributes:
        make_optimizer: creates the optimizer from parameter groups.
        schedule: learning-rate schedule.
        trained_names: names of the GPT-2's parameters that train.
    """

    make_optimizer: OptimizerCallable
    schedule: Schedule
    trained_names: frozenset[str]
    _found_rate: float | None = None  # of a LearningRateFinder
    _total_steps: int = 1

    @property
    def lr(self) -> float | None:
        """Base learning rate that Lightning's LearningRateFinder has set; None before.

        Parameter groups keep the ratios of their rates to it, such as those of LoRA+ and DiscriminativeLR.
        """
        return self._found_rate

    @lr.setter
    def lr(self, rate: float) -> None:
        self._found_rate = rate

    def __init__(self) -> None:
        super().__init__()
        self.gpt2: GPT2 | None = None
        self._step_mean = StepMean()
        self._update_context = ExitStack()  # from clipping to the end of the optimizer step

    @property
    def backbone(self) -> GPT2:
        """GPT-2 that ``configure_model`` has built."""
        if self.gpt2 is None:
            raise RuntimeError("the model is not built yet: call configure_model() first")
        return self.gpt2

    def layer_groups(self) -> dict[str, NamedParameters]:
        """Return the named parameters of each layer, from input to output.

        The layers are ``embeddings``, ``block.0`` ... ``block.{L-1}``, ``ln_f``, ``prefix`` and ``prompt`` if present,
        other modules that surgery added to the GPT-2, by the names of their attributes, and ``head``.
        """
        return {**gpt2_layers(self.backbone), "head": self.head_parameters()}

    def head_parameters(self) -> NamedParameters:
        """Return the named parameters that do not belong to the GPT-2."""
        return [(name, p) for name, p in self.named_parameters() if not name.startswith("gpt2.")]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Create the optimizer and the scheduler over all steps of the run.

        Each parameter group has one layer, one weight decay and one learning rate.

        Raises:
            InputError: no parameter trains, the optimizer rejects the parameters, or the run is unbounded and the
                schedule depends on its length.
        """
        adapters = [(name, m) for name, m in self.named_modules() if isinstance(m, Adapter)]
        rates = {f"{name}.lora_B": m.loraplus_lr_ratio for name, m in adapters}
        trained = {f"gpt2.{name}" for name in self.trained_names}
        trained |= {name for name, parameter in self.head_parameters() if parameter.requires_grad}
        groups = parameter_groups(self.layer_groups(), rates, trained)
        if not groups:
            message = "nothing would train: train_base is false and this head has no parameters"
            raise InputError(message, key="model.train_base")
        try:
            optimizer = self.make_optimizer(groups)
        except ValueError as error:  # for example because of the shape of a parameter
            raise InputError(f"model.optimizer: {' '.join(str(error).split())}", key="model.optimizer") from None
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        self._total_steps = self._n_steps()
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, self._total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _n_steps(self) -> int:
        """Return the number of optimizer steps of the run, or 1 if it is unbounded and the schedule does not use it.

        Raises:
            InputError: the data or the trainer's limits are invalid, or the run is unbounded and the schedule depends
                on its length.
        """
        try:
            self.trainer.fit_loop.setup_data()  # reads the data
            total = self.trainer.estimated_stepping_batches
        except ValueError as error:
            raise InputError(f"trainer: {' '.join(str(error).split())}", key="trainer") from None
        if (accumulation := accumulation_scheduler(self.trainer)) is not None:
            # Lightning's estimate ignores this scheduler.
            total = scheduled_steps(self.trainer, accumulation) or total
        if math.isinf(total) or total < 0:  # no limit, or an unknown number of batches
            self.check_schedule(endless=self.trainer.limit_train_batches != 0)
            return 1
        return max(int(total), 1)

    def check_schedule(self, endless: bool) -> None:
        """Reject a schedule that depends on the length of training if training has none.

        Args:
            endless: whether the number of optimizer steps is unbounded or unknown.

        Raises:
            InputError: naming the schedule.
        """
        if endless and self.schedule.needs_total:
            reason = f"because model.schedule {type(self.schedule).__name__} depends on the length of training"
            message = f"trainer.max_epochs or trainer.max_steps must be a number above 0, {reason}"
            raise InputError(message, key="trainer.max_epochs")

    def _use_found_values(self) -> bool:
        """Use the rate of a LearningRateFinder, and count the steps with the batches of a BatchSizeFinder.

        Returns:
            Whether the trainer has one of these callbacks.
        """
        finders = find_callbacks(self.trainer, LearningRateFinder)
        if finders and self.lr is not None:
            for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
                factor = self.lr / scheduler.optimizer.defaults["lr"]
                scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
                for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                    group["initial_lr"] = rate
        if find_callbacks(self.trainer, BatchSizeFinder):
            self._total_steps = self._n_steps()
            return True
        return bool(finders)

    def _set_resumed_rates(self) -> None:
        """Compute the learning rates of a resumed run, because the stored ones belong to the former length.

        Those of a run whose rate or batch size was found before its start are computed as well.
        """
        changed = self._use_found_values() or self.trainer.ckpt_path is not None
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            if isinstance(scheduler, LambdaLR) and changed:
                rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
                scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in rates]
                for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                    group["lr"] = rate

    def on_train_start(self) -> None:
        """Set the learning rates and the number of batches per optimizer step.

        Lightning does not set the number of batches if a run resumes within an epoch.
        """
        self._set_resumed_rates()
        self._step_mean.clear()
        if (scheduler := accumulation_scheduler(self.trainer)) is not None:
            self.trainer.accumulate_grad_batches = scheduler.get_accumulate_grad_batches(self.trainer.current_epoch)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Closure = None
    ) -> None:
        """Take a step with the gradient of the mean over all its rows, and free the gradients.

        Lightning would keep the gradients during the next forward pass. Callbacks can read them, before clipping, in
        ``on_before_optimizer_step``.
        """

        def closure() -> Any:
            loss = None if optimizer_closure is None else optimizer_closure()
            if (factor := self._step_mean.correction(self.trainer)) != 1.0:
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
            return loss

        with ExitStack() as self._update_context:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad()
        self._step_mean.clear()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients; with a fused optimizer too if there is no gradient scaler (bf16).

        Parameter groups with equal settings are then updated together; see :func:`joined_groups`.

        Lightning rejects fused optimizers with any mixed precision, because they unscale gradients themselves.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._update_context.enter_context(joined_groups(optimizer))  # Lightning updates the weights next.

    def mean_loss(
        self, total: Tensor, count: int | Tensor, batch: dict[str, Any], batch_idx: int, unit: Unit = "rows"
    ) -> tuple[Tensor, Tensor]:
        """Convert the sum of the losses of a batch to the loss for the backward pass.

        The gradients of the batches of an optimizer step then add up to the gradient of the mean over all its rows (or
        targets), for any distribution over batches and processes; see
        :class:`~gpt2_pl.tasks.accumulation.StepMean`.

        Args:
            total: sum of the losses on this process, a scalar.
            count: number of losses in the sum.
            batch: the batch; ``global_<unit>`` is the number of rows or targets of this batch on all processes, and
                ``step_<unit>`` that of all batches of the optimizer step, if the data provides them.
            batch_idx: number of the batch in the epoch.
            unit: what each loss belongs to.

        Returns:
            The loss that ``training_step`` returns, and the mean over the batch, for logging.
        """
        weight = self.loss_weight(count, batch, batch_idx, unit)
        everywhere = batch.get(f"global_{unit}")
        mean = total.detach() * (self.trainer.world_size / everywhere if everywhere else 1.0 / count)
        return total * weight, mean

    def loss_weight(
        self, count: int | Tensor, batch: dict[str, Any], batch_idx: int, unit: Unit = "rows"
    ) -> float | Tensor:
        """Return the factor of the sum of the losses of a batch in :meth:`mean_loss`; arguments as there."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # Lightning sets the gradients to zero here.
            self._step_mean.clear()
        everywhere, announced = batch.get(f"global_{unit}"), batch.get(f"step_{unit}")
        return self._step_mean.weight(self.trainer, count, everywhere, announced)

    def leave_out_batch(self) -> None:
        """Remove the last batch of :meth:`mean_loss` from the mean, because its gradient is not used."""
        self._step_mean.leave_out()
