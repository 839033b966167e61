"""Reading checkpoints that nobody vouches for: no pickle is executed, and nothing is called that a file names."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from os import PathLike
from pathlib import PurePath
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from gpt2_pl.errors import InputError
from gpt2_pl.files import existing_file
from gpt2_pl.model import GPT2Config
from gpt2_pl.registry import Registered, class_path

_CALLED = ("optimizer", "schedule")  # arguments of a task that are code; no checkpoint holds them
_LEGACY = ("hparams", "module_arguments", "hparams_type")  # more hyperparameters, of which Lightning also makes a task
_VERSION = re.compile(r"([2-9]|[1-9][0-9])(\.[0-9]{1,9}){1,4}((a|b|rc|\.?dev|\.?post)[0-9]{1,9})?(\+[a-z0-9]+)?")
_SHAPE = {field.name for field in fields(GPT2Config)}
_PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path")  # of Lightning's ModelCheckpoint


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (_is_array(value) and value.numel() == 1)


# Of what is in a checkpoint: a class, a check, [kind of all values], {key: kind, str: kind of all other values}, or
# several kinds of which one must do. What is missing is None.
_KINDS: dict[str, Any] = {
    "base": {"path": str | None, "digest": str | None, "complete": bool | None},
    "hyper_parameters": {"surgery": list | None},
    "surgery": list | None,
    "state_dict": {str: _is_array},
    "callbacks": (None, {str: dict}),
    "wording": (
        None,
        {
            "template": (None, _is_text),
            "labels": (None, [_is_text]),
            "columns": (None, {str: [_is_text]}),
            "max_length": int | None,
        },
    ),
    "loops": (None, {"fit_loop": {"epoch_progress": dict}, str: dict}),
    "optimizer_states": (None, [{"state": dict, "param_groups": [dict]}]),
    "lr_schedulers": (None, [dict]),
}
_STATES: dict[str, Any] = {  # of our callbacks
    "RunSummary": {
        "epochs": (None, [{"epoch": int, str: _is_number}]),
        "validated": (None, {str: _is_number}),
        "layers": (None, [{"layer": str, "parameters": int, "trainable": int, "peak_rates": [_is_number]}]),
        **dict.fromkeys(("seconds", "cpu_seconds", "training_seconds"), int | float | None),
        **dict.fromkeys(("examples", "tokens", "peak_memory_before"), int | None),
    },
    "PredictionWriter": {"best": int | float | None},
    "FiniteLoss": {"skipped": int},
    "Patience": {"wait_count": int, "stopped_epoch": int, "best_score": _is_number, "patience": int},
    "RunCheckpoint": {
        **dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), str),
        **dict.fromkeys(("best_model_score", "kth_value"), (None, _is_number)),
        "best_k_models": {str: _is_number},
    },
}


def _wrong(value: Any, kind: Any, name: str) -> str | None:
    """What of ``value`` is of another kind; None where nothing is."""
    if isinstance(kind, tuple):
        found = [_wrong(value, one, name) for one in kind]
        return None if None in found else found[-1]
    if isinstance(kind, list) and isinstance(value, list):
        parts = [(part, kind[0], f"{name}[{i}]") for i, part in enumerate(value)]
    elif isinstance(kind, dict) and isinstance(value, dict):
        parts = [(value.get(key), one, f"{name}.{key}") for key, one in kind.items() if key is not str]
        if str in kind:
            parts += [(key, str, f"a key of {name}") for key in value]
            parts += [(part, kind[str], f"{name}.{str(key)!r}") for key, part in value.items() if key not in kind]
    elif kind is None or isinstance(kind, dict | list):
        return None if value is kind else f"{name} is {str(value)[:100]!r}"
    else:
        good = isinstance(value, kind) if isinstance(kind, type | UnionType) else kind(value)
        return None if good else f"{name} is {str(value)[:100]!r}"
    return next(filter(None, (_wrong(*part) for part in parts)), None)


def read(path: str | PathLike[str], key: str, task: type[Registered]) -> dict[str, Any]:
    """The content of a checkpoint that a task wrote, on the CPU, its tensors mapped from the file.

    Args:
        path: a local file.
        key: the option that held it, for error messages.
        task: the class that must have written it; with ``Task`` itself, any task that has been imported.

    Raises:
        InputError: no such file; one that is no checkpoint, would execute code, or was written by another program.
    """
    file = existing_file(str(path), key)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        name = content["task"]
        version = content["pytorch-lightning_version"]
        kinds = {part: type(content[part]) for part in ("hyper_parameters", "state_dict", "base")}
    except Exception as error:  # unpickling, zip and key errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{key}: {path} is not a checkpoint of this library: {reason[:200]}") from None
    cls = task.find(name)
    if cls is None:
        reason = f"not by {class_path(task)}"
        if task.is_root:
            reason = (
                "which is no task of this library and has not been imported; code of your own is imported by --plugin "
                "MODULE, or by a configuration that names it"
            )
        raise InputError(f"{key}: {path} was written by {str(name)[:200]!r}, {reason}")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise InputError(f"{key}: {path} is not a checkpoint of this library: its Lightning is {str(version)[:50]!r}")
    for part, kind in kinds.items():
        if not issubclass(kind, dict):
            raise InputError(f"{key}: {path} is not a checkpoint of this library: {part} is a {kind.__name__}")
    check(content, cls, f"{key}: {path}")
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
    that is not this library's, callbacks' paths that lead elsewhere, and values of other kinds than training writes.

    Raises:
        InputError: naming ``name``, the checkpoint.
    """
    from gpt2_pl.surgery import build

    states = content.get("callbacks")
    for key, state in states.items() if isinstance(states, dict) else ():
        for at in _PATHS if isinstance(state, dict) else ():
            if "://" in str(path := state.get(at)) or ".." in PurePath(str(path)).parts:
                raise InputError(f"{name}: a callback's {at} is {str(path)[:200]!r}; it must be a plain local path")
        kind = _STATES.get(str(key).partition("{")[0], dict)
        if wrong := _wrong(state, kind, f"the state of {str(key)[:50]!r}"):
            raise InputError(f"{name} is broken: {wrong}")
    for key, kind in _KINDS.items():
        if wrong := _wrong(content.get(key), kind, key):
            raise InputError(f"{name} is broken: {wrong}")
    for key in ("optimizer_states", "lr_schedulers"):
        if content.get(key) == []:
            raise InputError(f"{name} is broken: {key} is empty")
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
