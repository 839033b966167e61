"""Check of the training state in a checkpoint, before optimizers, schedulers and loops load it.

The state of a new optimizer, scheduler or loop (``state_dict()``) defines the valid keys and the type of each value;
everything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from gpt2_pl.errors import InputError, require
from gpt2_pl.tasks.optimizer_state import check_like, check_optimizer, is_known


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Add the source to the errors of a check."""
    try:
        yield
    except InputError as error:
        named = InputError(error, key=error.key, value=error.value, expected=error.expected, source=source)
        raise named from None


def check_training_state(checkpoint: dict[str, Any], trainer: Any, where: str) -> None:
    """Refuse optimizer and scheduler states that do not fit the trainer's optimizers and schedulers.

    Options that only choose the implementation of a step (``fused``, ``foreach`` ...) are replaced in the checkpoint by
    those of the configured optimizer.

    Args:
        checkpoint: content of a checkpoint.
        trainer: Lightning's trainer, with its optimizers.
        where: beginning of the error message.

    Raises:
        InputError: naming the key, its value and the expected value.
    """
    optimizers, schedulers = trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
    with _named(where):
        for key, present in (("optimizer_states", optimizers), ("lr_schedulers", schedulers)):
            states = checkpoint.get(key)
            if states is None and present:
                reason = "the checkpoint holds a model alone, from which training cannot resume"
                raise InputError(f"{key} ({reason}) is missing", key=key)
            is_complete = isinstance(states, list) and len(states) == len(present)
            require(is_complete, key, states, f"a list of {len(present)}, as this run has")
        for i, optimizer in enumerate(optimizers):
            check_optimizer(checkpoint["optimizer_states"][i], optimizer, f"optimizer_states[{i}]")
        for i, scheduler in enumerate(schedulers):
            state, key = checkpoint["lr_schedulers"][i], f"lr_schedulers[{i}]"
            check_like(state, scheduler.state_dict(), key, is_known(scheduler), scheduler)


def check_progress(checkpoint: dict[str, Any], trainer: Any, where: str) -> None:
    """Refuse states of loops and of the precision plugin that do not fit the trainer's.

    Args:
        checkpoint: content of a checkpoint.
        trainer: Lightning's trainer.
        where: beginning of the error message.

    Raises:
        InputError: naming the key, its value and the expected value.
    """
    plugin, loops = trainer.precision_plugin, checkpoint.get("loops")
    with _named(where):
        if trainer.state.fn is not None and loops is not None:
            name = f"{trainer.state.fn.value}_loop"
            require(isinstance(loops, dict) and name in loops, f"loops.{name}", loops, "a mapping")
            _check_loop(loops[name], getattr(trainer, name).state_dict(), f"loops.{name}")
        if (key := type(plugin).__qualname__) in checkpoint:
            check_like(checkpoint[key], plugin.state_dict(), key, True)


def _check_loop(state: Any, reference: dict[str, Any], key: str) -> None:
    """Check the state of a loop; the states of dataloaders are not checked."""
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        inner = {name: value for name, value in state["state_dict"].items() if name != "combined_loader"}
        state = {**state, "state_dict": inner}
    check_like(state, reference, key, True)
    _check_counts(state, key)


def _check_counts(progress: dict[str, Any], key: str) -> None:
    """Refuse progress with more completed than started batches, or with a current count above the total."""
    counts = [progress[name] for name in ("ready", "started", "processed", "completed") if name in progress]
    is_ordered = all(earlier >= later for earlier, later in pairwise(counts))
    require(is_ordered, key, progress, "non-increasing counts from ready to completed")
    for name, value in progress.items():
        if isinstance(value, dict):
            _check_counts(value, f"{key}.{name}")
    total, current = progress.get("total"), progress.get("current")
    # Lightning resets the counts of validation in every epoch: the total at once, the current ones when it starts.
    if isinstance(total, dict) and isinstance(current, dict) and not key.endswith(".val_loop.batch_progress"):
        for name in current.keys() & total.keys():
            expected = f"at most {total[name]}, its total"
            require(current[name] <= total[name], f"{key}.current.{name}", current[name], expected)
