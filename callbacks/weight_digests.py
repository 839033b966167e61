"""Digests of the weights after some steps of a run, by which the run is verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.errors import InputError
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.utils.digests import tensor_digests
from gpt2_pl.utils.yaml_json import read_json

FILE = "weight_digests.json"


class WeightDigests(Callback):
    """Records the digests of all weights after steps 1, 2, 5, 10, 20, 50, ... in the run folder.

    ``gpt2-pl verify`` repeats the first steps and compares. The frozen weights of the base are left out; the run record
    holds their common digest. Nothing is recorded if weights are sharded, because one process alone has no complete
    weights, or after a run is resumed with another number of steps, because its schedule then differs from that of its
    first steps.

    Attributes:
        steps: the digests by number of steps and name of the weight.
    """

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, str]] = {}
        self._last_step, self._total_steps = 0, 0
        self._is_recording = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a record, or continue that of a resumed run."""
        self._last_step, self._total_steps = trainer.global_step, int(min(trainer.estimated_stepping_batches, 2**62))
        folder = run_folder(trainer)
        if trainer.global_step == 0 or folder is None:
            return
        try:
            recorded, total_steps = read_digests(folder)
        except InputError:  # an invalid record does not stop training
            recorded, total_steps = {}, 0
        self._is_recording = total_steps == self._total_steps
        if self._is_recording:
            self.steps = {step: digests for step, digests in recorded.items() if step <= trainer.global_step}
        elif trainer.is_global_zero:
            (folder / FILE).unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the weights if an optimizer step with one of the numbers has just been taken."""
        step = trainer.global_step
        if step == self._last_step:  # gradients are being accumulated
            return
        self._last_step = step
        is_whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if is_whole and trainer.is_global_zero and self._is_recording and _is_recorded(step):
            self.record(trainer, step, tensor_digests(trained_state(pl_module)))

    def record(self, trainer: Trainer, step: int, digests: dict[str, str]) -> None:
        """Keep the digests after a step and write all of them to the run folder."""
        self.steps[step] = digests
        if (folder := run_folder(trainer)) is not None:
            with atomic_write(folder / FILE) as file:
                steps = {str(step): digests for step, digests in self.steps.items()}
                json.dump({"total_steps": self._total_steps, "steps": steps}, file, indent=1)


def trained_state(pl_module: LightningModule) -> dict[str, Any]:
    """Return the state of a module without the frozen weights of its base."""
    frozen = {f"gpt2.{name}" for name in getattr(pl_module, "frozen_names", ())}
    return {name: tensor for name, tensor in pl_module.state_dict().items() if name not in frozen}


def read_digests(folder: Path) -> tuple[dict[int, dict[str, str]], int]:
    """Return the recorded digests of a run by step, in ascending order, and the number of steps of its schedule.

    Raises:
        InputError: the file is missing or invalid.
    """
    from gpt2_pl.utils.run_schema import DigestRecord
    from gpt2_pl.utils.schema import validate

    file = folder / FILE
    if not file.is_file():
        reasons = "the run was made by an earlier version, was sharded, or was extended when it was resumed"
        raise InputError(f"{folder} has no {FILE}: {reasons}", key="RUN", value=folder)
    record = validate(DigestRecord, read_json(file), str(file))
    return {int(step): record.steps[step] for step in sorted(record.steps, key=int)}, record.total_steps


def _is_recorded(step: int) -> bool:
    """Return whether a step is 1, 2 or 5 times a power of ten."""
    text = str(step).rstrip("0")
    return text in ("1", "2", "5")
