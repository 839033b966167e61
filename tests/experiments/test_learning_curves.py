"""Learning curves over training rows and their crossing points, against simulated worlds and interpolation."""

import json
import math

import numpy as np
import pytest
import yaml
from helpers.runs import fake_run

from gpt2_pl.commands import main
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.learning_curves import crossings, curves, size_unit
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.contrast import Arm, contrast
from gpt2_pl.experiments.statistics.crossing import cross

SIZES = (1, 4, 16, 64)


def sized_run(folder, strategy, seed, right, size, shots=True, **more):
    """Return the folder of a run with a number of training rows."""
    run = fake_run(folder, strategy, seed, right, rows={"train": 2 * size, "val": len(right)}, **more)
    if shots:
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["data"]["init_args"]["shots"] = size
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def shares(size):
    """Return the accuracy of full fine-tuning, which learns faster, and of LoRA, with a number of shots."""
    return {"full": 0.50 + 0.075 * math.log(size, 4), "lora": 0.60 + 0.01 * math.log(size, 4)}


@pytest.fixture
def runs(tmp_path):
    """Runs of two strategies with four numbers of shots and three seeds, whose curves cross."""
    generator, made = np.random.default_rng(0), []
    for size in SIZES:
        for name, share in shares(size).items():
            for seed in (1, 2, 3):
                right = generator.random(800) < share
                made.append(sized_run(tmp_path / f"runs/{name}_{size}_{seed}", name, seed, right, size))
    return made


def test_crossing_of_sized_runs_is_the_interpolated_point(runs):
    (comparison,) = compare(map(Run.read, runs))
    assert size_unit(comparison) == "shots"
    assert [(curve.strategy, list(curve.groups)) for curve in curves(comparison)] == [
        ("full", list(SIZES)), ("lora", list(SIZES)),
    ]  # fmt: skip
    (found,) = crossings(comparison)
    means = {
        name: [np.mean([Run.read(run).score("val/accuracy") for run in runs if run.name.startswith(f"{name}_{size}_")])
               for size in SIZES] for name in ("full", "lora")
    }  # fmt: skip
    fine = np.linspace(0, math.log(64), 200_001)
    one, other = (np.interp(fine, np.log(SIZES), means[name]) for name in ("full", "lora"))
    (change,) = np.flatnonzero(np.diff(np.sign(one - other)))
    assert found.point == pytest.approx(math.exp(fine[change]), rel=1e-3)
    assert found.better == ("lora", "full")
    assert found.low < found.point < found.high
    assert found.sentence("shots").startswith("lora is better below, full above ")


def test_groups_are_compared_with_the_baseline_of_as_many_rows(runs):
    (comparison,) = compare(map(Run.read, runs))
    labels = [group.label for group in comparison.groups]
    assert labels == [f"{name} (shots {size})" for name in ("full", "lora") for size in SIZES]
    assert [group.label for group in comparison.family] == [f"lora (shots {size})" for size in SIZES]
    for group in comparison.groups[4:]:
        baseline = comparison.baseline_of(group)
        assert baseline.shots == group.shots
        estimate = group.differences["val/accuracy"].contrast.estimate
        assert estimate == pytest.approx(group.mean("val/accuracy") - baseline.mean("val/accuracy"))
    assert comparison.cheapest() is None


def test_compare_writes_curves_and_crossings(runs, tmp_path, capsys):
    main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--margin=2"])
    assert capsys.readouterr().out.count("(baseline)") == len(SIZES)
    report = (tmp_path / "out/report.md").read_text()
    assert "| crossing (shots) |" in report
    assert "full with as many training rows" in report
    assert (tmp_path / "out/ParaphraseDetector_sizes.png").is_file()
    (content,) = json.loads((tmp_path / "out/report.json").read_text())
    (found,) = content["crossings"]
    assert found["strategies"] == ["full", "lora"]
    assert found["low"] < found["point"] < found["high"]


def test_runs_that_train_nothing_are_compared_at_no_cost(runs, tmp_path):
    generator = np.random.default_rng(1)
    for size in SIZES:
        for seed in (1, 2, 3):
            run = sized_run(
                tmp_path / f"runs/context_{size}_{seed}", "in_context", seed, generator.random(800) < 0.55, size
            )
            settings = yaml.safe_load((run / "config.yaml").read_text())
            settings["trainer"]["max_epochs"] = 0
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
            record = json.loads((run / "metrics.json").read_text())
            del record["scores"]["best_epoch"]
            record["parameters"]["trainable"] = 0
            (run / "metrics.json").write_text(json.dumps({**record, "epochs": []}))
    main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    (content,) = json.loads((tmp_path / "out/report.json").read_text())
    costs = {group["strategy"]: group["cost"]["trainable"] for group in content["groups"]}
    assert costs["in_context (shots 16)"] == 0
    assert ["full", "in_context"] in [found["strategies"] for found in content["crossings"]]
    (run / "config.yaml").write_text((runs[0] / "config.yaml").read_text())  # an evaluation of a checkpoint
    (comparison,) = compare([Run.read(run), Run.read(runs[0])])
    assert "it is not a finished training run (trained nothing)" in comparison.notes[0]


def test_curves_without_shots_count_rows_and_leave_out_ambiguous_groups(tmp_path):
    right = np.arange(100) % 3 > 0
    made = [
        sized_run(tmp_path / f"{name}{size}{seed}{lr}", name, seed, right, size, shots=False, lr=lr)
        for name, size, lr in (("full", 10, 1), ("full", 20, 1), ("lora", 10, 1), ("lora", 20, 1), ("lora", 20, 2))
        for seed in (1, 2)
    ]
    (comparison,) = compare(map(Run.read, made))
    assert size_unit(comparison) == "training rows"
    assert [(curve.strategy, list(curve.groups)) for curve in curves(comparison)] == [("full", [20, 40])]
    assert crossings(comparison) == []


def test_cross_interval_ends_where_the_contrast_includes_zero():
    generator = np.random.default_rng(4)
    arms = {name: [arm(generator, shares(size)[name], 0.02) for size in SIZES] for name in ("full", "lora")}
    (point,) = cross(SIZES, arms["full"], arms["lora"]).points
    assert not point.first_is_better_below
    for limit, outwards in ((point.low, -1), (point.high, 1)):
        x = np.log(SIZES)
        i = int(np.searchsorted(x, math.log(limit) + 1e-9, side="right")) - 1
        at_end = []
        for step in (0, -outwards):
            t = (math.log(limit) - x[i]) / (x[i + 1] - x[i]) + step / 40
            four = [arms[name][i + j] for name in ("full", "lora") for j in (0, 1)]
            low, high = contrast(four, [1 - t, t, t - 1, -t]).interval(0.95)
            at_end.append(low > 0 or high < 0)
        assert at_end == [True, False]


@pytest.mark.slow
def test_cross_sets_cover_the_true_point_in_95_of_100_worlds():
    generator = np.random.default_rng(7)
    true, worlds, covered, found = math.exp(0.1 / 0.065 * math.log(4)), 150, 0, 0
    for _ in range(worlds):
        arms = {name: [arm(generator, shares(size)[name], 0.01, 60) for size in SIZES] for name in ("full", "lora")}
        points = cross(SIZES, arms["full"], arms["lora"]).points
        found += bool(points)
        covered += any((p.low or 0) <= true <= (p.high or math.inf) for p in points)
    assert found > 0.95 * worlds
    assert 0.92 <= covered / found <= 1.0


def arm(generator, share, spread, num_texts=200):
    """Return three seeds of an arm whose true score is a share, with a standard deviation over seeds."""
    texts = share + generator.normal(size=(3, 1)) * spread + generator.normal(size=(3, num_texts)) * 0.1
    return Arm(texts.mean(1), texts)
