"""Costs of runs: their names, units and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COSTS: dict[str, tuple[str, float, int | None]] = {  # name -> heading, divisor, digits; None for powers of ten
    "trials": ("tuning trials", 1, 0),
    "trial_cpu_seconds": ("tuning, CPU minutes", 60, 1),
    "trial_gpu_seconds": ("tuning, GPU minutes", 60, 1),
    "trial_training_flops": ("tuning, FLOPs", 1, None),
    "trainable": ("trainable", 1, 0),
    "checkpoint_bytes": ("checkpoint, MB", 1e6, 1),
    "examples_per_second": ("examples/s", 1, 1),
    "peak_memory_bytes": ("peak memory, GB", 1e9, 2),
    "training_flops": ("FLOPs", 1, None),
    "seconds": ("minutes", 60, 1),
    "cpu_seconds": ("CPU minutes", 60, 1),
    "gpu_seconds": ("GPU minutes", 60, 1),
    "seconds_to_best": ("minutes to best", 60, 1),
}
BUDGETS = ("gpu_seconds", "cpu_seconds", "training_flops")
"""Costs that add up over the trials of a search, so that a budget can limit them."""


def format_cost(value: float, name: str) -> str:
    """Format a cost in the unit of its heading; one that would be rounded to 0 is ``< 0.1`` or the like."""
    _, divisor, digits = COSTS[name]
    amount = value / divisor
    if digits is None:
        return f"{amount:.2e}"
    least = 10.0**-digits
    return f"< {least:g}" if 0 < amount < least / 2 else f"{amount:,.{digits}f}"


def record_cost(record: Mapping[str, Any], name: str) -> float | None:
    """Return a cost of a run.

    Args:
        record: content of the run's ``metrics.json``.
        name: ``trainable`` or ``total`` (parameters), ``seconds_to_best``, ``gpu_seconds`` (time multiplied by the
            number of GPUs), or a number in the record. Times include that of a pretraining run of this library.

    Returns:
        The cost; None if the record does not have it.
    """
    value: float | None
    if name in ("trainable", "total"):
        value = record["parameters"][name]
        return value
    if name == "gpu_seconds":
        device, seconds = record.get("device"), record_cost(record, "seconds")
        is_gpu = device is not None and device != "cpu"
        return seconds * (record.get("processes") or 1) if is_gpu and seconds is not None else None
    if name == "seconds_to_best":
        epochs, best = len(record["epochs"]), record["scores"].get("best_epoch")
        own = {**record, "seconds": record["seconds"] * best / epochs} if epochs and best else {}
        return record_cost(own, "seconds")
    value = record.get(name)
    if value is None or name not in ("seconds", "cpu_seconds"):
        return value
    base: float | None = (record.get("base") or {}).get(name)
    return value + (base or 0.0)


def budget_cost(record: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return a cost of a run in two parts: that of the pretraining of its base, and that of the run alone.

    Args:
        record: content of the run's ``metrics.json``.
        name: one of the :data:`BUDGETS`.

    Returns:
        The two parts; None if the record does not have them. The FLOPs of pretraining are not recorded.
    """
    total, alone = record_cost(record, name), record_cost({**record, "base": None}, name)
    if total is None or alone is None:
        return None
    has_pretraining = bool((record.get("base") or {}).get("seconds"))
    return None if has_pretraining and name == "training_flops" else (total - alone, alone)
