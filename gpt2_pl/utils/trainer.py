"""Access to attributes that Lightning's Trainer sets without declaring them."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def callbacks_of(trainer: Any) -> list[Any]:
    """Return the callbacks of a trainer, in the order in which they are called; changes to the list take effect."""
    return trainer.callbacks


def log_every_n_steps(trainer: Any) -> int:
    """Return the number of training steps from one that loggers record to the next; 0 if they record none."""
    return trainer.log_every_n_steps


def find_callbacks(trainer: Any, kind: type[T]) -> list[T]:
    """Return the callbacks of a class, in the order in which they are called; an empty list without a trainer."""
    return [] if trainer is None else [callback for callback in trainer.callbacks if isinstance(callback, kind)]
