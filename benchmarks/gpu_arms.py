"""Arms of the parts of gpu.py: rounds in turn, time and memory of the device, and lines of figures."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Figures = dict[str, float]
Round = Callable[[], Figures]


class Report:
    """Lines of JSON of one part.

    Args:
        args: arguments of gpu.py.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.part = args, args.part
        self._file = args.out / "figures.jsonl"

    def write(self, **line: Any) -> None:
        """Append a line at once, with the part and the card."""
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"part": self.part, "card": card(self.args.device), **line}) + "\n")

    def in_turn(self, arms: dict[str, Callable[[], Round]], rounds: int | None = None) -> None:
        """Measure all arms in every round, and write a line for each; an arm that fails is left out from then on.

        Args:
            arms: for each arm a function that builds it, and returns a function that measures a round.
            rounds: number of rounds; by default that of the arguments.
        """
        ready: dict[str, Round] = {}
        for number in range(self.args.rounds if rounds is None else rounds):
            for arm in list(arms):
                try:
                    since = time.perf_counter()
                    if arm not in ready:
                        ready[arm] = arms[arm]()
                        self.write(arm=arm, figures={"start, s": round(time.perf_counter() - since, 2)})
                    self.write(arm=arm, round=number, figures=ready[arm]())
                except Exception as error:  # the other arms are still of use
                    traceback.print_exc()
                    del arms[arm]
                    self.write(arm=arm, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def can_compile(args: argparse.Namespace) -> bool:
    """Return whether compiled arms are measured: in a trial on a CPU, generating code would take most of the time."""
    return not (args.tiny and args.device == "cpu")


@cache
def card(device: str) -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def synchronized(device: str) -> float:
    """Return the time in seconds, after pending work on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(device: str, function: Callable[[], object], calls: int, warm_up: int = 2) -> float:
    """Return the mean seconds of a call, after calls that are not timed."""
    for _ in range(warm_up):
        function()
    since = synchronized(device)
    for _ in range(calls):
        function()
    return (synchronized(device) - since) / calls


class Memory:
    """Peak memory of one arm, while the other arms are in memory too; 0 on a CPU.

    Args:
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, device: str) -> None:
        self._counts = device == "cuda"
        self._before = torch.cuda.memory_allocated() if self._counts else 0
        self._own: int | None = None

    def start(self) -> None:
        """Begin a round; what was allocated up to the first one belongs to the arm."""
        if not self._counts:
            return
        if self._own is None:
            self._own = torch.cuda.memory_allocated() - self._before
        self._others = torch.cuda.memory_allocated() - self._own
        torch.cuda.reset_peak_memory_stats()

    def figures(self) -> Figures:
        """Return the peak since the start of the round, in GB."""
        return {"peak memory, GB": (torch.cuda.max_memory_allocated() - self._others) / 1024**3} if self._counts else {}
