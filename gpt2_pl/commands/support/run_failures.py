"""One-line explanations of errors that end a run."""

from __future__ import annotations

import traceback
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt2_pl.commands.support.config_merge import CommandLine
from gpt2_pl.commands.support.messages import explain_fault, explain_use
from gpt2_pl.errors import InputError, describe_failure

_RESTORE_ERRORS = (
    *(ArithmeticError, AttributeError, LookupError, MisconfigurationException, RuntimeError, TypeError, ValueError),
)
_RESTORE_FRAMES = (  # the beginning of a function's name, and its file in Lightning
    ("restore", "checkpoint_connector.py"),
    ("resume_start", "checkpoint_connector.py"),
    ("_load_combined_loader_states", "fit_loop.py"),
)


def explain_run_failure(error: Exception, line: CommandLine, config: Any, trainer: Trainer) -> str | None:
    """Return why a run failed, if its input is the cause; None for a defect, whose traceback helps more.

    Args:
        error: an exception of the trainer.
        line: the command line.
        config: the configuration of the command.
        trainer: the trainer.
    """
    if isinstance(error, InputError):
        return None
    if isinstance(error, _RESTORE_ERRORS) and _raised_while_restoring(error):
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"ckpt_path: {trainer.ckpt_path} cannot be resumed: {type(error).__name__}: {reason[:200]}"
    is_misconfiguration = isinstance(error, MisconfigurationException)
    if (fault := explain_fault(error, line)) is not None:  # in the user's own code
        return fault if is_misconfiguration or describe_failure(error) else None
    if (use := explain_use(error, line, config, trainer)) is not None:
        return use
    message = " ".join(str(error).split())
    return f"trainer: {message}" if is_misconfiguration or message.startswith("Early stopping conditioned on") else None


def _raised_while_restoring(error: Exception) -> bool:
    """Return whether an error was raised while Lightning restored a checkpoint."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(f.name.startswith(name) and f.filename.endswith(file) for f in frames for name, file in _RESTORE_FRAMES)
