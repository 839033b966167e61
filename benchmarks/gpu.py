"""All measurements on a GPU in one call of at most ten minutes, beside transformers at its best.

    python benchmarks/gpu.py [--out FOLDER] [--parts finetuning lora ...] [--limit SECONDS] [--total SECONDS]
    python benchmarks/gpu.py --device cpu --tiny                 # a short trial of the same code without a GPU

Every part runs in its own process with a time limit. Each figure is a line of JSON in FOLDER/figures.jsonl, written as
soon as it is measured, so that a part that fails or takes too long loses no earlier figure. The arms of a part are
measured in turn, in three rounds; the table at the end shows medians. Parts are in the order of their importance, and
those for which no time is left are skipped. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

PARTS = {  # module, and seconds after which the part is stopped
    "machine": ("gpu_models", 40),
    "tests": ("gpu_training", 90),
    "finetuning": ("gpu_training", 130),
    "profile": ("gpu_training", 60),
    "processes": ("gpu_training", 45),
    "generation": ("gpu_models", 140),
    "language_model": ("gpu_models", 140),
    "lora": ("gpu_training", 110),
    "language_model_medium": ("gpu_models", 110),
    "kernels": ("gpu_models", 60),
}


def main() -> None:
    """Run the parts one after the other, or, with ``--part``, one of them in this process."""
    args = _parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        getattr(importlib.import_module(PARTS[args.part][0]), args.part)(args)
        return
    figures, end = args.out / "figures.jsonl", time.monotonic() + args.total
    figures.unlink(missing_ok=True)
    for part in args.parts:
        limit = min(PARTS[part][1] if args.limit is None else args.limit, end - time.monotonic())
        if limit < 1:
            _write(figures, part=part, status="skipped: no time is left")
            continue
        _run(part, limit, args.out, figures)
    print(table(figures))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_figures")), help="folder")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--limit", type=float, help="seconds of each part, instead of its own limit")
    parser.add_argument("--total", type=float, default=560, help="seconds of all parts together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps, to try the code")
    parser.add_argument("--ours", action="store_true", help="leave out the peers")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(part: str, limit: float, out: Path, figures: Path) -> None:
    """Run a part in its own process, and note how it ended."""
    since = time.monotonic()
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--out", str(out)]
    with (out / f"{part}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = "done" if process.wait(limit) == 0 else f"failed, see {part}.log"
        except subprocess.TimeoutExpired:
            for started in (*psutil.Process(process.pid).children(recursive=True), process):
                started.kill()
            process.wait()
            status = f"stopped after {limit:.0f} s"
    _write(figures, part=part, status=status, seconds=round(time.monotonic() - since, 1))
    print(f"{part}: {status}, {time.monotonic() - since:.0f} s", flush=True)


def _write(file: Path, **line: Any) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def table(figures: Path) -> str:
    """Return a Markdown table of the medians of all rounds, and the lines that are not figures of a round."""
    lines = [json.loads(line) for line in figures.read_text(encoding="utf-8").splitlines()]
    rows = ["| part | arm | quantity | median | rounds |", "| --- | --- | --- | --- | --- |", *_rows(lines)]
    notes = [json.dumps(line) for line in lines if "figures" not in line and line.get("status") != "done"]
    return "\n".join([*rows, "", *notes])


def _rows(lines: list[dict[str, Any]]) -> Iterator[str]:
    found: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        for name, value in line.get("figures", {}).items():
            found.setdefault((line["part"], line["arm"], name), []).append(value)
    for key, values in found.items():
        yield f"| {' | '.join(key)} | {statistics.median(values):,.4g} | {len(values)} |"


if __name__ == "__main__":
    main()
