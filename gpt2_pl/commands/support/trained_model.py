"""The trained model that the arguments of a command name."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.plugins import import_plugin
from gpt2_pl.inference.loading import best_checkpoint, load, load_checkpoint, require_protocol

if TYPE_CHECKING:
    from gpt2_pl.inference.predictor import Precision, Predictor


def load_task(options: Namespace, protocol: type = object) -> tuple[Any, Path]:
    """Return the trained task that the arguments of a command name, on the CPU, and the path of its checkpoint.

    Args:
        options: arguments of a command.
        protocol: class of :mod:`gpt2_pl.tasks.protocols` that the task must implement.

    Raises:
        InputError: a plugin cannot be imported, the checkpoint cannot be loaded, or its task lacks a method.
    """
    for name in options.plugin or ():
        import_plugin(name)
    checkpoint = options.ckpt_path or best_checkpoint(options.run)
    task = load_checkpoint(checkpoint, options.base)
    require_protocol(task, protocol, checkpoint)
    return task, checkpoint


def load_predictor(options: Namespace, precision: Precision = "32-true") -> Predictor:
    """Return the trained model that the arguments of a command name, ready to predict.

    Args:
        options: arguments of a command.
        precision: precision of the computation; see :func:`~gpt2_pl.inference.loading.load`.

    Raises:
        InputError: a plugin cannot be imported, or the model cannot be loaded.
    """
    for name in options.plugin or ():
        import_plugin(name)
    calibrated = getattr(options, "calibrated", False)
    return load(options.run, ckpt_path=options.ckpt_path, base=options.base, calibrated=calibrated, precision=precision)
