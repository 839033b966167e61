"""CPU cores and peak memory of the process, on every operating system."""

from __future__ import annotations

import os
import sys

import psutil


def available_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS has no CPU affinity.
        return os.cpu_count() or 1


def peak_process_memory() -> int:
    """Return the peak resident memory of this process in bytes, or its present memory if the peak is unknown."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    try:
        import resource
    except ImportError:
        return memory.rss
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB elsewhere.
    return max(memory.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
