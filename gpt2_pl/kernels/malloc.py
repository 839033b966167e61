"""Configuration of glibc's malloc, which keeps freed memory in the process for the next training step."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
MAX_THRESHOLD = 2**31 - 1  # bytes; mallopt's argument is an int
MAX_THRESHOLD_OLD_GLIBC = 2**25  # bytes; the maximum of older versions
NEVER_TRIM = -1


def disable_malloc_trim() -> None:
    """Make glibc keep freed memory in the process; do nothing with other C libraries.

    By default glibc returns freed tensors above 32 MB, and free memory at the end of the heap, to the system, which
    zeroes every page before it is used again. A training step frees and allocates gigabytes; on a virtual machine the
    page faults can take a tenth to a quarter of its time. Settings from the environment (``MALLOC_...``,
    ``GLIBC_TUNABLES``) take precedence.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # not glibc
        return
    if mallopt(M_MMAP_THRESHOLD, MAX_THRESHOLD) or mallopt(M_MMAP_THRESHOLD, MAX_THRESHOLD_OLD_GLIBC):
        mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)  # alone it would fix the mmap threshold at its small initial value
