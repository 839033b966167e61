"""Interleaved measurements, and the table of their medians.

The arms of a benchmark, such as this library and a peer, are measured in alternation, so that other load on the machine
affects all of them. For an arm that needs a separate process, a script calls itself with ``--arm NAME`` and prints the
figures as one line of JSON. With ``--record``, medians and ratios are stored in measured.json, and the tables of
docs/speed.md are rewritten from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).with_name("measured.json")
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"

Figures = dict[str, float]


def arguments(description: str | None, arms: Sequence[str], rounds: int = 3) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks.

    Args:
        description: help text.
        arms: values of ``--arm``.
        rounds: default number of rounds.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--record", action="store_true", help="keep the medians and rewrite docs/speed.md")
    parser.add_argument("--arm", choices=arms, help=argparse.SUPPRESS)
    return parser


def take_turns(arms: Sequence[str], rounds: int, more: Sequence[str] = ()) -> dict[str, list[Figures]]:
    """Measure every arm in every round, each in a separate process.

    Args:
        arms: names of the arms.
        rounds: number of measurements of each arm.
        more: flags for the processes, in addition to those of this one.

    Returns:
        The figures of every round, by arm.
    """
    found: dict[str, list[Figures]] = {arm: [] for arm in arms}
    for arm in [*arms] * rounds:
        done = subprocess.run(
            [sys.executable, *sys.argv, *more, "--arm", arm], stdout=subprocess.PIPE, text=True, check=True
        )
        found[arm].append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(arm, found[arm][-1], flush=True)
    return found


def turns_here(arms: dict[str, Callable[[], Figures]], rounds: int) -> dict[str, list[Figures]]:
    """Measure every arm in every round within this process, for work that takes milliseconds."""
    found: dict[str, list[Figures]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, measure in arms.items():
            found[arm].append(measure())
    return found


def now() -> float:
    """Return the time in seconds, after pending GPU work has finished."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gb() -> float:
    """Return the peak memory of this process in GB, on the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1024**3
    from gpt2_pl.utils.machine import peak_process_memory

    return peak_process_memory() / 1024**3


def compare(work: str, found: dict[str, list[Figures]], record: bool) -> None:
    """Print medians, and the median ratio of the first arm to every other arm.

    Args:
        work: description of the measured work.
        found: figures of every round, by arm. With a single arm, no ratios are computed.
        record: whether to store the results.
    """
    ours, *peers = found
    rows = []
    for figure in found[ours][0]:
        mine = [figures[figure] for figures in found[ours]]
        common = {"work": work, "figure": figure, "machine": machine(), "rounds": len(mine)}
        if not peers:
            rows.append({**common, "ours": statistics.median(mine)})
        for peer in peers:
            theirs = [figures.get(figure) for figures in found[peer]]
            if None in theirs:
                continue
            ratios = sorted(a / b for a, b in zip(mine, theirs, strict=True))
            rows.append(
                {**common, "ours": statistics.median(mine), "peer": peer, "theirs": statistics.median(theirs)}
                | {"ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
            )
    print("\n".join(_cells(row) for row in rows), flush=True)
    if record:
        _record(rows)


def machine() -> str:
    """Describe the processor or GPU, the number of cores and the version of PyTorch."""
    import torch

    from gpt2_pl.utils.machine import available_cores

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    formats = next((line.split() for line in lines if line.startswith("flags")), [])
    short = ", ".join(word for word in ("avx512_bf16", "amx_bf16") if word in formats)
    name = (names or [platform.processor() or platform.machine()])[0] + (f" ({short})" if short else "")
    return f"{available_cores()} cores of {name}, PyTorch {torch.__version__}"


def _key(row: dict[str, Any]) -> list[Any]:
    return [row.get(name) for name in ("machine", "work", "figure", "peer")]


def _record(rows: list[dict[str, Any]]) -> None:
    kept = {
        json.dumps(_key(row)): row
        for row in (json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else [])
    }
    kept.update({json.dumps(_key(row)): row for row in rows})
    MEASURED.write_text(json.dumps(list(kept.values()), indent=1) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table(list(kept.values())) + END + rest.split(END, 1)[1], encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Return one Markdown table per machine, with rows in the order of their first measurement."""
    parts = []
    for name in dict.fromkeys(row["machine"] for row in rows):
        lines = ["| work | quantity | gpt2_pl | peer | ratio |", "| --- | --- | --- | --- | --- |"]
        lines += [_cells(row) for row in rows if row["machine"] == name]
        parts.append(f"{name}:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _cells(row: dict[str, Any]) -> str:
    cells = [row["work"], row["figure"], _number(row["ours"])]
    if "peer" in row:
        spread = f" ({row['least']:.2f} to {row['most']:.2f})" if row["rounds"] > 1 else ""
        cells += [f"{row['peer']}: {_number(row['theirs'])}", f"{row['ratio']:.2f}{spread}"]
    else:
        cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
