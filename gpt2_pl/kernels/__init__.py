"""Drop-in replacements for PyTorch functions: the same names and signatures, faster where they were measured.

A kernel calls the PyTorch function itself on other devices, in other dtypes and in compiled code. Turning the kernels
off changes the speed and the rounding of a result, never its meaning. They are turned off by
``set_enabled(False)``, or for a whole process by the environment variable ``GPT2_PL_KERNELS=0``.
"""

from __future__ import annotations

import os

_enabled = os.environ.get("GPT2_PL_KERNELS", "1") != "0"


def enabled() -> bool:
    """Return whether the kernels of this package may be used."""
    return _enabled


def set_enabled(value: bool) -> bool:
    """Turn all kernels on or off.

    Args:
        value: False makes every kernel call the PyTorch function that it replaces.

    Returns:
        The previous setting.
    """
    global _enabled
    previous, _enabled = _enabled, value
    return previous
