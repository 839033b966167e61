"""Comparison of plain values in a checkpoint with those of the objects that will load them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gpt2_pl.errors import shorten
from gpt2_pl.tasks.checkpoint import is_dense

_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "min_lrs", "_last_lr", "lr_scale")
_NON_NEGATIVE = (*_RATES, "eps", "weight_decay", "lr_decay", "alpha", "last_epoch", "_step_count", "T_cur", "T_i")
_FRACTIONS = ("betas", "momentum", "dampening")  # in [0, 1)
_MAX_RATE = 1e6
_MAX_COUNT = 2**53  # Larger integers are not exact as floating-point numbers.


class StateError(Exception):
    """Value that does not fit the object that would load it, or a missing value.

    Args:
        key: path of the value in the checkpoint.
        expected: the expected value; None if the value is missing.
        value: the value in the checkpoint.
    """

    def __init__(self, key: str, expected: str | None = None, value: Any = None) -> None:
        super().__init__(f"{key} is missing" if expected is None else f"{key} must be {expected}, got {shorten(value)}")


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
        StateError: the value does not fit.
    """
    if isinstance(reference, Mapping):
        _check_mapping(value, reference, key, known, owner)
    elif isinstance(reference, list | tuple):
        if not isinstance(value, list | tuple) or (len(value) != len(reference) and (reference or known)):
            raise StateError(key, f"a list of {len(reference)} values", value)
        for i, part in enumerate(reference):
            check_like(value[i], part, f"{key}[{i}]", known)
    elif isinstance(reference, bool):
        if not isinstance(value, bool):
            raise StateError(key, "true or false", value)
    elif isinstance(reference, Tensor) or (isinstance(value, Tensor) and isinstance(reference, float)):
        _check_scalar_tensor(value, reference, key)
    elif isinstance(reference, int | float):
        _check_scalar(value, reference, key)
    elif value is not reference and (known or reference is not None) and value != reference:
        raise StateError(key, f"{shorten(reference)}, as this run has", value)


def _check_mapping(value: Any, reference: Mapping[Any, Any], key: str, known: bool, owner: object) -> None:
    if not isinstance(value, dict):
        raise StateError(key, "a mapping", value)
    for name, part in value.items():
        if name in reference:
            check_like(part, reference[name], f"{key}.{name}", known)
        elif known or not isinstance(name, str) or hasattr(owner, name):
            raise StateError(f"a key of {key}", shorten(sorted(map(str, reference)), 300), name)
    for name, part in reference.items():
        if name not in value and part is not None and not isinstance(part, bool):
            raise StateError(f"{key}.{name}")


def _check_scalar_tensor(value: Any, reference: Any, key: str) -> None:
    if not isinstance(value, Tensor) or not is_dense(value) or value.numel() != 1 or value.is_complex():
        raise StateError(key, "one number", value)
    _check_range(value.item(), reference.item() if isinstance(reference, Tensor) else reference, key)


def _check_scalar(value: Any, reference: float, key: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StateError(key, "a number", value)
    may_be_float = isinstance(reference, float) or _name(key) in (*_NON_NEGATIVE, *_FRACTIONS)
    if not may_be_float and not isinstance(value, int):
        raise StateError(key, "a whole number", value)
    _check_range(value, reference, key)


def _check_range(value: float, reference: float, key: str) -> None:
    """Check that a number is finite, unless the new object's is infinite too, and in the range of its key."""
    name = _name(key)
    if not is_finite(value) and not (value == reference or (math.isinf(reference) and value == -reference)):
        raise StateError(key, "a finite number", value)
    if name in _RATES and value > _MAX_RATE:
        raise StateError(key, f"at most {_MAX_RATE:g}", value)
    if isinstance(reference, int) and abs(value) >= _MAX_COUNT:
        raise StateError(key, f"at most {_MAX_COUNT}", value)
    if value < 0 <= reference and (name in (*_NON_NEGATIVE, *_FRACTIONS) or key.startswith("loops.")):
        raise StateError(key, "at least 0", value)
    if name in _FRACTIONS and value >= 1 > reference:
        raise StateError(key, "below 1", value)


def _name(key: str) -> str:
    """Return the last key of a path, without indices: ``param_groups[0].betas[1]`` -> ``betas``."""
    return key.rpartition(".")[2].partition("[")[0]


def is_finite(value: float) -> bool:
    """Return whether a number is finite as a floating-point number."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False
