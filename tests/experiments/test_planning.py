"""gpt2-pl power: plans from pilot runs, and what gives none."""

import re

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.runs import fake_run

from gpt2_pl.commands import main
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.planning import make_plan
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.power import Pilot, detectable_difference, seeds_needed, texts_needed


@pytest.fixture
def pilot(tmp_path):
    """Runs of two strategies with three seeds, and one of a third."""
    generator = np.random.default_rng(0)
    both = generator.random(1101) < 0.6
    for strategy, seeds in (("full", 3), ("lora", 3), ("single", 1)):
        stable = generator.random(1101) < 0.1
        for seed in range(seeds):
            right = both ^ stable ^ (generator.random(1101) < 0.05 + 0.01 * seed)
            fake_run(tmp_path / f"runs/{strategy}{seed}", strategy, seed, right)
    return tmp_path / "runs"


def test_power_command_prints_what_seeds_can_show(pilot, capsys):
    main(["power", str(pilot), "--difference", "4", "--seeds", "20"])
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    (comparison,) = compare([Run.read(file.parent) for file in sorted(pilot.glob("*/metrics.json"))])
    variances = Pilot.from_contrast(comparison.groups[1].differences["val/accuracy"].contrast)
    rows = re.findall(r"^ +(\d+) +([\d.]+) points +([\d.]+) points$", shown, re.M)
    assert [int(row[0]) for row in rows] == [3, 4, 5, 8, 10, 15, 20]
    for S, right, unlucky in rows:
        for text, components in ((right, variances), (unlucky, variances.unlucky())):
            mdd = 100 * detectable_difference(components, int(S), 1101)
            assert mdd <= float(text) < mdd + 0.1
    needed = seeds_needed(variances, 1101, 0.04)
    assert f"A difference of 4 points needs {needed} seeds of each strategy" in " ".join(shown.split())
    assert "single gives no plan: one seed" in shown


def test_power_command_difference_out_of_reach_names_the_texts_needed(pilot, capsys):
    main(["power", str(pilot), "--difference", "0.5"])
    shown = " ".join(capsys.readouterr().out.split())
    texts = int(
        re.search(r"A difference of 0.5 points is out of reach.* About ([\d,]+) texts", shown)[1].replace(",", "")
    )
    (comparison,) = compare([Run.read(file.parent) for file in sorted(pilot.glob("*/metrics.json"))])
    plan = make_plan(comparison, comparison.groups[1], "val/accuracy", 0.5)
    assert texts == texts_needed(plan.pilot, 0.005) > 1101
    main(["power", str(pilot), "--difference", "0.5", "--texts", str(4 * texts)])
    assert "A difference of 0.5 points needs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--difference", "0"], "difference"),
        (["--difference", "nan"], "difference"),
        (["--difference", "1", "--seeds", "1"], "seeds"),
        (["--difference", "1", "--texts", "1"], "texts"),
        (["--difference", "1", "--metric", "val/x"], "metric"),
        (["--difference", "1", "--baseline", "x"], "baseline"),
        (["--difference", "1", "--metric", "val/loss"], "RUN"),
    ],
)
def test_power_command_invalid_options_are_refused(pilot, run, capsys, flags, key):
    assert refused(run, capsys, "power", pilot, *flags).key == key
