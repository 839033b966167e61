"""Access to attributes that Lightning's Trainer sets without declaring them."""

from __future__ import annotations

from typing import Any


def callbacks_of(trainer: Any) -> list[Any]:
    """Return the callbacks of a trainer, in the order in which they are called; changes to the list take effect."""
    return trainer.callbacks
