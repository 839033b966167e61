"""Callbacks for the tests of processes: the power goes off; what every process holds in the end."""

import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Keep(Callback):
    """Writes the weights of every process to ``rank_R.pt``."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(pl_module.state_dict(), f"rank_{trainer.global_rank}.pt")
