"""Training steps recorded as CUDA graphs: forward and backward pass in one graph, clipping and AdamW in another.

A step of a small model on short texts launches about a thousand kernels, most of which are faster than their launch
from Python. A replay launches all of them at once. Without a GPU the same functions are called without recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gpt2_pl import kernels
from gpt2_pl.kernels.cuda_graph import cuda_graph
from gpt2_pl.utils.trainer import find_callbacks

if TYPE_CHECKING:
    from gpt2_pl.tasks.pooled import PooledTask

MIN_STEPS = 64  # number of steps from which recording pays off
LENGTH_MULTIPLE = {"cuda": 8}  # lengths of recorded texts are multiples of this, so that few shapes are recorded
TENSORS = ("input_ids", "attention_mask", "labels", "row")  # of a batch

Batch = dict[str, Any]
Compute = Callable[[Batch], tuple[Tensor, Tensor]]


def _is_on_gpu(task: PooledTask) -> bool:
    return task.device.type == "cuda"


def reason_not_to_record(task: PooledTask) -> str | None:
    """Return why the steps of a task cannot be recorded, or None if they can."""
    trainer = task.trainer
    optimizer = trainer.optimizers[0]
    plugin = trainer.precision_plugin
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in task.modules())
    reasons = {
        "model.cuda_graphs is false": not task.cuda_graphs,
        "there is no CUDA device": not _is_on_gpu(task),
        "kernels are turned off": not kernels.enabled(),
        "the features are computed once": bool(task.features),
        f"there are fewer than {MIN_STEPS} steps": task._total_steps < MIN_STEPS,
        "several processes train": type(trainer.strategy) is not SingleDeviceStrategy,
        "gradients are accumulated": trainer.accumulate_grad_batches != 1
        or bool(find_callbacks(trainer, GradientAccumulationScheduler)),
        "float16 scales gradients": isinstance(plugin, MixedPrecision) and plugin.scaler is not None,
        "the optimizer is not torch.optim.AdamW with fused: true": type(optimizer) is not AdamW
        or any(not group["fused"] or group["amsgrad"] or group["maximize"] for group in optimizer.param_groups),
        "activations are checkpointed": task.activation_checkpointing,
        "a module has hooks": hooked,
        "anomalies are detected": torch.is_anomaly_enabled(),
        "a profiler is used": type(trainer.profiler) is not PassThroughProfiler,  # type: ignore[attr-defined]
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@dataclass
class _Recording:
    """Forward and backward pass for one shape.

    Attributes:
        batch: the tensors that the pass reads.
        parameters: parameters that get a gradient; known after the first call.
        run: computes the losses, the outputs and the gradients.
    """

    batch: dict[str, Tensor]
    parameters: list[nn.Parameter]
    run: Callable[[], tuple[Tensor, Tensor]]


@dataclass
class _Update:
    """Clipping and AdamW for one set of parameters.

    Attributes:
        key: what the graph depends on.
        rates: learning rate of each group.
        run: clips and updates.
    """

    key: Any
    rates: Tensor
    run: Callable[[], None] = lambda: None


class RecordedStep:
    """Steps of a classifier or regressor with ``torch.optim.AdamW``.

    A step consists of :meth:`forward_backward`, :meth:`assign_gradients` and :meth:`update`. A step whose loss is not
    finite changes neither the weights nor the state of the optimizer; ``bad`` is then 1.

    Args:
        compute: computes the losses (B,) and the outputs of a batch, as in training.
        parameters: all parameters of the optimizer.
        device: their device.

    Attributes:
        bad: whether the loss of the last step is not finite, a scalar 0.0 or 1.0 on the device.
    """

    def __init__(self, compute: Compute, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._compute, self._parameters, self.device = compute, list(parameters), device
        self._records = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._records else None
        self._recordings: dict[Any, _Recording] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._current: list[nn.Parameter] = []  # parameters with a gradient in this step
        self._update: _Update | None = None
        self._trained: tuple[bool, ...] = ()
        self._scale = torch.zeros((), device=device)
        self.bad = torch.zeros((), device=device)

    # Forward and backward pass

    def forward_backward(self, batch: Batch, weight: float, record: bool) -> tuple[Tensor, Tensor]:
        """Compute the losses (B,), the outputs, and the gradients of ``weight`` times the sum of the losses.

        Args:
            batch: a batch of this library's datamodules, padded on the right.
            weight: factor of the losses.
            record: whether steps of this shape are recorded; if not, the functions are called.

        Returns:
            The losses and the outputs, which the next step may overwrite.
        """
        if (trained := tuple(p.requires_grad for p in self._parameters)) != self._trained:
            self._recordings.clear()  # such as after a layer was unfrozen
            self._trained, self._update = trained, None
        self._scale.fill_(weight)
        batch = self._padded(batch)
        key = tuple((name, tensor.shape) for name, tensor in batch.items())
        recording = self._recordings.get(key) if record else None
        if recording is None:
            recording = self._prepare(batch)
            if record and self._records and self._capture(lambda: self._record(recording)):
                self._recordings[key] = recording
        for name, tensor in batch.items():
            recording.batch[name].copy_(tensor, non_blocking=True)
        outputs = recording.run()
        self._current = recording.parameters
        return outputs

    def _capture(self, record: Callable[[], None]) -> bool:
        """Return whether a capture succeeds; if not, warn, and record nothing more."""
        try:
            record()
        except RuntimeError as error:
            self._records = False
            reason = " ".join(str(error).split())[:200]
            rank_zero_warn(f"training steps are not recorded as CUDA graphs, because the capture failed: {reason}")
        return self._records

    def _padded(self, batch: Batch) -> dict[str, Tensor]:
        """Return the tensors of a batch, with texts padded to a length that is a multiple of ``LENGTH_MULTIPLE``."""
        padding = -batch["input_ids"].size(1) % LENGTH_MULTIPLE.get(self.device.type, 1)
        tensors = {name: batch[name] for name in TENSORS if name in batch}
        return {name: F.pad(t, (0, padding)) if t.dim() == 2 and padding else t for name, t in tensors.items()}

    def _prepare(self, batch: dict[str, Tensor]) -> _Recording:
        """Return a pass over tensors in the shape of a batch, which is not recorded."""
        recording = _Recording(
            {name: tensor.clone() for name, tensor in batch.items()}, [], lambda: self._pass(recording)
        )
        return recording

    def _record(self, recording: _Recording) -> None:
        """Replace the pass by a graph of it."""
        state = torch.cuda.get_rng_state(self.device)
        recording.run = cuda_graph(recording.run, [self.bad], self._pool)
        torch.cuda.set_rng_state(state, self.device)

    def _pass(self, recording: _Recording) -> tuple[Tensor, Tensor]:
        device = self.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.enable_grad(), torch.autocast(device, dtype, enabled, cache_enabled=False):
            losses, outputs = self._compute(recording.batch)
            loss = losses.sum() * self._scale
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        pairs = [(p, grad) for p, grad in zip(trained, found, strict=True) if grad is not None]
        recording.parameters = [parameter for parameter, _ in pairs]
        for parameter in recording.parameters:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.empty_like(parameter)
        torch._foreach_copy_([self._gradients[p] for p in recording.parameters], [grad for _, grad in pairs])
        self.bad.copy_(~loss.detach().isfinite())
        return losses.detach(), outputs.detach()

    def assign_gradients(self) -> None:
        """Make the gradients of the last pass those of the parameters, as a backward pass does."""
        for parameter in self._current:
            parameter.grad = self._gradients[parameter]

    # Update

    def update(self, optimizer: Optimizer, clip: float, by_value: bool) -> None:
        """Clip the gradients, update the weights with AdamW, and remove the gradients from the parameters.

        Args:
            optimizer: a fused ``torch.optim.AdamW``; its settings and its state are used. It finds no gradients.
            clip: largest norm of all gradients, or largest absolute value; 0 for no clipping.
            by_value: whether ``clip`` is a value.
        """
        joined = _joined(optimizer, set(self._current))
        groups, rates = [group for group, _ in joined], [rate for _, rate in joined]
        _create_state(optimizer, self._current)
        if self._records and self._is_recorded(optimizer, groups, clip, by_value):
            assert self._update is not None
            self._update.rates.copy_(torch.tensor(rates).pin_memory(), non_blocking=True)
            self._update.run()
        else:
            self._step(optimizer, groups, rates, clip, by_value)
        for parameter in self._current:
            parameter.grad = None

    def _is_recorded(self, optimizer: Optimizer, groups: list[dict[str, Any]], clip: float, by_value: bool) -> bool:
        """Record the update if its parameters or their state are others than in the last step."""
        moments = [optimizer.state[p]["exp_avg"].data_ptr() for p in (self._current[0], self._current[-1])]
        key = ([(tuple(map(id, group["params"])), group["weight_decay"]) for group in groups], clip, moments)
        if self._update is None or self._update.key != key:
            self._update = _Update(key, torch.zeros(len(groups), device=self.device))
            return self._capture(lambda: self._record_update(optimizer, groups, clip, by_value))
        return True

    def _record_update(self, optimizer: Optimizer, groups: list[dict[str, Any]], clip: float, by_value: bool) -> None:
        update = self._update
        assert update is not None
        rates, bad = list(update.rates.unbind()), self.bad.clone()
        self.bad.fill_(1.0)  # warm-up calls then leave the weights and the optimizer's state as they are
        gradients = [self._gradients[parameter] for parameter in self._current]
        try:
            run = partial(self._step, optimizer, groups, rates, clip, by_value)
            update.run = cuda_graph(run, [self.bad, *gradients], self._pool)
        finally:
            self.bad.copy_(bad)

    def _step(
        self,
        optimizer: Optimizer,
        groups: list[dict[str, Any]],
        rates: Sequence[float | Tensor],
        clip: float,
        by_value: bool,
    ) -> None:
        """Clip and update, as ``clip_grad_norm_`` and the fused AdamW do."""
        if clip and by_value:
            nn.utils.clip_grad_value_(self._current, clip)
        elif clip:
            nn.utils.clip_grad_norm_(self._current, clip)
        for group, rate in zip(groups, rates, strict=True):
            states = [optimizer.state[p] for p in group["params"]]
            steps = [state["step"] for state in states]
            average, square = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            lr: Any = rate  # two overloads
            torch._foreach_add_(steps, 1)
            with torch.no_grad():
                torch._fused_adamw_(
                    group["params"], [self._gradients[p] for p in group["params"]], average, square, [], steps,
                    lr=lr, beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
                    eps=group["eps"], amsgrad=False, maximize=False, grad_scale=None, found_inf=self.bad,
                )  # fmt: skip
            torch._foreach_sub_(steps, [self.bad] * len(steps))


def _joined(optimizer: Optimizer, parameters: set[nn.Parameter]) -> list[tuple[dict[str, Any], float]]:
    """Return the optimizer's groups with the given parameters; groups with equal settings and rates are one."""
    joined: dict[tuple[Any, ...], tuple[dict[str, Any], float]] = {}
    for group in optimizer.param_groups:
        members = [parameter for parameter in group["params"] if parameter in parameters]
        if not members:
            continue
        key = (float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])
        found, _ = joined.setdefault(key, ({**group, "params": []}, float(group["lr"])))
        found["params"] += members
    return list(joined.values())


def _create_state(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Create the state of the fused AdamW for parameters without one, as its ``step`` does."""
    for parameter in parameters:
        if not (state := optimizer.state[parameter]):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
