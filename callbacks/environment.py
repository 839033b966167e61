"""Process-wide settings that make training faster."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.kernels.malloc import disable_malloc_trim
from gpt2_pl.tasks.base import Task


class Environment(Callback):
    """Process-wide settings for training: the memory allocator and the attention backend.

    glibc is configured to keep freed memory in the process, because a training step allocates and frees much memory.
    On a GPU the cuDNN backend of attention is disabled for tasks whose batches vary in length, because it compiles a
    plan for every new shape; the backend is restored at the end.
    """

    def __init__(self) -> None:
        self._cudnn_was_enabled: bool | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Apply the settings."""
        disable_malloc_trim()
        if isinstance(pl_module, Task) and not pl_module.fixed_length_batches:
            if self._cudnn_was_enabled is None:
                self._cudnn_was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the attention backend."""
        if self._cudnn_was_enabled is not None:
            torch.backends.cuda.enable_cudnn_sdp(self._cudnn_was_enabled)
            self._cudnn_was_enabled = None
