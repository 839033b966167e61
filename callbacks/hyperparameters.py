"""The settings of a run in its loggers, and on TensorBoard's HPARAMS page with the final scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpt2_pl.callbacks.run_summary import RunSummary
from gpt2_pl.errors import shorten


class HyperparameterLogger(Callback):
    """Logs a run's settings when training starts, and its final scores after training and every evaluation.

    Args:
        settings: the configuration of the run, as plain values.
        summary: the callback that has the scores; it must be earlier in the trainer's list.
    """

    def __init__(self, settings: Mapping[str, Any], summary: RunSummary) -> None:
        self.settings, self.summary = dict(settings), summary

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the settings."""
        self._log(trainer, {})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores of the best epoch."""
        self._log_scores(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores of the validate command."""
        if trainer.state.fn == "validate":
            self._log_scores(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test scores."""
        self._log_scores(trainer, pl_module)

    def _log_scores(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scores = self.summary.final_scores(pl_module)
        self._log(trainer, {f"hp/{k.replace('/', '_')}": v for k, v in scores.items() if "/" in k})
        for logger in trainer.loggers:
            logger.save()

    def _log(self, trainer: Trainer, scores: dict[str, float]) -> None:
        if not (trainer.is_global_zero and self.settings):
            return
        files = map(Path, self.summary.files)
        strategy = "+".join(file.stem for file in files if file.parent.name == "strategy")
        values = {key: value for key, value in flatten_dict(self.settings) if value is not None}
        settings = {"strategy": strategy, **values}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _write_hparams(Path(logger.log_dir) / "final", settings, scores, trainer.global_step)
            elif not scores:
                logger.log_hyperparams(settings)


def _write_hparams(folder: Path, settings: dict[str, Any], scores: dict[str, float], step: int) -> None:
    """Write a row of TensorBoard's HPARAMS page as a run of its own, which is finished if it has scores.

    torch's ``add_hparams`` also writes the experiment's keys, and then the page shows the keys and scores of that run
    alone.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    _, start, end = hparams(settings, {})
    with SummaryWriter(str(folder)) as writer:
        writer._get_file_writer().add_summary(start)
        for name, value in scores.items():
            writer.add_scalar(name, value, step)
        if scores:
            writer._get_file_writer().add_summary(end)


def flatten_dict(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as pairs of dotted names and plain values."""
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}".replace(".init_args.", ".").removesuffix(".class_path")
        if isinstance(value, Mapping):
            pairs += flatten_dict(value, f"{prefix}{key}.")
        else:
            is_int = isinstance(value, int) and abs(value) < 2**63  # TensorBoard converts numbers to float64
            is_plain = is_int or isinstance(value, float | str | None)
            text = shorten(value) if isinstance(value, int) else str(value)
            pairs.append((name, value if is_plain else text))
    return pairs
