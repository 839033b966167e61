"""What of the machine a process has and uses, on every operating system."""

from __future__ import annotations

import os
import sys

import psutil


def available_cores() -> int:
    """How many cores this process may run on."""
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS has no affinities
        return os.cpu_count() or 1


def peak_process_memory() -> int:
    """The most memory that this process has occupied so far, in bytes."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    try:
        import resource
    except ImportError:
        return memory.rss  # as it is now
    unit = 1 if sys.platform == "darwin" else 1024
    return max(memory.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
