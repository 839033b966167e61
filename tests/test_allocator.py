"""Freed memory stays with the process, unless the environment says otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PAGES = 64 * 2**20 // os.sysconf("SC_PAGESIZE")  # of the tensor below
CODE = """
import resource, torch
from gpt2_pl.allocator import keep_freed_memory
keep_freed_memory()
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
def test_pages_of_a_freed_tensor_are_not_taken_from_the_system_again() -> None:
    assert faults() < PAGES / 2
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") > 3 * PAGES
