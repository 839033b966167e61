"""``disable_malloc_trim``: the process keeps freed memory unless environment variables configure malloc."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from gpt2_pl.kernels import malloc

CODE = """
import ctypes, resource, runpy, sys
runpy.run_path(sys.argv[1])["disable_malloc_trim"]()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def allocate():
    block = libc.malloc(2**26)  # more than glibc ever keeps by default
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", CODE, malloc.__file__]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_disable_malloc_trim_repeated_allocation_has_few_page_faults() -> None:
    kept, returned = faults(), faults(MALLOC_TOP_PAD_="131072")  # which the function leaves to the environment
    assert returned > 100
    assert kept < returned / 4


def test_disable_malloc_trim_refused_threshold_falls_back_or_sets_nothing(monkeypatch) -> None:
    """Without an accepted mmap threshold, a trim threshold would fix the mmap threshold at 128 KB."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    new, old = malloc.MAX_THRESHOLD, malloc.MAX_THRESHOLD_OLD_GLIBC
    for refused, accepted in (([], new), ([new], old), ([new, old], None)):
        taken = {}

        class Library:
            @staticmethod
            def mallopt(key: int, value: int, refused=refused, taken=taken) -> int:
                if value in refused:
                    return 0
                taken[key] = value
                return 1

        monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _, library=Library: library)
        malloc.disable_malloc_trim()
        assert taken == ({} if accepted is None else {malloc.M_MMAP_THRESHOLD: accepted, malloc.M_TRIM_THRESHOLD: -1})
