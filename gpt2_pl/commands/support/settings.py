"""Derivation of settings from other settings, and checks that need neither data nor a model."""

from __future__ import annotations

import inspect
import pydoc
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import Precision

from gpt2_pl.commands.support.config_merge import CommandLine, check_name, check_ranges
from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2Config

_COUNTS_OR_FRACTIONS = (  # of batches: 1 is one batch, 1.0 is all of them
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("overfit_batches", "val_check_interval"),
)


def complete_settings(config: Any, line: CommandLine) -> None:
    """Fill in the settings that follow from others, so that config.yaml records what the run used.

    Args:
        config: the parsed configuration of the command, which is changed.
        line: the command line.

    Raises:
        InputError: a value is out of range, or the model or the data are not configured.
    """
    check_ranges(config)
    check_name(config.name)
    if line.command != "fit" and not line.has_flag("version"):
        config.version = None  # the version in a config.yaml is that of the run that has written it
    config.version = folder_name(config.version)
    for key in ("model", "data"):
        if config.get(key) is None:
            raise InputError(f"{key} is missing; start with the file of a task: --config task/sst5")
    _check_shape(config.model.init_args.get("config"))
    data, base = config.data.init_args, config.model.init_args.get("base")
    if data.get("tokenizer", "given") is None and base is not None:
        data.tokenizer = base
    _complete_trainer(config.trainer, line)


def folder_name(version: str | None) -> str | None:
    """Return the folder of a version: ``version_N`` for a number N, as Lightning names it."""
    if version is None:
        return None
    check_name(version, "version")
    if re.fullmatch(r"-\d+", version):
        raise InputError(f"version must be an integer of at least 0 or the name of a folder, got {version}")
    return f"version_{int(version)}" if re.fullmatch(r"\d{1,9}", version) else version


def _check_shape(shape: Any) -> None:
    if shape is None:
        return
    try:
        GPT2Config(**vars(shape))
    except (TypeError, ValueError) as error:
        raise InputError(f"model.config: {error}") from None


def _complete_trainer(trainer: Any, line: CommandLine) -> None:
    for key in _COUNTS_OR_FRACTIONS:
        # If a library has used Union[float, int] before, typing's cache returns the same object for Union[int, float],
        # and the parser converts 1 to 1.0.
        if type(value := line.last(f"trainer.{key}")) is int:
            trainer[key] = value
    if trainer.precision is None and not _has_precision(trainer.plugins):
        trainer.precision = best_precision(trainer.accelerator)
    if trainer.use_distributed_sampler is True:
        trainer.use_distributed_sampler = False  # the loaders distribute rows to the processes
    if trainer.logger is None:
        trainer.logger = True


def check_logging(config: Any, command: str, checkpoint: str | None) -> None:
    """Check that settings of loggers, checkpoints and validation do not contradict each other.

    Args:
        config: the parsed configuration of the command.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        checkpoint: path of the checkpoint, or None.

    Raises:
        InputError: they do; the message names the keys and the remedy.
    """
    trainer = config.trainer
    if command == "predict" and trainer.logger is False:
        raise InputError("trainer.logger must not be false; predictions are written to the folder of a logged run")
    if command == "fit" and trainer.logger is False and not trainer.fast_dev_run:
        _check_checkpoint_folder(trainer, checkpoint)
    if config.early_stopping_patience is not None and trainer.limit_val_batches == 0:
        raise InputError(
            "trainer.limit_val_batches must not be 0, because early_stopping_patience needs validation scores; "
            "give --early_stopping_patience null"
        )


def _check_checkpoint_folder(trainer: Any, checkpoint: str | None) -> None:
    """Check that a run without a folder does not overwrite the checkpoints of another one."""
    folder = Path(trainer.default_root_dir or ".") / "checkpoints"
    resumes = checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve()
    for file in (folder / "best.ckpt", folder / "last.ckpt"):
        if trainer.enable_checkpointing is not False and not resumes and file.exists():
            raise InputError(
                f"{file} exists already, and with trainer.logger: false the run has no folder of its own; "
                "move it, or remove trainer.logger"
            )


def _has_precision(plugins: Any) -> bool:
    """Return whether one of the configured plugins is a precision."""
    plugins = plugins if isinstance(plugins, list) else [plugins]
    classes = [pydoc.locate(plugin.class_path) for plugin in plugins if hasattr(plugin, "class_path")]
    return any(inspect.isclass(cls) and issubclass(cls, Precision) for cls in classes)


def best_precision(accelerator: Any) -> str:
    """Return ``bf16-mixed`` if the hardware can multiply bfloat16 matrices, else ``32-true``."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "cpu"):
        capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16-mixed" if capable else "32-true"
    return "32-true"
