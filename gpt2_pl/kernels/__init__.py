"""Faster implementations of PyTorch operations.

A kernel is used only on the devices and dtypes where it was measured to be faster; otherwise, and in compiled code, it
calls the PyTorch function. Disabling the kernels changes the speed and the rounding of results only. They are disabled
by ``set_enabled(False)`` or, for the process, by the environment variable ``GPT2_PL_KERNELS=0``.
"""

from __future__ import annotations

import os

_enabled = os.environ.get("GPT2_PL_KERNELS", "1") != "0"


def enabled() -> bool:
    """Return whether the kernels of this package are enabled."""
    return _enabled


def set_enabled(value: bool) -> bool:
    """Enable or disable all kernels.

    Args:
        value: if False, every kernel calls the PyTorch function that it replaces.

    Returns:
        The previous setting.
    """
    global _enabled
    previous, _enabled = _enabled, value
    return previous
