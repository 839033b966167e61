"""Comparison of plain values in a checkpoint with those of the objects that will load them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gpt2_pl.errors import InputError, require, shorten
from gpt2_pl.tasks.checkpoint import is_dense

_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "min_lrs", "_last_lr", "lr_scale")
_NON_NEGATIVE = (*_RATES, "eps", "weight_decay", "lr_decay", "alpha", "last_epoch", "_step_count", "T_cur", "T_i")
_FRACTIONS = ("betas", "momentum", "dampening")  # in [0, 1)
_MAX_RATE = 1e6
_MAX_COUNT = 2**53  # Larger integers are not exact as floating-point numbers.


def check_like(value: Any, reference: Any, key: str, known: bool, owner: object = None) -> None:
    """Check that a value has the keys, lengths and types of a new object's value, and numbers in range.

    Args:
        value: the value in the checkpoint.
        reference: the value of the new object.
        key: path of the value in the checkpoint, for error messages.
        known: whether the object's class is PyTorch's, Lightning's or this library's; their states never have more keys
            than that of a new object.
        owner: a scheduler whose attributes are set from the keys, if any.

    Raises:
        InputError: the value does not fit.
    """
    if isinstance(reference, Mapping):
        _check_mapping(value, reference, key, known, owner)
    elif isinstance(reference, list | tuple):
        may_be_longer = not reference and not known
        is_list = isinstance(value, list | tuple) and (may_be_longer or len(value) == len(reference))
        require(is_list, key, value, f"a list of {len(reference)} values")
        for i, part in enumerate(reference):
            check_like(value[i], part, f"{key}[{i}]", known)
    elif isinstance(reference, bool):
        require(isinstance(value, bool), key, value, "true or false")
    elif isinstance(reference, Tensor) or (isinstance(value, Tensor) and isinstance(reference, float)):
        is_number = isinstance(value, Tensor) and is_dense(value) and value.numel() == 1 and not value.is_complex()
        require(is_number, key, value, "one number")
        _check_range(value.item(), reference.item() if isinstance(reference, Tensor) else reference, key)
    elif isinstance(reference, int | float):
        require(isinstance(value, int | float) and not isinstance(value, bool), key, value, "a number")
        may_be_float = isinstance(reference, float) or _name(key) in (*_NON_NEGATIVE, *_FRACTIONS)
        require(may_be_float or isinstance(value, int), key, value, "a whole number")
        _check_range(value, reference, key)
    elif known or reference is not None:
        require(value is reference or value == reference, key, value, f"{shorten(reference)}, as this run has")


def _check_mapping(value: Any, reference: Mapping[Any, Any], key: str, known: bool, owner: object) -> None:
    require(isinstance(value, dict), key, value, "a mapping")
    for name, part in value.items():
        if name in reference:
            check_like(part, reference[name], f"{key}.{name}", known)
        else:
            is_allowed = not known and isinstance(name, str) and not hasattr(owner, name)
            require(is_allowed, f"a key of {key}", name, shorten(sorted(map(str, reference)), 300))
    for name, part in reference.items():
        if name not in value and part is not None and not isinstance(part, bool):
            raise InputError(f"{key}.{name} is missing", key=f"{key}.{name}")


def _check_range(value: float, reference: float, key: str) -> None:
    """Check that a number is finite, unless the new object's is infinite too, and in the range of its key."""
    name = _name(key)
    is_infinite_too = value == reference or (math.isinf(reference) and value == -reference)
    require(is_finite(value) or is_infinite_too, key, value, "a finite number")
    require(name not in _RATES or value <= _MAX_RATE, key, value, f"at most {_MAX_RATE:g}")
    require(not isinstance(reference, int) or abs(value) < _MAX_COUNT, key, value, f"at most {_MAX_COUNT}")
    is_signed = name not in (*_NON_NEGATIVE, *_FRACTIONS) and not key.startswith("loops.")
    require(is_signed or not value < 0 <= reference, key, value, "at least 0")
    require(name not in _FRACTIONS or not value >= 1 > reference, key, value, "below 1")


def _name(key: str) -> str:
    """Return the last key of a path, without indices: ``param_groups[0].betas[1]`` -> ``betas``."""
    return key.rpartition(".")[2].partition("[")[0]


def is_finite(value: float) -> bool:
    """Return whether a number is finite as a floating-point number."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False
