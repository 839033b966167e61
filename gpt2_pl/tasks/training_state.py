"""Compare the training state of a checkpoint with the optimizers, schedulers and loops that it is about to enter.

A fused optimizer reads the memory of its state without looking at shapes: a state tensor that is too short ends the
process. What an optimizer, a scheduler or a loop says of itself before it is restored (``state_dict()``) shows which
keys it has and of which kind each value is; nothing else is let through. The layout of an optimizer's state, which only
exists after a step, is found by a step of a copy over tiny parameters.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2_pl.errors import InputError, printable, shorten
from gpt2_pl.tasks.checkpoint import is_dense

_SIZES = (3, 5, 7, 11, 13, 17)  # of tiny parameters: each dimension is recognised by its size
_SWITCHES = ("foreach", "fused", "capturable", "differentiable")  # how a step is computed: this machine's to say
_MEANINGS = ("maximize", "amsgrad", "nesterov", "centered", "decoupled_weight_decay")  # what a step is
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "min_lrs", "_last_lr", "lr_scale")
_NOT_NEGATIVE = (*_RATES, "eps", "weight_decay", "lr_decay", "alpha", "last_epoch", "_step_count", "T_cur", "T_i")
_FRACTIONS = ("betas", "momentum", "dampening")
_SQUARES = (  # state tensors of which a root is taken
    *("step", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta", "step_size"),
    *("row_var", "col_var", "variance"),
)
_LARGEST_RATE = 1e6
_LARGEST_COUNT = 2**53


class _Unfit(Exception):
    """A value is not what it must be, or is missing where nothing is expected."""

    def __init__(self, key: str, expected: str | None = None, value: Any = None) -> None:
        super().__init__(f"{key} is missing" if expected is None else f"{key} must be {expected}, got {shorten(value)}")


def check_training_state(checkpoint: dict[str, Any], trainer: Any, where: str) -> None:
    """Refuse optimizer and scheduler states that do not fit the trainer's optimizers and schedulers.

    Switches that only say how a step is computed (``fused``, ``foreach`` ...) are replaced in the checkpoint by those
    of the configured optimizer.

    Args:
        checkpoint: the content of a checkpoint.
        trainer: Lightning's, with its optimizers.
        where: the beginning of the message.

    Raises:
        InputError: naming the key, its value, and what it must be.
    """
    optimizers, schedulers = trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
    try:
        for key, found, present in (
            ("optimizer_states", checkpoint.get("optimizer_states"), optimizers),
            ("lr_schedulers", checkpoint.get("lr_schedulers"), schedulers),
        ):
            if found is None and present:
                raise _Unfit(f"{key} (the checkpoint holds a model alone, from which no training goes on)")
            if not isinstance(found, list) or len(found) != len(present):
                raise _Unfit(key, f"a list of {len(present)}, as this run has", found)
        for i, optimizer in enumerate(optimizers):
            _check_optimizer(checkpoint["optimizer_states"][i], optimizer, f"optimizer_states[{i}]")
        for i, scheduler in enumerate(schedulers):
            own = _is_known(scheduler)
            _check_like(checkpoint["lr_schedulers"][i], scheduler.state_dict(), f"lr_schedulers[{i}]", own, scheduler)
    except _Unfit as error:
        raise InputError(f"{where}: {error}") from None


def check_progress(checkpoint: dict[str, Any], trainer: Any, where: str) -> None:
    """Refuse progress of loops, and a state of the precision plugin, that do not fit the trainer's.

    Args:
        checkpoint: the content of a checkpoint.
        trainer: Lightning's.
        where: the beginning of the message.

    Raises:
        InputError: naming the key, its value, and what it must be.
    """
    name = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}.get(
        str(getattr(trainer.state.fn, "value", ""))
    )
    try:
        if name is not None and (loops := checkpoint.get("loops")) is not None:
            if not isinstance(loops, dict) or name not in loops:
                raise _Unfit(f"loops.{name}", "a mapping", loops)
            found, fresh = loops[name], getattr(trainer, name).state_dict()
            if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):  # loaders that keep a state
                found = {
                    **found,
                    "state_dict": {k: v for k, v in found["state_dict"].items() if k != "combined_loader"},
                }
            _check_like(found, fresh, f"loops.{name}", True)
            _check_counts(found, f"loops.{name}")
        plugin = trainer.precision_plugin
        key = type(plugin).__qualname__
        if key in checkpoint:
            _check_like(checkpoint[key], plugin.state_dict(), key, True)
    except _Unfit as error:
        raise InputError(f"{where}: {error}") from None


def _check_counts(found: dict[str, Any], key: str) -> None:
    """Refuse progress in which more is completed than was begun, or more now than in all."""
    order = [found[name] for name in ("ready", "started", "processed", "completed") if name in found]
    if any(later > earlier for earlier, later in pairwise(order)):
        raise _Unfit(key, "counts of which none exceeds the one before it", found)
    for name, value in found.items():
        if isinstance(value, dict):
            _check_counts(value, f"{key}.{name}")
    total, current = found.get("total"), found.get("current")
    # Lightning counts validation anew in every epoch: in total at once, and in current only when validation begins.
    if isinstance(total, dict) and isinstance(current, dict) and not key.endswith(".val_loop.batch_progress"):
        for name, count in current.items():
            if count > total.get(name, count):
                raise _Unfit(f"{key}.current.{name}", f"at most {total[name]}, its total", count)


def _is_known(part: object) -> bool:
    """Whether an optimizer or a scheduler is PyTorch's or ours, which have no keys but those they begin with."""
    return type(part).__module__.startswith(("torch.optim", "gpt2_pl."))


# Optimizers


def _check_optimizer(found: Any, optimizer: Optimizer, key: str) -> None:
    known, fresh = _is_known(optimizer), optimizer.state_dict()
    if not isinstance(found, dict):
        raise _Unfit(key, "a mapping", found)
    for name in found:
        if name not in fresh and known:
            raise _Unfit(f"a key of {key}", "state or param_groups", name)
    groups, states = found.get("param_groups"), found.get("state")
    if not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        raise _Unfit(f"{key}.param_groups", f"a list of {len(optimizer.param_groups)} groups, as this run has", groups)
    if not isinstance(states, dict):
        raise _Unfit(f"{key}.state", "a mapping", states)
    parameters: dict[int, tuple[int, Tensor]] = {}  # number -> group, parameter
    for i, (group, own) in enumerate(zip(optimizer.param_groups, fresh["param_groups"], strict=True)):
        name = f"{key}.param_groups[{i}]"
        if not isinstance(groups[i], dict):
            raise _Unfit(name, "a mapping", groups[i])
        if list(_plain(groups[i].get("params"))) != own["params"]:
            raise _Unfit(f"{name}.params", f"{shorten(own['params'])}, as this run has", groups[i].get("params"))
        for switch in _SWITCHES:
            if switch in own:
                groups[i][switch] = own[switch]
        for meaning in _MEANINGS:
            if meaning in own and groups[i].get(meaning, own[meaning]) is not own[meaning]:
                raise _Unfit(f"{name}.{meaning}", f"{own[meaning]}, as the optimizer is configured", groups[i][meaning])
        _check_like(groups[i], own, name, known)
        groups[i].update({part: own[part] for part in own if part not in groups[i]})  # switches of a newer PyTorch
        parameters.update({number: (i, p) for number, p in zip(own["params"], group["params"], strict=True)})
    layouts = _layouts(optimizer) if known else None
    for number, state in states.items():
        name = f"{key}.state[{shorten(number)}]"
        if isinstance(number, bool) or not isinstance(number, int) or number not in parameters:
            if known:
                raise _Unfit(f"a key of {key}.state", f"the number of one of {len(parameters)} parameters", number)
            continue
        group_number, parameter = parameters[number]
        if not isinstance(state, dict):
            raise _Unfit(name, "a mapping", state)
        layout = None if layouts is None else layouts[group_number, parameter.dim()]
        if layout is not None and state and state.keys() != layout.keys():
            raise _Unfit(f"the keys of {name}", f"{shorten(sorted(layout))}", sorted(map(str, state)))
        for part, value in state.items():
            _check_state(value, parameter, f"{name}.{printable(str(part)[:80])}", str(part), known)
            if layout is not None:
                _check_layout(value, layout[part], parameter, f"{name}.{part}")


def _plain(value: Any) -> list[Any]:
    """A list of whole numbers; nothing of anything else."""
    good = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    return value if good else [None]


def _layouts(optimizer: Optimizer) -> dict[tuple[int, int], dict[str, Any] | None]:
    """What the optimizer keeps of a parameter, by its group and number of dimensions; None where a try fails."""
    twin = copy.copy(optimizer)
    twin.state, groups = defaultdict(dict), []
    tiny: dict[tuple[int, int], nn.Parameter] = {}
    for i, group in enumerate(optimizer.param_groups):
        for n in sorted({parameter.dim() for parameter in group["params"]}):
            tiny[i, n] = nn.Parameter(torch.zeros(_SIZES[:n]))
            tiny[i, n].grad = torch.zeros(_SIZES[:n])
        switches = {switch: False for switch in _SWITCHES if switch in group}  # others are for other devices
        groups.append({**group, **switches, "params": [p for (j, _), p in tiny.items() if j == i]})
    twin.param_groups = groups
    try:
        twin.step()
    except Exception:  # a closure is needed, or a rate lies on another device
        return dict.fromkeys(tiny)
    return {key: dict(twin.state[parameter]) for key, parameter in tiny.items()}


def _check_layout(value: Any, own: Any, parameter: Tensor, key: str) -> None:
    """Compare a value of an optimizer's state with that of a tiny parameter of as many dimensions."""
    if not isinstance(own, Tensor):
        _check_like(value, own, key, True)
        return
    sizes = dict(zip(_SIZES, parameter.shape, strict=False))
    shape = tuple(sizes.get(size, size) for size in own.shape)
    if own.dim() == 0 and isinstance(value, int | float):
        return
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        raise _Unfit(key, f"a floating-point tensor of shape {shape}", value)


def _check_state(value: Any, parameter: Tensor, key: str, name: str, known: bool) -> None:
    """Refuse a value that no optimizer keeps of a parameter, and tensors whose memory is not what they say."""
    if isinstance(value, Tensor):
        if not is_dense(value):
            raise _Unfit(key, "a dense tensor", value)
        if known and tuple(value.shape) not in ((), tuple(parameter.shape)) and value.numel() > parameter.numel():
            raise _Unfit(key, f"a tensor of shape {tuple(parameter.shape)}", value)
        if not (value.is_contiguous() or value.stride() == parameter.stride()):
            raise _Unfit(key, "a contiguous tensor", value)
        if value.is_complex() and not parameter.is_complex():
            raise _Unfit(key, "real", value)
        if not bool(value.isfinite().all()):
            raise _Unfit(key, "finite", value)
        if name in _SQUARES and value.numel() and bool((value < 0).any()):
            raise _Unfit(key, "at least 0", value)
    elif isinstance(value, list | tuple) and not known:
        for i, one in enumerate(value):
            _check_state(one, parameter, f"{key}[{i}]", name, known)
    elif isinstance(value, bool | int | float):
        if not _is_finite(value) or (name in _SQUARES and value < 0):
            raise _Unfit(key, "a finite number of at least 0" if name in _SQUARES else "a finite number", value)
    elif value is not None and (known or not isinstance(value, str | dict)):
        raise _Unfit(key, "a tensor or a number", value)


# Plain values


def _check_like(found: Any, own: Any, key: str, known: bool, owner: object = None) -> None:
    """Compare a value with that of a fresh object: the same keys, lengths and kinds; numbers finite and in range.

    Args:
        found: the checkpoint's.
        own: the object's own.
        key: the path of the value.
        known: whether the object is PyTorch's, Lightning's or ours, which never have more than they begin with.
        owner: a scheduler, whose attributes the keys become.
    """
    name = key.rpartition(".")[2].partition("[")[0]
    if isinstance(own, Mapping):
        if not isinstance(found, dict):
            raise _Unfit(key, "a mapping", found)
        for part, value in found.items():
            if part in own:
                _check_like(value, own[part], f"{key}.{part}", known)
            elif known or not isinstance(part, str) or hasattr(owner, part):
                raise _Unfit(f"a key of {key}", shorten(sorted(map(str, own)), 300), part)
        for part in own:
            if part not in found and own[part] is not None and not isinstance(own[part], bool):
                raise _Unfit(f"{key}.{part}")
    elif isinstance(own, list | tuple):
        if not isinstance(found, list | tuple) or (len(found) != len(own) and (own or known)):
            raise _Unfit(key, f"a list of {len(own)} values", found)
        for i, one in enumerate(own):
            _check_like(found[i], one, f"{key}[{i}]", known)
    elif isinstance(own, bool):
        if not isinstance(found, bool):
            raise _Unfit(key, "true or false", found)
    elif isinstance(own, Tensor) or (isinstance(found, Tensor) and isinstance(own, float)):
        if not isinstance(found, Tensor) or not is_dense(found) or found.numel() != 1 or found.is_complex():
            raise _Unfit(key, "one number", found)
        _check_number(found.item(), own.item() if isinstance(own, Tensor) else own, key, name)
    elif isinstance(own, int | float):
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise _Unfit(key, "a number", found)
        if isinstance(own, int) and not isinstance(found, int) and name not in (*_RATES, *_NOT_NEGATIVE, *_FRACTIONS):
            raise _Unfit(key, "a whole number", found)
        _check_number(found, own, key, name)
    elif found is not own and (known or own is not None) and found != own:
        raise _Unfit(key, f"{shorten(own)}, as this run has", found)


def _check_number(found: float, own: float, key: str, name: str) -> None:
    if not _is_finite(found) and not (found == own or (math.isinf(own) and found == -own)):
        raise _Unfit(key, "a finite number", found)
    if name in _RATES and found > _LARGEST_RATE:
        raise _Unfit(key, f"at most {_LARGEST_RATE:g}", found)
    if isinstance(own, int) and abs(found) >= _LARGEST_COUNT:
        raise _Unfit(key, f"at most {_LARGEST_COUNT}", found)
    if found < 0 <= own and (name in (*_NOT_NEGATIVE, *_FRACTIONS) or key.startswith("loops.")):
        raise _Unfit(key, "at least 0", found)
    if name in _FRACTIONS and found >= 1 > own:
        raise _Unfit(key, "below 1", found)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floating-point numbers
        return False
