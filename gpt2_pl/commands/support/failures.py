"""One-line explanations of errors that are raised while objects are instantiated and while a run is running."""

from __future__ import annotations

import inspect
import re
import traceback
from itertools import chain
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt2_pl import errors
from gpt2_pl.commands.support.config_merge import CommandLine, as_list
from gpt2_pl.commands.support.messages import expected_values, parse_problems
from gpt2_pl.errors import InputError, RunError, causes, describe_failure, shorten
from gpt2_pl.utils.user_code import find_fault, is_installed

_ARGUMENT_ERRORS = (  # raised by unsuitable arguments that a class does not check
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(MisconfigurationException, RuntimeError, TypeError, ValueError),
)
_RESTORE_FRAMES = (  # the beginning of a function's name, and its file in Lightning
    ("restore", "checkpoint_connector.py"),
    ("resume_start", "checkpoint_connector.py"),
    ("_load_combined_loader_states", "fit_loop.py"),
)


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
    problems = list(parse_problems(message))
    texts = [str(reason)] if reason else expected_values([problem.text for problem in problems])[2]
    texts = [text for text in texts if "does not correspond to a subclass of" not in text] or texts
    paths = [problem.class_path for problem in problems if problem.class_path]
    paths += re.findall(r"class_path='(.+?)'", message)
    source, key = _stating_class(line, paths[0]) if paths else ("", "")
    where = [*filter(None, [key, *paths[:1]]), " ".join("; ".join(texts or [message]).split())]
    return InputError(": ".join(where), key=key, source=source)


def _stating_class(line: CommandLine, path: str) -> tuple[str, str]:
    """Return the file, which is empty for a flag, and the key that name a class; both are empty if none does."""
    stating = ("", "")
    for source in line.sources:
        for key, value in source.settings.items():
            if re.search(rf"\b{path.rpartition('.')[2]}\b", str(value)):
                stating = (source.name if source.is_file else "", key.replace(".class_path", "").removesuffix("+"))
    return stating


def explain_use(error: Exception, line: CommandLine, config: Any, trainer: Trainer) -> InputError | None:
    """Return the error of a class of Lightning or torch that failed while the trainer used it.

    Some classes do not check their arguments when they are instantiated: a CSVLogger that flushes every 0 steps divides
    by 0 when it is used.

    Args:
        error: the exception.
        line: the command line.
        config: the parsed configuration of the subcommand.
        trainer: the trainer, with its loggers, callbacks, profiler, strategy and plugins.

    Returns:
        The error; None if the exception is a failure of the machine, or was raised by this library, by the user's own
        code, or by an object that is not in the configuration.
    """
    if not isinstance(error, _ARGUMENT_ERRORS) or describe_failure(error) is not None:
        return None
    if isinstance(error, torch.distributed.DistError):  # other processes did not connect
        return None
    if any(isinstance(cause, InputError | RunError) for cause in causes(error)):
        return None
    culprit = _find_raising_object(error, trainer)
    source, key = ("", "") if culprit is None else _stating_class(line, type(culprit).__name__)
    if not key:
        return None
    kind = "" if isinstance(error, MisconfigurationException | ValueError) else f"{type(error).__name__}: "
    given_arguments = _changed_arguments(config.trainer, type(culprit))
    message = f"{key}: {type(culprit).__name__} cannot be used with {given_arguments}: {kind}{_first_line(error)}"
    return InputError(message, key=key, source=source)


def _find_raising_object(error: Exception, trainer: Any) -> Any:
    """Return the innermost object of the trainer, of a class of Lightning or torch, in whose call an error was raised.

    Returns:
        The object; None without one, or if the call has led to code outside installed packages.
    """
    strategy = trainer.strategy
    plugins = [strategy.precision_plugin, strategy.checkpoint_io, getattr(strategy, "cluster_environment", None)]
    objects = [*trainer.callbacks, *trainer.loggers, trainer.profiler, strategy, *plugins]
    innermost = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        this = frame.f_locals.get("self")
        if not is_installed(frame):
            innermost = None
        elif any(this is one for one in objects) and type(this).__module__.startswith(("lightning.", "torch.")):
            innermost = this
    return innermost


def _changed_arguments(config: Any, cls: type) -> str:
    """Return the arguments of a class in a configuration that differ from their defaults, as text."""
    arguments_of_class: dict[str, Any] = {}
    for one in chain.from_iterable(map(as_list, vars(config).values())):
        if isinstance(one, Namespace) and one.class_path.rpartition(".")[2] == cls.__name__ and "init_args" in one:
            arguments_of_class.update(vars(one.init_args))
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    changed = [f"{name}: {shorten(value)}" for name, value in arguments_of_class.items() if value != defaults.get(name)]
    return ", ".join(changed) or "its defaults"


def explain_run_failure(error: Exception, line: CommandLine, config: Any, trainer: Trainer) -> InputError | None:
    """Return why a run failed, if its input is the cause; None for a defect, whose traceback helps more.

    Args:
        error: an exception of the trainer.
        line: the command line.
        config: the configuration of the command.
        trainer: the trainer.
    """
    if isinstance(error, InputError):
        return None
    if isinstance(error, _ARGUMENT_ERRORS) and _raised_while_restoring(error):
        reason = f"{type(error).__name__}: {_first_line(error)[:200]}"
        return InputError(f"ckpt_path: {trainer.ckpt_path} cannot be resumed: {reason}", key="ckpt_path")
    is_misconfiguration = isinstance(error, MisconfigurationException)
    if (fault := explain_fault(error, line)) is not None:  # in the user's own code
        return fault if is_misconfiguration or describe_failure(error) else None
    if (use := explain_use(error, line, config, trainer)) is not None:
        return use
    message = " ".join(str(error).split())
    if is_misconfiguration or message.startswith("Early stopping conditioned on"):
        return InputError(f"trainer: {message}", key="trainer")
    return None


def _raised_while_restoring(error: Exception) -> bool:
    """Return whether an error was raised while Lightning restored a checkpoint."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(f.name.startswith(name) and f.filename.endswith(file) for f in frames for name, file in _RESTORE_FRAMES)


def _first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
