"""Reading checkpoints that nobody vouches for: no pickle is executed, and nothing is called that a file names."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from os import PathLike
from pathlib import PurePath
from typing import Any

import torch

from gpt2_pl.errors import InputError
from gpt2_pl.files import existing_file
from gpt2_pl.model import GPT2Config

_CALLED = ("optimizer", "schedule")  # arguments of a task that are code; no checkpoint holds them
_LEGACY = ("hparams", "module_arguments", "hparams_type")  # more hyperparameters, of which Lightning also makes a task
_SHAPE = {field.name for field in fields(GPT2Config)}
_PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path")  # of Lightning's ModelCheckpoint


def read(path: str | PathLike[str], key: str = "ckpt_path", task: type | None = None) -> dict[str, Any]:
    """The content of a checkpoint that a task wrote, on the CPU, its tensors mapped from the file.

    Args:
        path: a local file.
        key: the option that held it, for error messages.
        task: the task's class; by default the one that the checkpoint names, which must be this library's.

    Raises:
        InputError: no such file; one that is no checkpoint, would execute code, or was written by another program.
    """
    import gpt2_pl.tasks

    file = existing_file(str(path), key)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        name = content["task"]
        version = content["pytorch-lightning_version"]
        kinds = {part: type(content[part]) for part in ("hyper_parameters", "state_dict", "base")}
    except Exception as error:  # unpickling, zip and key errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{key}: {path} is not a checkpoint of this library: {reason[:200]}") from None
    if task is None:
        if name not in gpt2_pl.tasks.__all__ or name == "Task":
            raise InputError(f"{key}: {path} was written by {name!r}, which is no task of this library")
        task = getattr(gpt2_pl.tasks, name)
    elif name != task.__name__:
        raise InputError(f"{key}: {path} was written by {name!r}, not by {task.__name__}")
    if not isinstance(version, str) or not re.match(r"[0-9]+\.[0-9]+", version):
        raise InputError(f"{key}: {path} is not a checkpoint of this library: its Lightning is {version!r}")
    for part, kind in kinds.items():
        if not issubclass(kind, dict):
            raise InputError(f"{key}: {path} is not a checkpoint of this library: {part} is a {kind.__name__}")
    check(content, task, f"{key}: {path}")
    return content


def arguments(task: type) -> set[str]:
    """The arguments of a task's class, those that its base classes take included."""
    found: set[str] = set()
    for cls in task.__mro__:
        if "__init__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
            found |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return found


def check(content: dict[str, Any], task: type, name: str) -> None:
    """Refuse hyperparameters that ``task`` does not have, that are code or lie where Lightning once kept them, surgery
    that is not this library's, and callbacks' paths that lead elsewhere.

    Raises:
        InputError: naming ``name``, the checkpoint.
    """
    from gpt2_pl.surgery import build

    for key in _LEGACY:
        if key in content:
            raise InputError(f"{name} has {key!r}, which no checkpoint of this library has")
    if content.get("hparams_name", "kwargs") != "kwargs":
        raise InputError(f"{name}: hparams_name is {str(content['hparams_name'])[:200]!r}; it must be 'kwargs'")
    stored = content["hyper_parameters"]
    for key in stored:
        if key not in arguments(task) or key in _CALLED:
            raise InputError(f"{name} sets {key!r}, which no checkpoint of a {task.__name__} holds")
    shape = stored.get("config") or {}
    if not isinstance(shape, dict) or not all(key in _SHAPE and isinstance(shape[key], int | float) for key in shape):
        raise InputError(f"{name}: config is {str(shape)[:200]}; it must hold the numbers {', '.join(sorted(_SHAPE))}")
    for settings in [*(stored.get("surgery") or []), *(content.get("surgery") or [])]:
        if not isinstance(settings, dict):
            raise InputError(f"{name}: surgery is {settings!r}; it must be a class_path and its init_args")
        build(settings)
    for state in (content.get("callbacks") or {}).values():
        for key in _PATHS if isinstance(state, dict) else ():
            if "://" in str(path := state.get(key)) or ".." in PurePath(str(path)).parts:
                raise InputError(f"{name}: a callback's {key} is {str(path)[:200]!r}; it must be a plain local path")
