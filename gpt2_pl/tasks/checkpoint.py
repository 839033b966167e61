"""Safe reading of untrusted checkpoints: no pickle is executed, and no code that a file names is called."""

from __future__ import annotations

import inspect
import itertools
import struct
import zipfile
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from functools import cache
from os import PathLike
from pathlib import Path, PurePath
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from gpt2_pl.errors import InputError, require, shorten
from gpt2_pl.filesystem import require_file
from gpt2_pl.model import GPT2Config
from gpt2_pl.utils.registry import Registered, class_path

if TYPE_CHECKING:
    from gpt2_pl.utils.schema import Schema

CODE_ARGUMENTS = ("optimizer", "schedule")  # arguments of a task that are code; no checkpoint holds them
_LEGACY_KEYS = ("hparams", "module_arguments", "hparams_type")  # Lightning also passes these to a task.
# Paths in the state of Lightning's ModelCheckpoint.
_PATH_KEYS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path")

_MAX_PICKLE = 2**24  # bytes of a checkpoint's structure, without its tensors
_MAX_VALUES = 2_000_000  # number of plain values
_MAX_DEPTH = 100  # nested containers
_MAX_SIZE = 4096  # integers in the settings of a surgery that are accepted for a model of any size
_PLAIN_TYPES = (bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)
_FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of stored weights


def read(path: str | PathLike[str], key: str, task: type[Registered]) -> dict[str, Any]:
    """Read and check a checkpoint of a task, on the CPU, with tensors that are memory-mapped from the file.

    Args:
        path: a local file.
        key: name of the option with the path, for error messages.
        task: class of the task that must have written the file; with ``Task`` itself, any imported task.

    Returns:
        The content of the checkpoint.

    Raises:
        InputError: a file that does not exist, is not a checkpoint, would execute code, or was written by another
            program.
    """
    file, name = require_file(str(path), key), f"{key}: {path}"
    _check_archive(file, name)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # errors of unpickling, ZIP archives and keys
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if reason.startswith("Weights only load failed"):  # The rest of torch's message advises to run the code.
            reason = "it must hold only tensors and plain values"
        raise _foreign(name, reason[:200]) from None
    check_plain(content, name)
    written_by = content.get("task") if isinstance(content, dict) else None
    if not isinstance(written_by, str):
        raise _foreign(name, "task must be the path of a class")
    cls = task.find(written_by)
    if cls is None:
        unknown = "which is not a task of this library; import your own code by --plugin MODULE or by a configuration"
        reason = unknown if task.is_root else f"not by {class_path(task)}"
        raise InputError(f"{name} was written by {shorten(written_by)}, {reason}", key="task")
    check(content, cls, name)
    return content


def _foreign(name: str, reason: str) -> InputError:
    """Return the error for a file that this library has not written."""
    return InputError(f"{name} is not a checkpoint of this library: {reason}")


def arguments(task: type) -> dict[str, Any]:
    """Return the arguments of a task's class and of its base classes, with their annotations."""
    annotations: dict[str, Any] = {}
    for init in (vars(cls)["__init__"] for cls in task.__mro__ if "__init__" in vars(cls)):
        try:
            parameters = inspect.signature(init, eval_str=True).parameters.values()
        except NameError:  # The name is imported for type checkers only.
            parameters = inspect.signature(init).parameters.values()
        named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        for parameter in named[1:]:
            annotations.setdefault(parameter.name, parameter.annotation)
        if len(named) == len(parameters):
            break
    return annotations


def _is_plain_type(annotation: Any) -> bool:
    """Return whether an annotation allows plain values only, such as ``list[str] | None``, but not an object."""
    origin = get_origin(annotation)
    if origin in (list, dict, Union, UnionType):
        return all(map(_is_plain_type, get_args(annotation)))
    return origin is Literal or annotation in (bool, int, float, str, None, type(None))


def _field_type(annotation: Any) -> Any:
    """Return the type of a hyperparameter in a schema; a dataclass of settings becomes a schema of its fields."""
    from pydantic import create_model

    from gpt2_pl.utils.schema import Schema

    settings: Any
    for settings in filter(is_dataclass, (annotation, *get_args(annotation))):
        types = get_type_hints(settings)
        fields: Any = {field.name: (_field_type(types[field.name]), None) for field in dataclass_fields(settings)}
        return create_model(settings.__name__, __base__=Schema, **fields) | None
    return annotation if _is_plain_type(annotation) else Any


@cache
def _hyperparameter_schema(task: type) -> type[Schema]:
    """Create the schema of a task's hyperparameters from the signature of its class."""
    from pydantic import create_model

    from gpt2_pl.utils.checkpoint_schema import Hyperparameters

    annotations = arguments(task)
    keys = annotations.keys() - Hyperparameters.model_fields.keys() - {*CODE_ARGUMENTS}
    fields: Any = {key: (_field_type(annotations[key]), None) for key in keys}
    return create_model(task.__name__, __base__=Hyperparameters, **fields)


def check(content: dict[str, Any], task: type, name: str) -> None:
    """Check the content of a checkpoint.

    These are rejected: hyperparameters that ``task`` does not have, that are code, or that are stored under keys of old
    versions of Lightning; unknown surgery; paths of callbacks that leave the run's folder; values of other types than
    training writes; and sizes that do not fit the weights.

    Args:
        content: content of the checkpoint.
        task: class of the task that wrote it.
        name: the checkpoint, for error messages.

    Raises:
        InputError: naming the checkpoint and the invalid key.
    """
    from gpt2_pl.surgery import build
    from gpt2_pl.utils.checkpoint_schema import CALLBACKS, CallbackState, Checkpoint
    from gpt2_pl.utils.schema import validate

    for key in _LEGACY_KEYS:
        if key in content:
            raise InputError(f"{key!r} must not be in a checkpoint of this library", key=key, source=name)
    validate(Checkpoint, content, name)
    for key, state in (content.get("callbacks") or {}).items():
        for path_key in _PATH_KEYS:
            path = str(state.get(path_key))
            is_plain = "://" not in path and ".." not in PurePath(path).parts and "\0" not in path
            require(is_plain, f"callbacks.{key}.{path_key}", path, "a plain local path", name)
        if key.partition("{")[0] in CALLBACKS:
            validate(CallbackState, state, name, f"callbacks.{key}")
    stored = content["hyper_parameters"]
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in stored.items()}
    validate(_hyperparameter_schema(task), plain, name, "hyper_parameters")
    for settings in [*(stored.get("surgery") or []), *(content.get("surgery") or [])]:
        build(settings)
    _check_sizes(content, name)


def _check_archive(file: Path, name: str) -> None:
    """Reject an archive with compressed entries, false sizes or a large pickle.

    Args:
        file: the checkpoint.
        name: its name in error messages.

    Raises:
        InputError: naming the checkpoint.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise _foreign(name, str(error)) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _foreign(name, "its entries must not be compressed")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise _foreign(name, "its entries are larger than the file")
    if any(entry.file_size > _MAX_PICKLE for entry in entries if entry.filename.endswith("data.pkl")):
        raise _foreign(name, f"it has more than {_MAX_PICKLE:,} bytes of values")


def check_plain(content: Any, name: str) -> None:
    """Reject values that take long to read, and tensors with less memory than their shape requires.

    A value that is shared by several containers counts once in each of them: nested lists that share their parts count
    as if they were expanded.

    Args:
        content: values that :func:`torch.load` has read with ``weights_only=True``.
        name: the file, for error messages.

    Raises:
        InputError: too many or too deeply nested values, a recursive container, a value of another class, or a tensor
            that is not dense.
    """
    count, open_containers = 0, [iter((content,))]
    while open_containers:
        for value in open_containers[-1]:
            count += 1
            if isinstance(value, dict | list | tuple | set | frozenset):
                items = itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else iter(value)
                open_containers.append(items)
                break
            if isinstance(value, Tensor):
                if not is_dense(value):
                    raise InputError(f"{name} holds {shorten(value)} whose memory is not that of a dense tensor")
            elif value is not None and not isinstance(value, _PLAIN_TYPES):
                raise InputError(f"{name} must hold only tensors and plain values, got a {type(value).__name__}")
        else:
            open_containers.pop()
        if count > _MAX_VALUES or len(open_containers) > _MAX_DEPTH:
            size = f"more than {_MAX_VALUES:,} values" if count > _MAX_VALUES else f"values more than {_MAX_DEPTH} deep"
            raise InputError(f"{name} holds {size}")


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary one: strided, not quantized, with its own memory for every element."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
        and all(stride > 0 or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    )


def check_weights(stored: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Check names, shapes, types and finiteness of the weights in a checkpoint.

    Args:
        stored: weights in the checkpoint.
        expected: weights of the model.
        where: the checkpoint, or the part of it that holds the weights, for error messages.

    Raises:
        InputError: naming the weight.
    """
    for name in sorted(expected.keys() | stored.keys()):
        shape, own_shape = (_shape(weights.get(name)) for weights in (stored, expected))
        if shape != own_shape:
            difference = f"{name} is {shape} in the checkpoint and {own_shape} in the model"
            raise InputError(f"{where} does not fit the model: {difference}", key=name)
    for name, tensor in stored.items():
        types = _FLOAT_TYPES if expected[name].is_floating_point() else (expected[name].dtype,)
        if tensor.dtype not in types:
            raise InputError(f"{where}: {name} must be of {types[0]}, got {tensor.dtype}", key=name)
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{where}: {name} must be finite; load an earlier checkpoint", key=name)


def _shape(tensor: object) -> tuple[int, ...] | None:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None


def _check_sizes(content: dict[str, Any], name: str) -> None:
    """Reject hyperparameters with sizes that do not fit the weights, before a model of that size is built.

    Surgery may have removed layers, tokens or positions, but is expected to leave a quarter of the layers and half of
    the tokens and positions.

    Raises:
        InputError: naming ``name``, the checkpoint, and the size.
    """
    hyperparameters = content["hyper_parameters"]
    shapes = {key: tuple(tensor.shape) for key, tensor in content["state_dict"].items()}
    if (config := hyperparameters.get("config")) is not None and content["base"].get("complete"):
        _check_config_sizes(config, shapes, name)
    head_sizes = [size for key, shape in shapes.items() if not key.startswith("gpt2.") for size in shape]
    label_words = hyperparameters.get("label_words") or hyperparameters.get("label_token_ids") or []
    limit = max([len(label_words), *head_sizes])
    if isinstance(num_classes := hyperparameters.get("num_classes"), int):
        _check_size("hyper_parameters.num_classes", num_classes, limit, name)
    limit = max([_MAX_SIZE, *(size for shape in shapes.values() for size in shape)])
    for settings in content.get("surgery") or []:
        for key, value in (settings.get("init_args") or {}).items():
            if isinstance(value, int):
                _check_size(f"surgery.{key}", value, limit, name)


def _check_config_sizes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], name: str) -> None:
    """Check the shape of the GPT-2; see :func:`_check_sizes`."""
    layers = {key.split(".")[2] for key in shapes if key.startswith("gpt2.h.") and key.count(".") > 2}
    tokens, width, *_ = (*shapes.get("gpt2.wte.weight", ()), 0, 0)
    positions, *_ = (*shapes.get("gpt2.wpe.weight", ()), 0)
    limits = {"n_layer": 4 * len(layers), "vocab_size": 2 * tokens, "n_embd": width, "n_positions": 2 * positions}
    for key, limit in limits.items():
        _check_size(f"hyper_parameters.config.{key}", config.get(key, getattr(GPT2Config, key)), limit, name)


def _check_size(key: str, value: int, limit: int, name: str) -> None:
    require(value <= limit, key, value, f"at most {limit} for the stored weights", name)
