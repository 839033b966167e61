"""Time, memory, speed and floating-point operations of training."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.tasks.base import Task
from gpt2_pl.utils.machine import peak_process_memory
from gpt2_pl.utils.trainer import log_every_n_steps

H200_FLOPS = 9.89e14  # dense bfloat16, of the data sheet; Lightning does not know the name "NVIDIA H200"


class Throughput(Callback):
    """Measure training and log its speed.

    Every ``log_every_n_steps`` batches, loggers receive ``train/tokens_per_second`` and, on a GPU whose peak is known,
    ``train/mfu``: the model FLOPs utilization (Chowdhery et al. 2022, appendix B). A resumed run continues all counts.

    Attributes:
        seconds: wall-clock time of training, validation included; see :meth:`update`.
        cpu_seconds: CPU time of all threads of this process, in those seconds.
        training_seconds: wall-clock time of training batches.
        examples: rows trained on, of all processes.
        tokens: tokens trained on, of all processes.
        flops: floating-point operations of all processes; None if the task does not know them.
        peak_memory_bytes: largest memory allocated on the GPU or, without a GPU, occupied by the process.
    """

    _STATE = ("seconds", "cpu_seconds", "training_seconds", "examples", "tokens", "flops", "peak_memory_bytes")

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = self.training_seconds = 0.0
        self.examples = self.tokens = self.peak_memory_bytes = 0
        self.flops: float | None = 0.0
        self._clocks: tuple[float, float] | None = None  # wall-clock and CPU time when they were last read, in training
        self._batch_start = 0.0
        self._counted = (0, 0.0)  # tokens and training seconds that operations were counted of
        self._flops_per_token: tuple[frozenset[str], float | None] = (frozenset(), None)
        self._fitting = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Determine whether a checkpoint will be loaded for training or for an evaluation."""
        self._fitting = stage == "fit"

    # Figures

    def update(self) -> None:
        """Read the clocks and the peak of the memory."""
        now = (time.perf_counter(), time.process_time())
        if self._clocks is not None:
            self.seconds += now[0] - self._clocks[0]
            self.cpu_seconds += now[1] - self._clocks[1]
            self._clocks = now
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_process_memory()
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)

    def mfu(self, trainer: Trainer) -> float | None:
        """Return the model FLOPs utilization of the whole training, or None if it is not known."""
        if not self.flops or not self.training_seconds:
            return None
        return self._utilization(trainer, self.flops / self.training_seconds)

    def record(self, trainer: Trainer) -> dict[str, Any]:
        """Return the figures for metrics.json."""
        self.update()
        seconds = self.training_seconds
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "examples_per_second": self.examples / seconds if seconds else None,
            "tokens_per_second": self.tokens / seconds if seconds else None,
            "training_flops": self.flops or None,
            "mfu": self.mfu(trainer),
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Return all figures so far."""
        self.update()
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the figures of an interrupted run; an evaluation keeps its own."""
        if self._fitting:
            for name in self._STATE:
                if (value := state_dict.get(name)) is not None:
                    setattr(self, name, value)
            self._counted = (self.tokens, self.training_seconds)

    # Training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._clocks = (time.perf_counter(), time.process_time())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of the batch."""
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log the speed since the last time."""
        if isinstance(pl_module, Task) and pl_module.decoded_last_step:
            return  # such a step reads other tokens than the batch's
        self.training_seconds += time.perf_counter() - self._batch_start
        self.examples += int(batch.get("global_rows", len(batch["input_ids"])))
        self.tokens += int(batch.get("global_tokens") or int(batch["attention_mask"].sum()) * trainer.world_size)
        every = log_every_n_steps(trainer)
        if (batch_idx + 1) % every == 0 and trainer.loggers:
            tokens, seconds = self.tokens - self._counted[0], self.training_seconds - self._counted[1]
            flops = self._count_flops(pl_module)
            speed = {"train/tokens_per_second": tokens / seconds}
            if flops is not None and (mfu := self._utilization(trainer, flops / seconds)) is not None:
                speed["train/mfu"] = mfu
            for logger in trainer.loggers:
                logger.log_metrics(speed, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the operations of the last batches."""
        self._count_flops(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clocks."""
        self._count_flops(pl_module)
        self.update()
        self._clocks = None

    def _count_flops(self, pl_module: LightningModule) -> float | None:
        """Add and return the operations of the batches since the last call; None if they are not known."""
        tokens = self.tokens - self._counted[0]
        self._counted = (self.tokens, self.training_seconds)
        if self.flops is None or not isinstance(pl_module, Task) or not tokens:
            return None
        trains = frozenset(name for name, parameter in pl_module.named_parameters() if parameter.requires_grad)
        if trains != self._flops_per_token[0]:
            self._flops_per_token = trains, pl_module.training_flops_per_token(self.tokens / max(1, self.examples))
        per_token = self._flops_per_token[1]
        flops = None if per_token is None else per_token * tokens
        self.flops = None if flops is None else self.flops + flops
        return flops

    def _utilization(self, trainer: Trainer, flops_per_second: float) -> float | None:
        """Return the share of the peak of all devices, or None if the peak is not known, as on a CPU."""
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return None
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        is_h200 = dtype == torch.bfloat16 and "H200" in torch.cuda.get_device_name(device)
        peak = H200_FLOPS if is_h200 else get_available_flops(device, dtype)
        return None if peak is None else flops_per_second / (peak * trainer.world_size)
