"""Whether two runs differ on the same rows: paired bootstrap and McNemar's test on what each said of every row.

    python benchmarks/significance.py RUN_A RUN_B [RUN_B ...] [--split val]

Prints for each B the difference B - A in accuracy with its 95 % interval, the bootstrap's p, and McNemar's exact p.
"""

from __future__ import annotations

import argparse
import csv
from math import comb
from pathlib import Path

import numpy as np


def right(run: Path, split: str) -> np.ndarray:
    """Whether each row of a split was classified rightly (N,)."""
    with (run / f"predictions_{split}.csv").open(encoding="utf-8", newline="") as file:
        return np.array([row["label"] == row["prediction"] for row in csv.DictReader(file)])


def paired_bootstrap(a: np.ndarray, b: np.ndarray, n: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """The 95 % interval of mean(b) - mean(a) over rows drawn again, and a two-sided p (Efron & Tibshirani 1993)."""
    difference = b.astype(float) - a
    generator = np.random.default_rng(seed)
    means = np.array([difference[generator.integers(0, len(a), len(a))].mean() for _ in range(n)])
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high, min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """The exact two-sided p of the rows on which only one of them is right."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)


def main() -> None:
    """Compare every other run with the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    first = right(args.runs[0], args.split)
    print(f"{args.runs[0]}: {first.mean():.4f} of {len(first)} rows")
    for run in args.runs[1:]:
        other = right(run, args.split)
        low, high, p = paired_bootstrap(first, other)
        change = other.mean() - first.mean()
        print(f"{run}: {change:+.4f} [{low:+.4f}, {high:+.4f}], p {p:.4f}; McNemar p {mcnemar(first, other):.4f}")


if __name__ == "__main__":
    main()
