"""The settings of a run in its loggers, and on TensorBoard's HPARAMS page with the final scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpt2_pl.errors import shorten
from gpt2_pl.filesystem import atomic_write

# TensorBoard opens on the first two groups of tags in the order of their characters, and the HPARAMS page has columns
# for the first five tags.
_EPOCH_GROUP, _FINAL_GROUP = "Epoch", "Final"


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
            _write_hparams(logger, values, scores, trainer.global_step)
        elif not scores:
            logger.log_hyperparams(values)


def _write_hparams(logger: TensorBoardLogger, settings: dict[str, Any], scores: Mapping[str, float], step: int) -> None:
    """Write hparams.yaml and a row of TensorBoard's HPARAMS page, which is finished if it has scores.

    torch's ``add_hparams`` would write a run of its own, and also the experiment's keys; the page would then show the
    keys and scores of that run alone.
    """
    from torch.utils.tensorboard.summary import hparams

    _, start, end = hparams(settings, {})
    writer = logger.experiment
    writer._get_file_writer().add_summary(start)
    with atomic_write(Path(logger.log_dir) / "hparams.yaml") as file:
        yaml.safe_dump(settings, file, sort_keys=False, allow_unicode=True)
    for name, value in scores.items():
        writer.add_scalar(f"{_FINAL_GROUP}/{name.replace('/', '_')}", value, step)
    if scores:
        writer._get_file_writer().add_summary(end)
    writer.flush()


def log_epoch(trainer: Trainer, scores: Mapping[str, float], monitor: str) -> None:
    """Log the losses and the monitored score of an epoch as TensorBoard's first charts.

    Call this on the first process only.

    Args:
        trainer: the trainer.
        scores: scores of the epoch, such as ``val/accuracy``.
        monitor: name of the monitored score.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for name in dict.fromkeys(("train/loss", "val/loss", monitor)):
                split, _, metric = name.partition("/")
                if name in scores:
                    tag = f"{_EPOCH_GROUP}/{metric}_{split}"
                    logger.experiment.add_scalar(tag, scores[name], trainer.global_step)


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
