"""``disable_malloc_trim``: the process keeps freed memory unless environment variables configure malloc."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from gpt2_pl.kernels import malloc

CODE = """
import resource, torch
from gpt2_pl.kernels.malloc import disable_malloc_trim
disable_malloc_trim()
for _ in range(20):  # glibc needs a few before it finds the freed one again
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_disable_malloc_trim_repeated_allocation_has_few_page_faults() -> None:
    assert faults() < faults(MALLOC_MMAP_THRESHOLD_="131072") / 4


@pytest.mark.parametrize(
    "refused", [[], [malloc.MAX_THRESHOLD], [malloc.MAX_THRESHOLD, malloc.MAX_THRESHOLD_OLD_GLIBC]]
)
def test_disable_malloc_trim_refused_threshold_falls_back_or_sets_nothing(refused, monkeypatch) -> None:
    """Without an accepted mmap threshold, a trim threshold would fix the mmap threshold at 128 KB."""
    taken = {}

    class Library:
        @staticmethod
        def mallopt(key: int, value: int) -> int:
            if value in refused:
                return 0
            taken[key] = value
            return 1

    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: Library)
    malloc.disable_malloc_trim()
    threshold = [value for value in (malloc.MAX_THRESHOLD, malloc.MAX_THRESHOLD_OLD_GLIBC) if value not in refused][:1]
    assert taken == ({malloc.M_MMAP_THRESHOLD: threshold[0], malloc.M_TRIM_THRESHOLD: -1} if threshold else {})
