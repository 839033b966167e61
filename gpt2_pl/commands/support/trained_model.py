"""Loading of the trained model and the tokenizer of a run."""

from __future__ import annotations

import os
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.plugins import import_plugin
from gpt2_pl.errors import InputError, describe_failure, nearest
from gpt2_pl.experiments.run import RUNS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.tasks import Task

_RUN_FOLDER = f"{RUNS}/NAME/version_N"


def best_checkpoint(run: Path) -> Path:
    """Return the path of the best checkpoint in the folder of a run.

    Raises:
        InputError: the folder does not exist or has no such checkpoint; the message names similar runs.
    """
    file = run / "checkpoints" / "best.ckpt"
    if not os.path.isdir(run):  # unlike Path.is_dir, it does not raise an error for names that are too long
        hint = f"{similar_run(run)}; the folder of a run is {_RUN_FOLDER}"
        raise InputError(f"RUN: there is no folder {run}{hint}", key="RUN", value=run)
    if not os.path.exists(file):
        below = sorted(str(path.parents[1]) for path in islice(run.rglob("checkpoints/best.ckpt"), 100))
        hint = f"runs below it are {', '.join(below[:5])}" if below else f"the folder of a run is {_RUN_FOLDER}"
        raise InputError(f"RUN: {run} has no checkpoints/best.ckpt; {hint}", key="RUN", value=run)
    return file


def similar_run(run: Path) -> str:
    """Return a hint ``"; did you mean FOLDER?"`` for a run folder that does not exist, or an empty string.

    A number N suggests ``version_N``.
    """
    names = [folder.name for folder in run.parent.iterdir() if folder.is_dir()] if os.path.isdir(run.parent) else []
    numbered = f"version_{run.name}"
    near = numbered if numbered in names else nearest(run.name, names)
    return "" if near is None else f"; did you mean {run.with_name(near)}?"


def load_task(options: Namespace) -> tuple[Task, Path]:
    """Return the trained task that the arguments of a command name, on the CPU, and the path of its checkpoint.

    Raises:
        InputError: a plugin cannot be imported, or the checkpoint cannot be loaded.
    """
    for name in options.plugin or ():
        import_plugin(name)
    checkpoint = options.ckpt_path or best_checkpoint(options.run)
    return load(checkpoint, options.base), checkpoint


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


def load_run_tokenizer(run: Path, vocab_size: int, model: str) -> Tokenizer:
    """Return the tokenizer of a run.

    Args:
        run: folder of the run.
        vocab_size: vocabulary size of its model.
        model: name of the model, for error messages.

    Raises:
        InputError: there is no tokenizer, it cannot be read, or its vocabulary is larger than that of the model.
    """
    from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

    tokenizer = load_tokenizer(run, "RUN")
    validate_vocab_size(tokenizer, vocab_size, model, "RUN's tokenizer.json")
    return tokenizer
