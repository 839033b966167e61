"""Budgets of a comparison: trials of the searches that chose settings, and the expected best of k."""

import json
import shutil

import numpy as np
import pytest
from helpers.runs import fake_run

from gpt2_pl.commands import main
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.tuning import best_of
from gpt2_pl.experiments.tables import best_of_table, cost_table
from gpt2_pl.experiments.trials import find_trials


@pytest.fixture
def swept(tmp_path):
    """A sweep with a random search of lora, whose last trial failed, and an adaptive one of dora."""
    generator = np.random.default_rng(0)
    for strategy, sampler in (("full", None), ("lora", "random"), ("dora", "tpe")):
        for seed in (1, 2):
            folder = fake_run(tmp_path / f"s/quora/{strategy}/seed_{seed}", strategy, seed, generator.random(100) < 0.7)
            (folder / "sweep.json").write_text("{}")
        if sampler is None:
            continue
        for n in range(8):
            folder = tmp_path / f"s.search/quora/{strategy}/trial_{n}"
            trial = fake_run(folder, strategy, 1, np.arange(100) < 50 + n)
            record = json.loads((trial / "metrics.json").read_text())
            record |= {"cpu_seconds": 60.0, "status": "failed" if n == 7 else "finished", "mode": "max"}
            (trial / "metrics.json").write_text(json.dumps(record))
        described = {"space": {}, "seed": 0} | ({"sampler": "random"} if sampler == "random" else {})
        (tmp_path / f"s.search/quora/{strategy}.json").write_text(json.dumps(described))
    return tmp_path


def read(folder):
    return [Run.read(file.parent) for file in sorted((folder / "s").glob("**/metrics.json"))]


def test_costs_of_an_arm_include_its_trials(swept):
    (comparison,) = compare(read(swept))
    full, dora, lora = comparison.groups
    assert (full.cost("trials"), dora.cost("trials"), lora.cost("trials")) == (None, 8, 8)
    assert lora.cost("trial_cpu_seconds") == 480.0
    assert lora.trials.num_failed == 1
    headings, cells = cost_table(comparison)
    assert dict(zip(headings, cells[2], strict=True))["tuning, CPU minutes"] == "8.0"


def test_gpu_seconds_and_flops_are_those_of_the_records(swept):
    for run in read(swept):
        record = json.loads((run.folder / "metrics.json").read_text())
        record |= {"device": "NVIDIA H200", "processes": 2, "training_flops": 3e15}
        (run.folder / "metrics.json").write_text(json.dumps(record))
    (comparison,) = compare(read(swept))
    headings, cells = cost_table(comparison)
    row = dict(zip(headings, cells[0], strict=True))
    assert (row["GPU minutes"], row["FLOPs"]) == ("3.0", "3.00e+15")


def test_expected_best_is_that_of_independent_trials_only(swept):
    (comparison,) = compare(read(swept))
    _, dora, lora = comparison.groups
    scores = np.array([0.5, 0.51, 0.52, 0.53, 0.54, 0.55, 0.56, 0.0])
    assert lora.trials.best_of(2, 0.0) == best_of(scores, 2)
    with pytest.raises(InputError, match=r"sampler must be random.*'tpe'"):
        dora.trials.best_of(2)
    cells = {(row[0], row[2]): row for row in best_of_table(comparison)[1]}
    assert set(cells) == {("lora", "1"), ("lora", "2"), ("lora", "4"), ("dora", "")}
    assert cells["lora", "2"][3] == f"{100 * best_of(scores, 2).expected:.1f}"
    assert cells["lora", "2"][1] == "8, 1 failed, random"
    assert "not estimated" in cells["dora", ""][3]


def test_runs_without_a_search_have_no_trials(swept):
    full, *_ = (run for run in read(swept) if run.strategy == "full")
    lora, *_ = (run for run in read(swept) if run.strategy == "lora")
    assert find_trials(full) is None
    (lora.folder / "sweep.json").unlink()
    assert find_trials(lora) is None
    shutil.rmtree(swept / "s.search")
    main(["compare", str(swept / "s")])


def test_trials_of_lower_better_scores_are_negative(swept):
    for file in (swept / "s.search").glob("**/metrics.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"mode": "min"}))
    lora, *_ = (run for run in read(swept) if run.strategy == "lora")
    trials = find_trials(lora)
    assert max(trials.scores) == -0.5
    assert np.isneginf(trials.best_of(1).expected)  # a failed trial has the worst score
    assert trials.best_of(2).expected == best_of(np.array(trials.scores), 2).expected
