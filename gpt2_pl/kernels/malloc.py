"""The C library's memory allocator, told to keep what a training step frees for the next step."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 2**31 - 1  # bytes; what mallopt takes is an int
LARGEST_BEFORE = 2**25  # bytes; the most that older ones take
NEVER = -1


def disable_malloc_trim() -> None:
    """Let freed memory stay with the process, where the C library is glibc; elsewhere nothing happens.

    glibc returns every freed tensor above 32 MB, and whatever lies free at the end of the heap, to the system, which
    hands it out again zeroed, page by page. A step frees and takes gigabytes; on a virtual machine the pages alone
    can be a tenth of its time, or a quarter. An allocator that was set through the environment (``MALLOC_...``,
    ``GLIBC_TUNABLES``) stays as it is.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # another system's C library
        return
    if mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, LARGEST_BEFORE):
        mallopt(M_TRIM_THRESHOLD, NEVER)  # alone, it would hold the other at its first value, which is small
