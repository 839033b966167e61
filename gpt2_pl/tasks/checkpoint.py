"""Reading checkpoints that nobody vouches for: no pickle is executed, and nothing is called that a file names."""

from __future__ import annotations

import inspect
import itertools
import struct
import zipfile
from functools import cache
from os import PathLike
from pathlib import Path, PurePath
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin

import torch
from torch import Tensor, nn

from gpt2_pl.errors import InputError, shorten
from gpt2_pl.filesystem import require_file
from gpt2_pl.model import GPT2Config
from gpt2_pl.utils.registry import Registered, class_path

if TYPE_CHECKING:
    from gpt2_pl.utils.schema import Schema

_CODE_ARGUMENTS = ("optimizer", "schedule")  # arguments of a task that are code; no checkpoint holds them
_LEGACY = ("hparams", "module_arguments", "hparams_type")  # more hyperparameters, of which Lightning also makes a task
_PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path")  # of Lightning's ModelCheckpoint


_MAX_PICKLE = 2**24  # bytes of a checkpoint's structure, without its tensors
_MAX_VALUES, _MAX_DEPTH = 2_000_000, 100  # of its plain values
_MAX_SIZE = 4096  # that a whole number among a surgery's settings may have in any model
_PLAIN = (bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)


def read(path: str | PathLike[str], key: str, task: type[Registered]) -> dict[str, Any]:
    """The content of a checkpoint that a task wrote, on the CPU, its tensors mapped from the file.

    Args:
        path: a local file.
        key: the option that held it, for error messages.
        task: the class that must have written it; with ``Task`` itself, any task that has been imported.

    Raises:
        InputError: no such file; one that is no checkpoint, would execute code, or was written by another program.
    """
    file = require_file(str(path), key)
    _check_archive(file, f"{key}: {path}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling, zip and key errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if reason.startswith("Weights only load failed"):  # torch goes on with how to run its code
            reason = "it holds more than tensors and plain values"
        raise InputError(f"{key}: {path} is not a checkpoint of this library: {reason[:200]}") from None
    check_plain(content, f"{key}: {path}")
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise InputError(f"{key}: {path} is not a checkpoint of this library: it names no task")
    cls = task.find(name)
    if cls is None:
        reason = f"not by {class_path(task)}"
        if task.is_root:
            reason = (
                "which is no task of this library and has not been imported; code of your own is imported by --plugin "
                "MODULE, or by a configuration that names it"
            )
        raise InputError(f"{key}: {path} was written by {shorten(name)}, {reason}")
    check(content, cls, f"{key}: {path}")
    return content


def arguments(task: type) -> dict[str, Any]:
    """The arguments of a task's class, those that its base classes take included, and their annotations."""
    found: dict[str, Any] = {}
    for cls in task.__mro__:
        if "__init__" in vars(cls):
            init = vars(cls)["__init__"]
            try:
                parameters = inspect.signature(init, eval_str=True).parameters.values()
            except NameError:  # a name that only type checkers import
                parameters = inspect.signature(init).parameters.values()
            for parameter in parameters:
                if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "self":
                    found.setdefault(parameter.name, parameter.annotation)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
    return found


def _is_plain_type(annotation: Any) -> bool:
    """Whether an annotation stands for plain values alone: ``list[str] | None``, but no class or callable."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return True
    if inner:
        return get_origin(annotation) in (list, dict, Union, UnionType) and all(map(_is_plain_type, inner))
    return annotation in (bool, int, float, str, None, type(None))


@cache
def _hyperparameters_of(task: type) -> type[Schema]:
    """The schema of a task's hyperparameters, from its signature."""
    from pydantic import create_model

    from gpt2_pl.utils.checkpoint_schema import Hyperparameters

    known = {key: kind for key, kind in arguments(task).items() if key not in _CODE_ARGUMENTS}
    fields: Any = {
        key: (kind if _is_plain_type(kind) else Any, None)
        for key, kind in known.items()
        if key not in Hyperparameters.model_fields
    }
    return create_model(task.__name__, __base__=Hyperparameters, **fields)


def check(content: dict[str, Any], task: type, name: str) -> None:
    """Refuse hyperparameters that ``task`` does not have, that are code or lie where Lightning once kept them, surgery
    that is not this library's, callbacks' paths that lead elsewhere, values of other kinds than training writes, and
    sizes that the weights do not have.

    Raises:
        InputError: naming ``name``, the checkpoint.
    """
    from gpt2_pl.surgery import build
    from gpt2_pl.utils.checkpoint_schema import CALLBACKS, Checkpoint
    from gpt2_pl.utils.schema import validate

    for key in _LEGACY:
        if key in content:
            raise InputError(f"{name} has {key!r}, which no checkpoint of this library has")
    validate(Checkpoint, content, name)
    for key, state in (content.get("callbacks") or {}).items():
        for at in _PATHS:
            if "://" in str(path := state.get(at)) or ".." in PurePath(str(path)).parts or "\0" in str(path):
                raise InputError(f"{name}: callbacks.{key}.{at} must be a plain local path, got {shorten(path)}")
        if (schema := CALLBACKS.get(key.partition("{")[0])) is not None:
            validate(schema, state, name, f"callbacks.{key}")
    stored = content["hyper_parameters"]
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in stored.items()}
    validate(_hyperparameters_of(task), plain, name, "hyper_parameters")
    for settings in [*(stored.get("surgery") or []), *(content.get("surgery") or [])]:
        build(settings)
    _check_sizes(content, name)


def _check_archive(file: Path, name: str) -> None:
    """Refuse a checkpoint whose parts are compressed, or which says that it holds more than it does.

    Raises:
        InputError: naming ``name``, the checkpoint.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise InputError(f"{name} is not a checkpoint of this library: {error}") from None
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise InputError(f"{name} is not a checkpoint of this library: its parts are compressed")
    if sum(part.file_size for part in parts) > file.stat().st_size:
        raise InputError(f"{name} is not a checkpoint of this library: its parts are larger than the file")
    if any(part.file_size > _MAX_PICKLE for part in parts if part.filename.endswith("data.pkl")):
        raise InputError(
            f"{name} is not a checkpoint of this library: it has more than {_MAX_PICKLE:,} bytes of values"
        )


def check_plain(content: Any, name: str) -> None:
    """Refuse values of which reading alone takes long, and tensors whose memory is not what they say.

    What several places share counts in each of them: lists of lists of one another are as large as written out.

    Args:
        content: values that :func:`torch.load` read with ``weights_only=True``.
        name: of the file, for error messages.

    Raises:
        InputError: too many values, too deep or within themselves, of a class that no checkpoint needs, or tensors that
            are not dense.
    """
    count, waiting = 0, [iter((content,))]
    while waiting:
        for value in waiting[-1]:
            count += 1
            if isinstance(value, dict | list | tuple | set | frozenset):
                inner = itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else iter(value)
                waiting.append(inner)
                break
            if isinstance(value, Tensor):
                if not is_dense(value):
                    raise InputError(f"{name} holds {shorten(value)} whose memory is not that of a dense tensor")
            elif value is not None and not isinstance(value, _PLAIN):
                raise InputError(f"{name} holds a {type(value).__name__}, which no checkpoint of this library has")
        else:
            waiting.pop()
        if count > _MAX_VALUES or len(waiting) > _MAX_DEPTH:
            what = f"more than {_MAX_VALUES:,} values" if count > _MAX_VALUES else f"values more than {_MAX_DEPTH} deep"
            raise InputError(f"{name} holds {what}")


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems: strided, not quantized, in memory of its own for every element."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
        and all(stride > 0 or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    )


def _check_sizes(content: dict[str, Any], name: str) -> None:
    """Refuse sizes among the hyperparameters that the weights do not have, before a model of that size is built.

    Surgery may have removed layers, tokens or positions, but no more than most of them.

    Raises:
        InputError: naming ``name``, the checkpoint, and the size.
    """
    weights, stored = content["state_dict"], content["hyper_parameters"]
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}

    def refuse(key: str, limit: str, found: Any) -> NoReturn:
        raise InputError(f"{name}: {key} must be {limit}, as the weights are, got {shorten(found)}")

    if (shape := stored.get("config")) is not None and content["base"].get("complete"):
        layers = {key.split(".")[2] for key in weights if key.startswith("gpt2.h.") and key.count(".") > 2}
        tokens, width, *_ = (*shapes.get("gpt2.wte.weight", ()), 0, 0)
        positions, *_ = (*shapes.get("gpt2.wpe.weight", ()), 0)
        limits = {"n_layer": 4 * len(layers), "vocab_size": 2 * tokens, "n_embd": width, "n_positions": 2 * positions}
        for key, limit in limits.items():
            if (found := shape.get(key, getattr(GPT2Config, key))) > limit:
                refuse(f"hyper_parameters.config.{key}", f"at most {limit}", found)
    sizes = [(key.startswith("gpt2."), size) for key, tensor in shapes.items() for size in tensor]
    of_head = max((size for of_core, size in sizes if not of_core), default=0)
    limit = max(of_head, len(stored.get("label_words") or stored.get("label_token_ids") or []))
    if isinstance(value := stored.get("num_classes"), int) and value > limit:
        refuse("hyper_parameters.num_classes", f"at most {limit}", value)
    limit = max([_MAX_SIZE, *(size for _, size in sizes)])
    for settings in content.get("surgery") or []:
        for key, value in (settings.get("init_args") or {}).items():
            if isinstance(value, int) and value > limit:
                refuse(f"surgery.{key}", f"at most {limit}", value)
