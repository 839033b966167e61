"""Check of the states of optimizers, schedulers and loops in a checkpoint, before these load them.

A fused optimizer reads the memory of its state without checking shapes: a state tensor that is too short crashes the
process. The keys and types of the options are compared with ``state_dict()`` of the new optimizer. The layout of the
state of a parameter exists only after a step; it is found by a step of a copy of the optimizer over tiny parameters.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2_pl.errors import InputError, printable, require, shorten
from gpt2_pl.tasks.checkpoint import is_dense

_SIZES = (3, 5, 7, 11, 13, 17)  # shape of tiny parameters; a dimension is recognized by its size
_IMPLEMENTATION_OPTIONS = {"foreach", "fused", "capturable", "differentiable"}  # They do not change the result.
_ALGORITHM_OPTIONS = {"maximize", "amsgrad", "nesterov", "centered", "decoupled_weight_decay"}
_NON_NEGATIVE_STATES = (  # states whose square root is taken, and counts
    *("step", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta", "step_size"),
    *("row_var", "col_var", "variance"),
)

_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "min_lrs", "_last_lr", "lr_scale")
_NON_NEGATIVE = (*_RATES, "eps", "weight_decay", "lr_decay", "alpha", "last_epoch", "_step_count", "T_cur", "T_i")
_FRACTIONS = ("betas", "momentum", "dampening")  # in [0, 1)
_MAX_RATE = 1e6
_MAX_COUNT = 2**53  # Larger integers are not exact as floating-point numbers.

Layouts = dict[tuple[int, int], dict[str, Any] | None]


def is_known(part: object) -> bool:
    """Return whether the class of an optimizer or scheduler is PyTorch's or this library's.

    The states of such objects never have other keys than those of a new object.
    """
    return type(part).__module__.startswith(("torch.optim", "gpt2_pl."))


def check_optimizer(state: Any, optimizer: Optimizer, key: str) -> None:
    """Check that a state fits an optimizer.

    Options that only choose the implementation of a step (``fused``, ``foreach`` ...) are replaced in ``state`` by
    those of the optimizer, and missing options are added.

    Args:
        state: the optimizer's state in a checkpoint.
        optimizer: the new optimizer.
        key: path of the state in the checkpoint, for error messages.

    Raises:
        InputError: the state does not fit.
    """
    known, reference = is_known(optimizer), optimizer.state_dict()
    require(isinstance(state, dict), key, state, "a mapping")
    for name in state:
        require(name in reference or not known, f"a key of {key}", name, "state or param_groups")
    groups, states, n_groups = state.get("param_groups"), state.get("state"), len(optimizer.param_groups)
    is_complete = isinstance(groups, list) and len(groups) == n_groups
    require(is_complete, f"{key}.param_groups", groups, f"a list of {n_groups} groups, as this run has")
    require(isinstance(states, dict), f"{key}.state", states, "a mapping")
    for i, own_group in enumerate(reference["param_groups"]):
        _check_group(groups[i], own_group, f"{key}.param_groups[{i}]", known)
    _check_states(states, optimizer, f"{key}.state", known)


def _check_group(group: Any, reference: dict[str, Any], key: str, known: bool) -> None:
    """Check the options of a parameter group, and set those that choose the implementation."""
    require(isinstance(group, dict), key, group, "a mapping")
    numbers, expected = group.get("params"), f"{shorten(reference['params'])}, as this run has"
    is_list = isinstance(numbers, list) and all(type(number) is int for number in numbers)
    require(is_list and numbers == reference["params"], f"{key}.params", numbers, expected)
    for option in _IMPLEMENTATION_OPTIONS & reference.keys():
        group[option] = reference[option]
    for option in _ALGORITHM_OPTIONS & reference.keys() & group.keys():
        expected = f"{reference[option]}, as the optimizer is configured"
        require(group[option] is reference[option], f"{key}.{option}", group[option], expected)
    check_like(group, reference, key, known)
    group.update({name: reference[name] for name in reference if name not in group})  # options of a newer PyTorch


def _check_states(states: dict[Any, Any], optimizer: Optimizer, key: str, known: bool) -> None:
    """Check the states of all parameters."""
    parameters: dict[int, tuple[int, Tensor]] = {}  # number of a parameter -> its group and the parameter
    groups = zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True)
    for i, (group, numbered) in enumerate(groups):
        parameters.update({n: (i, p) for n, p in zip(numbered["params"], group["params"], strict=True)})
    layouts = state_layouts(optimizer) if known else None
    for number, state in states.items():
        if type(number) is int and number in parameters:
            i, parameter = parameters[number]
            layout = None if layouts is None else layouts[i, parameter.dim()]
            _check_parameter_state(state, layout, parameter, f"{key}[{shorten(number)}]", known)
        else:
            require(not known, f"a key of {key}", number, f"the number of one of {len(parameters)} parameters")


def _check_parameter_state(state: Any, layout: dict[str, Any] | None, parameter: Tensor, key: str, known: bool) -> None:
    """Check the state of one parameter; ``layout`` is that of a tiny parameter, if it is known."""
    require(isinstance(state, dict), key, state, "a mapping")
    if layout is not None and state:
        names = sorted(map(str, state))
        require(state.keys() == layout.keys(), f"the keys of {key}", names, shorten(sorted(layout)))
    for name, value in state.items():
        _check_state_value(value, parameter, f"{key}.{printable(str(name)[:80])}", str(name), known)
        if layout is not None:
            _check_layout(value, layout[name], parameter, f"{key}.{name}")


def state_layouts(optimizer: Optimizer) -> Layouts:
    """Find the layout of the state of a parameter by a step of a copy of the optimizer over tiny parameters.

    Returns:
        The state of a tiny parameter, by its group and number of dimensions; None for all if the step fails.
    """
    twin = copy.copy(optimizer)
    twin.state, groups = defaultdict(dict), []
    tiny: dict[tuple[int, int], nn.Parameter] = {}
    for i, group in enumerate(optimizer.param_groups):
        for n in sorted({parameter.dim() for parameter in group["params"]}):
            tiny[i, n] = nn.Parameter(torch.zeros(_SIZES[:n]))
            tiny[i, n].grad = torch.zeros(_SIZES[:n])
        # The implementations for other devices do not run on the CPU.
        options = {option: False for option in _IMPLEMENTATION_OPTIONS if option in group}
        groups.append({**group, **options, "params": [p for (j, _), p in tiny.items() if j == i]})
    twin.param_groups = groups
    try:
        twin.step()
    except Exception:  # The optimizer needs a closure, or its rate is a tensor on another device.
        return dict.fromkeys(tiny)
    return {key: dict(twin.state[parameter]) for key, parameter in tiny.items()}


def _check_layout(value: Any, reference: Any, parameter: Tensor, key: str) -> None:
    """Check a value of the state of a parameter against that of a tiny parameter with as many dimensions."""
    if not isinstance(reference, Tensor):
        check_like(value, reference, key, True)
    elif reference.dim() or not isinstance(value, int | float):
        sizes = dict(zip(_SIZES, parameter.shape, strict=False))
        shape = tuple(sizes.get(size, size) for size in reference.shape)
        is_alike = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
        require(is_alike, key, value, f"a floating-point tensor of shape {shape}")


def _check_state_value(value: Any, parameter: Tensor, key: str, name: str, known: bool) -> None:
    """Check the type and range of a value of the state of a parameter."""
    if isinstance(value, Tensor):
        _check_state_tensor(value, parameter, key, name, known)
    elif isinstance(value, list | tuple) and not known:
        for i, item in enumerate(value):
            _check_state_value(item, parameter, f"{key}[{i}]", name, known)
    elif isinstance(value, bool | int | float):
        is_signed = name not in _NON_NEGATIVE_STATES
        expected = "a finite number" if is_signed else "a finite number of at least 0"
        require(is_finite(value) and (is_signed or value >= 0), key, value, expected)
    else:
        require(value is None or (not known and isinstance(value, str | dict)), key, value, "a tensor or a number")


def _check_state_tensor(value: Tensor, parameter: Tensor, key: str, name: str, known: bool) -> None:
    """Check the memory, shape and numbers of a tensor of the state of a parameter."""
    require(is_dense(value), key, value, "a dense tensor")
    fits = value.shape in ((), parameter.shape) or value.numel() <= parameter.numel()
    require(fits or not known, key, value, f"a tensor of shape {tuple(parameter.shape)}")
    require(value.is_contiguous() or value.stride() == parameter.stride(), key, value, "a contiguous tensor")
    require(parameter.is_complex() or not value.is_complex(), key, value, "real")
    require(bool(value.isfinite().all()), key, value, "finite")
    if name in _NON_NEGATIVE_STATES and value.numel():
        require(bool((value >= 0).all()), key, value, "at least 0")


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
    require(name not in (*_RATES, "weight_decay") or value <= _MAX_RATE, key, value, f"at most {_MAX_RATE:g}")
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
