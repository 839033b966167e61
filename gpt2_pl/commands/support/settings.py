"""Derivation of settings from other settings, and checks that need neither data nor a model."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import Precision

from gpt2_pl.commands.support.config_merge import CommandLine, as_list
from gpt2_pl.errors import InputError, require
from gpt2_pl.experiments.run import RUNS
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
        InputError: a value is out of range.
    """
    check_ranges(config)
    check_name(config.name)
    if line.command != "fit" and not line.has_flag("version"):
        config.version = None  # the version in a config.yaml is that of the run that has written it
    config.version = folder_name(config.version)
    if (shape := config.model.init_args.get("config")) is not None:
        try:
            GPT2Config(**vars(shape))
        except (TypeError, ValueError) as error:
            raise InputError(f"model.config: {error}", key="model.config") from None
    data, base = config.data.init_args, config.model.init_args.get("base")
    if data.get("tokenizer", "given") is None and base is not None:
        data.tokenizer = base
    _complete_trainer(config.trainer, line)


def folder_name(version: str | None) -> str | None:
    """Return the folder of a version: ``version_N`` for a number N, as Lightning names it."""
    if version is None:
        return None
    check_name(version, "version")
    return f"version_{int(version)}" if re.fullmatch(r"\d{1,9}", version) else version


def restore_counts(trainer: Any, line: CommandLine) -> None:
    """Set numbers of batches to the integers that the command line gives.

    If a library has used ``Union[float, int]`` before, typing's cache returns the same object for
    ``Union[int, float]``, and the parser converts 1 to 1.0, whenever it checks the configuration.

    Args:
        trainer: settings of the trainer, which are changed.
        line: the command line.
    """
    for key in _COUNTS_OR_FRACTIONS:
        if type(value := line.last(f"trainer.{key}")) is int:
            trainer[key] = value


def _complete_trainer(trainer: Any, line: CommandLine) -> None:
    restore_counts(trainer, line)
    if trainer.precision is None and not _has_precision(trainer.plugins):
        trainer.precision = best_precision(trainer.accelerator)
    if trainer.use_distributed_sampler is True:
        trainer.use_distributed_sampler = False  # the loaders distribute rows to the processes
    if trainer.logger is None:
        trainer.logger = True


WINDOWS = os.name == "nt"
# Characters that are not allowed, dots and blanks at the end, which are dropped, and names of devices.
_INVALID_ON_WINDOWS = re.compile(r'[<>:"|?*]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def check_name(name: str, key: str = "name") -> None:
    """Check that the name or version of a run is a valid path below the folder of all runs.

    Raises:
        InputError: it is not.
    """
    parts = PurePath(name).parts
    escapes = not parts or bool({"/", "\\", "..", "~", "-"} & {*parts, parts[0][:1]}) or "\\" in name
    require(name.isprintable() and not escapes, key, name, f"the name of a folder below {RUNS}, such as my_run")
    is_invalid = WINDOWS and any(_INVALID_ON_WINDOWS.search(part) for part in parts)
    require(not is_invalid, key, name, "a valid name of a folder on Windows")
    require(all(len(part.encode()) <= 200 for part in parts), key, name, "a name of at most 200 bytes")


def check_ranges(config: Any) -> None:
    """Check numbers that Lightning checks late or not at all.

    Args:
        config: the parsed configuration of a command.

    Raises:
        InputError: a number is not positive.
    """
    own = ("checkpoint_every_n_steps", "early_stopping_patience")
    for key in (*own, "trainer.accumulate_grad_batches", "trainer.val_check_interval"):
        value = config.get(key)
        require(not isinstance(value, int | float) or value > 0, key, value, "greater than 0")


def check_logging(config: Any, command: str, checkpoint: str | None) -> None:
    """Check that settings of loggers and checkpoints do not contradict each other.

    Args:
        config: the parsed configuration of the command.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        checkpoint: path of the checkpoint, or None.

    Raises:
        InputError: they do; the message names the keys and the remedy.
    """
    trainer = config.trainer
    if command == "predict" and trainer.logger is False:
        message = "trainer.logger must not be false; predictions are written to the folder of a logged run"
        raise InputError(message, key="trainer.logger", value=False)
    if command == "fit" and trainer.logger is False and not trainer.fast_dev_run:
        _check_checkpoint_folder(trainer, checkpoint)


def _check_checkpoint_folder(trainer: Any, checkpoint: str | None) -> None:
    """Check that a run without a folder does not overwrite the checkpoints of another one."""
    folder = Path(trainer.default_root_dir or ".") / "checkpoints"
    resumes = checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve()
    for file in (folder / "best.ckpt", folder / "last.ckpt"):
        if trainer.enable_checkpointing is not False and not resumes and file.exists():
            raise InputError(
                f"{file} exists already, and with trainer.logger: false the run has no folder of its own; "
                "move it, or remove trainer.logger",
                key="trainer.logger",
            )


def _has_precision(plugins: Any) -> bool:
    """Return whether one of the configured plugins is a precision."""
    classes = [pydoc.locate(plugin.class_path) for plugin in as_list(plugins) if hasattr(plugin, "class_path")]
    return any(inspect.isclass(cls) and issubclass(cls, Precision) for cls in classes)


def best_precision(accelerator: Any) -> Literal["bf16-mixed", "32-true"]:
    """Return ``bf16-mixed`` if the hardware can multiply bfloat16 matrices, else ``32-true``."""
    capable = False
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "cpu"):
        capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if capable else "32-true"
