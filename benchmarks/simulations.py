"""Simulate the statistics of comparisons: coverage, false findings, power and stopping.

    python benchmarks/simulations.py --worlds 2000

Each line has the simulated rate, its Monte-Carlo standard error, and the rate of the specification of the methods,
which was simulated by other code. Rates are in percent.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.experiments.statistics.contrast import Arm, difference, paired_difference
from gpt2_pl.experiments.statistics.contributions import from_confusion, macro_f1
from gpt2_pl.experiments.statistics.power import Pilot, detectable_difference
from gpt2_pl.experiments.statistics.selection import choose, cross, half_splits
from gpt2_pl.experiments.statistics.sequential import Decision, look
from gpt2_pl.experiments.statistics.verdicts import findings

Line = tuple[str, Callable[[np.random.Generator], bool], float]
_SEED_BY_TEXT, _STABLE = math.sqrt(0.05), math.sqrt(0.02)  # standard deviations over rows


def crossed_arms(
    generator: np.random.Generator, stds: tuple[float, float], seeds: tuple[int, int], N: int
) -> list[Arm]:
    """Return two equal arms with a spread over seeds (in points), over texts, and over seeds with texts."""
    stable, arms = generator.normal(0, _STABLE, N), []
    for std, S, sign in zip(stds, seeds, (0.5, -0.5), strict=True):
        rows = generator.normal(0, std / 100, (S, 1)) + sign * stable + generator.normal(0, _SEED_BY_TEXT, (S, N))
        arms.append(Arm(rows.mean(1), rows))
    return arms


def covers_zero(stds: tuple[float, float], seeds: tuple[int, int], N: int) -> Callable[[np.random.Generator], bool]:
    """Return a world in which the interval of two equal arms covers 0 or not."""

    def world(generator: np.random.Generator) -> bool:
        low, high = difference(*crossed_arms(generator, stds, seeds, N)).interval()
        return low <= 0 <= high

    return world


def macro_f1_covers(generator: np.random.Generator) -> bool:
    """Return whether the interval of the macro F1 of two equal arms, four unequal classes, covers 0."""
    arms, N = [], 1101
    labels = generator.choice(4, N, p=[0.5, 0.3, 0.15, 0.05])
    for _ in range(2):
        found = []
        for _ in range(3):
            is_right = generator.random(N) < 0.75 + generator.normal(0, 0.012)
            predictions = np.where(is_right, labels, generator.integers(0, 4, N))
            found.append(from_confusion(labels, predictions, 4, macro_f1))
        arms.append(Arm(np.array([value for value, _ in found]), np.array([rows for _, rows in found])))
    low, high = difference(*arms).interval()
    return low <= 0 <= high


def scores_alone(scores: NDArray[np.float64]) -> Arm:
    """Return an arm without variance over texts."""
    return Arm(scores, np.repeat(scores[:, None], 2, axis=1))


def any_finding(seeds: int, stds: NDArray[np.float64], shift: float = 0.0) -> Callable[[np.random.Generator], bool]:
    """Return a world of seven arms beside a baseline with a finding of any, or of a shifted one."""

    def world(generator: np.random.Generator) -> bool:
        scores = generator.normal(0, stds[:, None], (8, seeds))
        scores[1] += shift
        arms = [scores_alone(of_arm) for of_arm in scores]
        found = findings({str(i): difference(arm, arms[0]) for i, arm in enumerate(arms[1:])}, None)
        if shift:
            return found["0"].above_zero
        return any(one.above_zero or one.below_zero for one in found.values())

    return world


def pairs_cover(seeds: int, correlation: float, is_paired: bool) -> Callable[[np.random.Generator], bool]:
    """Return a world of two equal arms whose runs of one seed are correlated, in which the interval covers 0 or not."""
    compare = paired_difference if is_paired else difference

    def world(generator: np.random.Generator) -> bool:
        shared = generator.normal(0, math.sqrt(correlation), seeds)
        scores = shared + generator.normal(0, math.sqrt(1 - correlation), (2, seeds))
        low, high = compare(*map(scores_alone, scores)).interval()
        return low <= 0 <= high

    return world


def stops_at_margin(stds: tuple[float, float]) -> Callable[[np.random.Generator], bool]:
    """Return a world in which an arm that is exactly the margin worse is decided on or not, within 15 seeds."""

    def world(generator: np.random.Generator) -> bool:
        scores = generator.normal([[-1.0], [0.0]], np.array(stds)[:, None], (2, 15))
        for S in range(3, 16):
            decision = look(difference(*(scores_alone(of_arm[:S]) for of_arm in scores)), 1.0)
            if decision is not Decision.CONTINUE:
                break
        return decision in (Decision.NON_INFERIOR, Decision.BETTER, Decision.INFERIOR)

    return world


def shows_detectable(generator: np.random.Generator) -> bool:
    """Return whether three seeds show the difference that is said to be detectable with a chance of 80 %."""
    pilot = Pilot((0.0091**2,) * 2, (0.0,) * 2, 0.0, (3, 3))
    shift = detectable_difference(pilot, 3, 10**6)
    scores = generator.normal([[shift], [0.0]], 0.0091, (2, 3))
    low, _ = difference(*map(scores_alone, scores)).interval()
    return low > 0


def optimism(num_worlds: int, generator: np.random.Generator) -> Iterator[str]:
    """Yield the bias of the best of 20 equal checkpoints on 245 rows, apparent and crossed, in points."""
    splits, apparent, crossed = half_splits("rows", 245), [], []
    for _ in range(max(100, num_worlds // 10)):
        is_hard = generator.random(245) < 0.144
        values = np.where(is_hard, generator.random((20, 245)) < 0.5, generator.random(245) < 0.909).astype(float)
        chosen = choose(lambda half, values=values: values[:, half].mean(1), splits)
        rows = [cross(values, first, pair) for first, pair in zip(splits, chosen, strict=True)]
        apparent.append(values.mean(1).max() - values.mean())
        crossed.append(np.mean(rows) - values.mean())
    yield f"best of 20 checkpoints on the rows that chose it: {100 * np.mean(apparent):+.2f} points (about +1.8)"
    yield f"the same by half-splits: {100 * np.mean(crossed):+.2f} points (about -0.1)"


def lines() -> list[Line]:
    """Return the simulations with their rates in the specification."""
    equal, wide_baseline = np.ones(8), np.array([3.3, *[1.0] * 7])
    spreads: list[tuple[tuple[float, float], tuple[int, int], int, float]] = [
        ((0.0, 0.0), (3, 3), 245, 97.2), ((1.4, 1.4), (3, 3), 245, 96.0), ((4.8, 1.4), (3, 3), 245, 93.9),
        ((1.4, 1.4), (5, 5), 245, 95.5), ((4.8, 1.4), (3, 15), 245, 92.5), ((1.4, 1.4), (3, 3), 1101, 95.3),
        ((4.8, 1.4), (3, 3), 1101, 94.0), ((1.4, 1.4), (3, 3), 12, 96.8),
    ]  # fmt: skip
    pairs = [(3, 0.0, 96.4, 95.1), (3, 0.5, 98.6, 95.0), (3, 0.9, 99.7, 95.3), (5, 0.3, 97.8, 95.0)]
    return [
        *((f"coverage, {S} pairs of seeds with correlation {r}, {'' if is_paired else 'not '}paired",
           pairs_cover(S, r, is_paired), (unpaired, paired)[is_paired])
          for S, r, unpaired, paired in pairs for is_paired in (False, True)),
        *((f"coverage, sd {a[0]} / {a[1]}, {S[0]} + {S[1]} seeds, {N:,} texts", covers_zero(a, S, N), rate)
          for a, S, N, rate in spreads),
        ("coverage of macro F1, narrow pair, 3 seeds, 1,101 texts", macro_f1_covers, 96.7),
        ("any false finding after Holm, 7 arms, 3 seeds, equal spread", any_finding(3, equal), 1.9),
        ("any false finding after Holm, 7 arms, 3 seeds, wide baseline", any_finding(3, wide_baseline), 2.0),
        ("any false finding after Holm, 7 arms, 5 seeds, equal spread", any_finding(5, equal), 2.8),
        ("power for an arm 3 sd better, 7 arms, 3 seeds", any_finding(3, equal, 3.0), 18.0),
        ("power for an arm 3 sd better, 7 arms, 5 seeds", any_finding(5, equal, 3.0), 77.0),
        ("power at the detectable difference, 3 seeds", shows_detectable, 80.0),
        ("decided at exactly the margin, equal spread", stops_at_margin((0.91, 0.91)), 4.6),
        ("decided at exactly the margin, sd 4.9 / 1.5", stops_at_margin((4.9, 1.5)), 5.9),
    ]  # fmt: skip


def main() -> None:
    """Run the simulations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=2000, help="simulated experiments of each line")
    num_worlds = parser.parse_args().worlds
    for i, (name, world, expected) in enumerate(lines()):
        generator = np.random.default_rng(i)
        rate = np.mean([world(generator) for _ in range(num_worlds)])
        error = 100 * math.sqrt(rate * (1 - rate) / num_worlds)
        print(f"{name}: {100 * rate:.1f} ± {error:.1f} (specified {expected})", flush=True)
    for line in optimism(num_worlds, np.random.default_rng(0)):
        print(line)


if __name__ == "__main__":
    main()
