"""Check of the training state in a checkpoint, before optimizers, schedulers and loops load it.

The state of a new optimizer, scheduler or loop (``state_dict()``) defines the valid keys, the type of each value and
the shape of each tensor; everything else is rejected. A fused optimizer reads the memory of its state without checking
shapes: a state tensor that is too short would crash the process. The state of a parameter exists only after a step;
its layout is found by a step of a copy of the optimizer over parameters without memory (on the meta device).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2_pl.errors import InputError, printable, require, shorten
from gpt2_pl.tasks.checkpoint import is_dense

_SWITCHES = ("foreach", "fused", "capturable", "differentiable")  # They do not change the result of a step.
_UNCHECKED = (*_SWITCHES, "combined_loader")  # The last is the state of dataloaders.
# Options that must be those of the run.
_FIXED = {"params", "maximize", "amsgrad", "nesterov", "centered", "decoupled_weight_decay"}
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "min_lrs", "_last_lr", "lr_scale")
_LIMITS = {**dict.fromkeys((*_RATES, "weight_decay"), 1e6), **dict.fromkeys(("betas", "momentum", "dampening"), 1.0)}
_NON_NEGATIVE = {
    *_LIMITS,
    *("eps", "lr_decay", "alpha", "last_epoch", "_step_count", "T_cur", "T_i"),
    # States whose square root is taken, and counts.
    *("step", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta", "step_size"),
    *("row_var", "col_var", "variance"),
}
_MAX_COUNT = 2**53  # Larger integers are not exact as floating-point numbers.
_MAX_NUMBER = 1e300


@contextmanager
def _named(trainer: Any) -> Iterator[None]:
    """Add the path of the checkpoint to the errors of a check."""
    try:
        yield
    except InputError as error:
        source = f"ckpt_path: {trainer.ckpt_path}"
        raise InputError(error, key=error.key, value=error.value, expected=error.expected, source=source) from None


def check_training_state(checkpoint: dict[str, Any], trainer: Any) -> None:
    """Reject optimizer and scheduler states that do not fit the trainer's optimizers and schedulers.

    Options that only choose the implementation of a step (``fused``, ``foreach`` ...) are replaced in the checkpoint by
    those of the configured optimizer.

    Args:
        checkpoint: content of a checkpoint.
        trainer: Lightning's trainer, with its optimizers.

    Raises:
        InputError: naming the key, its value and the expected value.
    """
    optimizers, schedulers = trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
    with _named(trainer):
        for key, present in (("optimizer_states", optimizers), ("lr_schedulers", schedulers)):
            states = checkpoint.get(key)
            if states is None and present:
                reason = "the checkpoint holds a model alone, from which training cannot resume"
                raise InputError(f"{key} ({reason}) is missing", key=key)
            is_complete = isinstance(states, list) and len(states) == len(present)
            require(is_complete, key, states, f"a list of {len(present)}, as this run has")
        for i, optimizer in enumerate(optimizers):
            _check_optimizer(checkpoint["optimizer_states"][i], optimizer, f"optimizer_states[{i}]")
        for i, scheduler in enumerate(schedulers):
            state, reference = checkpoint["lr_schedulers"][i], scheduler.state_dict()
            _check_like(state, reference, f"lr_schedulers[{i}]", _is_known(scheduler))


def check_progress(checkpoint: dict[str, Any], trainer: Any) -> None:
    """Reject states of loops and of the precision plugin that do not fit the trainer's.

    Args:
        checkpoint: content of a checkpoint.
        trainer: Lightning's trainer.

    Raises:
        InputError: naming the key, its value and the expected value.
    """
    plugin, loops = trainer.precision_plugin, checkpoint.get("loops")
    with _named(trainer):
        if trainer.state.fn is not None and loops is not None:
            name = f"{trainer.state.fn.value}_loop"
            require(isinstance(loops, dict) and name in loops, f"loops.{name}", loops, "a mapping")
            _check_like(loops[name], getattr(trainer, name).state_dict(), f"loops.{name}", True)
            _check_counts(loops[name], f"loops.{name}")
        if (key := type(plugin).__qualname__) in checkpoint:
            _check_like(checkpoint[key], plugin.state_dict(), key, True)


def _check_counts(progress: dict[str, Any], key: str) -> None:
    """Reject progress with more completed than started batches."""
    counts = [progress[name] for name in ("ready", "started", "processed", "completed") if name in progress]
    is_ordered = counts == sorted(counts, reverse=True)
    require(is_ordered, key, progress, "non-increasing counts from ready to completed")
    for name, value in progress.items():
        if isinstance(value, dict) and name not in _UNCHECKED:
            _check_counts(value, f"{key}.{name}")


def _is_known(part: object) -> bool:
    """Return whether the class of an optimizer or scheduler is PyTorch's or this library's.

    The states of such objects never have other keys than those of a new object.
    """
    return type(part).__module__.startswith(("torch.optim", "gpt2_pl."))


def _check_optimizer(state: Any, optimizer: Optimizer, key: str) -> None:
    """Check that a state fits an optimizer, and set the options that choose the implementation of a step."""
    reference = optimizer.state_dict()
    layouts = state_layouts(optimizer) if _is_known(optimizer) else {}
    states: Any = state.get("state") if isinstance(state, dict) else None
    require(isinstance(states, dict), f"{key}.state", states, "a mapping")
    # A parameter has no state before its first update.
    reference["state"] = {number: layout for number, layout in layouts.items() if number in states}
    _check_like(state, reference, key, known=bool(layouts))
    for i, own in enumerate(reference["param_groups"]):
        group = state["param_groups"][i]
        for name in _FIXED & own.keys() & group.keys():
            expected = f"{shorten(own[name])}, as this run has"
            require(group[name] == own[name], f"{key}.param_groups[{i}].{name}", group[name], expected)
        # A newer PyTorch may have more options.
        group.update({name: value for name, value in own.items() if name in _SWITCHES or name not in group})


def state_layouts(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """Find the layout of the state of every parameter by a step of a copy of the optimizer on the meta device.

    Returns:
        The state after a step, by the parameter's number; empty for an optimizer that needs a closure.
    """
    twin, groups = copy.copy(optimizer), []
    twin.state = defaultdict(dict)
    for group in optimizer.param_groups:
        like = (torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta") for p in group["params"])
        parameters = [nn.Parameter(tensor) for tensor in like]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        groups.append({**group, **dict.fromkeys(_SWITCHES & group.keys(), False), "params": parameters})
    for group in groups:
        twin.param_groups = [group]
        with suppress(Exception):  # Some optimizers read a value after they have created the state.
            twin.step()
    twin.param_groups = groups
    return twin.state_dict()["state"]


def _check_like(value: Any, reference: Any, key: str, known: bool) -> None:
    """Check that a value has the keys, lengths and types of a new object's value, and numbers in range.

    Args:
        value: the value in the checkpoint.
        reference: the value of the new object.
        key: path of the value in the checkpoint, for error messages.
        known: whether the object's class is PyTorch's, Lightning's or this library's; the states of other objects may
            have more keys than that of a new object.

    Raises:
        InputError: the value does not fit.
    """
    if isinstance(reference, Mapping):
        _check_mapping(value, reference, key, known)
    elif isinstance(reference, list | tuple):
        may_be_longer = not reference and not known
        is_list = isinstance(value, list | tuple) and (may_be_longer or len(value) == len(reference))
        require(is_list, key, value, f"a list of {len(reference)} values")
        for i, part in enumerate(reference):
            _check_like(value[i], part, f"{key}[{i}]", known)
    elif isinstance(reference, Tensor) or (isinstance(value, Tensor) and isinstance(reference, float)):
        _check_tensor(value, torch.as_tensor(reference), key)
    elif isinstance(reference, bool):
        require(isinstance(value, bool), key, value, "true or false")
    elif isinstance(reference, int | float):
        _check_number(value, reference, key)
    elif known or reference is not None:
        require(value is reference or value == reference, key, value, f"{shorten(reference)}, as this run has")


def _check_mapping(value: Any, reference: Mapping[Any, Any], key: str, known: bool) -> None:
    require(isinstance(value, dict), key, value, "a mapping")
    for name, part in value.items():
        inner = f"{key}[{name}]" if isinstance(name, int) else f"{key}.{printable(str(name)[:80])}"
        if name not in reference:
            require(not known, f"a key of {key}", name, ", ".join(sorted(map(str, reference))))
            _check_like(part, part, inner, known)  # Only the memory and the range of its numbers are checked.
        elif name not in _UNCHECKED:
            _check_like(part, reference[name], inner, known)
    for name, part in reference.items():
        if name not in value and part is not None and not isinstance(part, bool):
            raise InputError(f"{key}.{name} is missing", key=f"{key}.{name}")


def _check_tensor(value: Any, reference: Tensor, key: str) -> None:
    """Check the shape, the memory and the numbers of a tensor; ``reference`` may be on the meta device."""
    shape = tuple(reference.shape)
    is_alike = isinstance(value, Tensor) and tuple(value.shape) == shape and is_dense(value) and not value.is_complex()
    is_alike = is_alike and value.is_floating_point() == reference.is_floating_point()
    is_alike = is_alike and (value.is_contiguous() or value.stride() == reference.stride())
    kind = "real" if reference.is_floating_point() else "integer"
    require(is_alike, key, value, f"a dense {kind} tensor of shape {shape}")
    for extreme in (value.amin(), value.amax()) if value.numel() else ():
        _check_range(extreme.item(), 0.0, key)


def _check_number(value: Any, reference: float, key: str) -> None:
    require(isinstance(value, int | float) and not isinstance(value, bool), key, value, "a number")
    may_be_float = isinstance(reference, float) or _name(key) in _NON_NEGATIVE
    require(may_be_float or isinstance(value, int), key, value, "a whole number")
    _check_range(value, reference, key)


def _check_range(value: float, reference: float, key: str) -> None:
    """Check that a number is finite and in the range of its key, unless the new object's is equal."""
    name = _name(key)
    limit = _LIMITS.get(name, _MAX_COUNT if isinstance(reference, int) else _MAX_NUMBER)
    is_signed = name not in _NON_NEGATIVE and not key.startswith("loops.")
    lowest = -limit if is_signed or reference < 0 else 0
    is_valid = lowest <= value < limit or value == reference
    require(is_valid, key, value, f"a number of at least {lowest:g} and below {limit:g}")


def _name(key: str) -> str:
    """Return the last key of a path, without indices: ``param_groups[0].betas[1]`` -> ``betas``."""
    return key.rpartition(".")[2].partition("[")[0]
