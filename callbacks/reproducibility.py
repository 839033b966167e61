"""Seeding of training batches, independent of interruptions."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Reproducibility(Callback):
    """Seeding of torch before every training batch from the run's seed, the epoch, the batch and the process.

    A resumed run then draws the same dropout masks as an uninterrupted one. The run's seed is that of
    ``seed_everything``.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed torch for this batch."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        entropy = [seed % 2**63, trainer.current_epoch, batch_idx, trainer.global_rank]
        _seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1), pl_module.device.type)


def _seed(seed: int, device: str) -> None:
    """Seed the generators of the CPU and of a kind of device, like :func:`torch.manual_seed`.

    For kinds of device that are not in use, ``torch.manual_seed`` formats the Python stack, which takes as long as all
    callbacks of a batch.

    Args:
        seed: in [0, 2^63).
        device: ``cpu``, ``cuda``, ...
    """
    if device not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    for generator in torch.cuda.default_generators if device == "cuda" else ():
        generator.manual_seed(seed)
