"""Loading of the trained model and the tokenizer of a run."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.plugins import import_plugin
from gpt2_pl.errors import InputError, describe_failure, nearest
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.filesystem import require_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.tasks import Task


def best_checkpoint(run: Path) -> Path:
    """Return the path of the best checkpoint in the folder of a run.

    Raises:
        InputError: the folder does not exist or has no such checkpoint.
    """
    file = run / "checkpoints" / "best.ckpt"
    if not os.path.isdir(run):  # unlike Path.is_dir, it does not raise an error for names that are too long
        raise InputError(f"RUN: there is no folder {run}{similar_run(run)}", key="RUN", value=run)
    if not os.path.exists(file):
        message = f"RUN: {run} has no checkpoints/best.ckpt; the folder of a run is {RUNS}/NAME/version_N"
        raise InputError(message, key="RUN", value=run)
    return file


def similar_run(run: Path) -> str:
    """Return a hint ``"; did you mean FOLDER?"`` for a run folder that does not exist, or an empty string."""
    names = [folder.name for folder in run.parent.iterdir() if folder.is_dir()] if os.path.isdir(run.parent) else []
    near = nearest(run.name, names)
    return "" if near is None else f"; did you mean {run.with_name(near)}?"


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
    task = load(checkpoint, options.base)
    require_protocol(task, protocol, checkpoint)
    return task, checkpoint


def require_protocol(task: object, protocol: type, checkpoint: Path) -> None:
    """Check that the task of a checkpoint implements a protocol.

    Raises:
        InputError: the task lacks a member.
    """
    if not isinstance(task, protocol):
        from gpt2_pl.tasks.protocols import lacks

        raise InputError(f"{checkpoint}: {lacks(task, protocol)}", key="RUN")


def load(checkpoint: Path, base: str | None = None) -> Task:
    """Load the trained task of a checkpoint on the CPU.

    Args:
        checkpoint: path of the checkpoint, of any task.
        base: path or hub id of the pretrained base; defaults to the one that the checkpoint names.

    Returns:
        The task.

    Raises:
        InputError: the checkpoint cannot be loaded, or ``base`` is given for a checkpoint with all weights.
    """
    from gpt2_pl.tasks import Task
    from gpt2_pl.tasks.checkpoint import read

    content = read(checkpoint, "checkpoint", Task)
    if base is not None and content["base"].get("complete"):
        raise InputError(f"base: {checkpoint} contains all weights; omit --base", key="base", value=base)
    overrides = {} if base is None else {"base": base}
    try:
        cls: Any = Task.find(content["task"])
        return cls.load_from_checkpoint(checkpoint, map_location="cpu", **overrides)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # values of unexpected types
        if describe_failure(error) is not None:  # for example, out of memory
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{checkpoint} is not valid for its task: {reason[:200]}") from error


def load_run_tokenizer(run: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a run.

    Args:
        run: folder of the run.
        vocab_size: vocabulary size of its model.

    Raises:
        InputError: there is no tokenizer, it cannot be read, or its vocabulary is larger than that of the model.
    """
    from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

    require_file(run / "tokenizer.json", "RUN")  # load_tokenizer would accept the name of a model on the hub
    tokenizer = load_tokenizer(run, "RUN")
    validate_vocab_size(tokenizer, vocab_size, "the model", "RUN's tokenizer.json")
    return tokenizer
