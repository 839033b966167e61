"""Random numbers that are a function of where training stands."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Reproducibility(Callback):
    """Seeds every training batch with a function of the run's seed, the epoch, the batch and the process.

    Dropout is then the same in a run that was stopped and resumed as in one that was not. The run's seed is
    ``seed_everything``'s.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed torch for this batch."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        entropy = [seed % 2**63, trainer.current_epoch, batch_idx, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
