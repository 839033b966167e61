"""One-line explanations of errors that are raised while objects are instantiated and while a run is running."""

from __future__ import annotations

import re
import traceback

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt2_pl import errors
from gpt2_pl.commands.support.config_merge import CommandLine
from gpt2_pl.commands.support.messages import expected_values, parse_problems
from gpt2_pl.errors import InputError, RunError, causes, describe_failure
from gpt2_pl.utils.user_code import find_fault, is_installed

_RESTORING = ("restore", "resume_start", "_load_combined_loader_states")  # beginnings of names of Lightning's functions


def explain_fault(error: Exception, line: CommandLine) -> InputError | None:
    """Return the error of an exception in the user's own code: key and class, then file, line and reason.

    Args:
        error: the exception, or an exception that jsonargparse raised from it.
        line: the command line.

    Returns:
        The error; None if the exception was not raised in the user's own code, or is a failure of the machine.
    """
    fault = find_fault(error)
    if fault is None or any(map(_is_of_machine, causes(error))):
        return None
    for cls in map(type, fault.objects):
        source, key = _stating_class(line, cls.__name__)
        if key:
            return InputError(f"{key}: {cls.__module__}.{cls.__qualname__}: {fault.text}", key=key, source=source)
    return InputError(fault.text)


def _is_of_machine(error: BaseException) -> bool:
    return errors.is_out_of_memory(error) or errors.error_number(error) in errors.MACHINE_ERRNOS


def explain_instantiation(error: Exception, line: CommandLine) -> InputError | None:
    """Return why a class of the configuration could not be instantiated.

    Args:
        error: an exception of jsonargparse.
        line: the command line.

    Returns:
        The error; None if the exception has another reason, or its own message is better.
    """
    reason = next((cause for cause in causes(error) if isinstance(cause, InputError | RunError | ImportError)), None)
    message = str(error)
    if (fault := explain_fault(error, line)) is not None:
        return fault
    if isinstance(reason, InputError | RunError) or not (reason or message.startswith("Does not validate against")):
        return None
    problems = [problem for problem in parse_problems(message) if "does not correspond to a" not in problem.text]
    text = str(reason or expected_values(problems)[1] or message)
    paths = [problem.class_path for problem in problems if problem.class_path]
    paths += re.findall(r"class_path='(.+?)'", message)
    source, key = _stating_class(line, paths[0]) if paths else ("", "")
    where = [*filter(None, [key, *paths[:1]]), " ".join(text.split())]
    return InputError(": ".join(where), key=key, source=source)


def _stating_class(line: CommandLine, path: str) -> tuple[str, str]:
    """Return the file, which is empty for a flag, and the key that name a class; both are empty if none does."""
    stating = ("", "")
    for source in line.sources:
        for key, value in source.settings.items():
            if re.search(rf"\b{path.rpartition('.')[2]}\b", str(value)):
                stating = (source.name if source.is_file else "", key.replace(".class_path", "").removesuffix("+"))
    return stating


def explain_use(error: Exception, line: CommandLine) -> InputError | None:
    """Return the error of a class of Lightning or torch that failed while the trainer used it.

    Some classes do not check their arguments when they are instantiated: a CSVLogger that flushes every 0 steps divides
    by 0 when it is used.

    Args:
        error: the exception.
        line: the command line.

    Returns:
        The error; None if the exception was raised by this library, by the user's own code, or by an object that the
        command line does not name for the trainer.
    """
    if any(isinstance(cause, InputError | RunError | torch.distributed.DistError) for cause in causes(error)):
        return None
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        cls = type(frame.f_locals.get("self"))
        if not is_installed(frame):
            return None
        source, key = _stating_class(line, cls.__name__)
        if key.startswith("trainer.") and cls.__module__.startswith(("lightning.", "torch.")):
            text = f"{type(error).__name__}: {_first_line(error)}"
            return InputError(f"{key}: {cls.__name__} cannot be used: {text}", key=key, source=source)
    return None


def explain_run_failure(error: Exception, line: CommandLine, trainer: Trainer) -> InputError | None:
    """Return why a run failed, if its input is the cause; None for a defect, whose traceback helps more.

    Args:
        error: an exception of the trainer.
        line: the command line.
        trainer: the trainer.
    """
    if isinstance(error, InputError | RunError):
        return None
    is_misconfiguration, failure = isinstance(error, MisconfigurationException), describe_failure(error)
    frames = traceback.extract_tb(error.__traceback__)
    if not failure and any(f.name.startswith(_RESTORING) and "lightning" in f.filename for f in frames):
        reason = f"{type(error).__name__}: {_first_line(error)[:200]}"
        return InputError(f"ckpt_path: {trainer.ckpt_path} cannot be resumed: {reason}", key="ckpt_path")
    if (fault := explain_fault(error, line)) is not None:  # in the user's own code
        return fault if is_misconfiguration or failure else None
    if not failure and (use := explain_use(error, line)) is not None:
        return use
    return InputError(f"trainer: {' '.join(str(error).split())}", key="trainer") if is_misconfiguration else None


def _first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
