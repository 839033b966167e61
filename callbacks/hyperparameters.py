"""The settings of a run in its loggers, and on TensorBoard's HPARAMS page with the final scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpt2_pl.errors import shorten


def log_settings(trainer: Trainer, settings: Mapping[str, Any], scores: Mapping[str, float]) -> None:
    """Log the settings of a run, or its final scores beside them; call this on the first process only.

    Args:
        trainer: the trainer.
        settings: the settings, as plain values; None is left out.
        scores: scores such as ``val/accuracy``; empty before training.
    """
    values = {key: value for key, value in flatten_dict(settings) if value is not None}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _write_hparams(Path(logger.log_dir) / "final", values, scores, trainer.global_step)
        elif not scores:
            logger.log_hyperparams(values)


def _write_hparams(folder: Path, settings: dict[str, Any], scores: Mapping[str, float], step: int) -> None:
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
            writer.add_scalar(f"hp/{name.replace('/', '_')}", value, step)
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
