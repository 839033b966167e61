"""Trials of the searches that chose settings: their scores and costs, and the expected best of k."""

import itertools
import json
import shutil

import numpy as np
import pytest
from helpers.runs import fake_run
from helpers.searches import KEY, change_record, fake_search, sweep_run

from gpt2_pl.commands import main
from gpt2_pl.commands.compare import read_runs
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.budgets import best_of_table
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.tuning import best_of
from gpt2_pl.experiments.tables import cost_table
from gpt2_pl.experiments.trials import find_trials

SCORES = [0.5, 0.51, 0.52, 0.53, 0.54, 0.55, 0.56, None]


@pytest.fixture
def swept(tmp_path):
    """A sweep with a random search of lora, whose last trial failed, and an adaptive one of dora."""
    generator = np.random.default_rng(0)
    for strategy, sampler in (("full", None), ("lora", "random"), ("dora", "tpe")):
        for seed in (1, 2):
            sweep_run(tmp_path / f"s/quora/{strategy}/seed_{seed}", strategy, seed, generator.random(100) < 0.7)
        if sampler is not None:
            fake_search(tmp_path / "s/quora", strategy, SCORES, sampler=sampler)
    return tmp_path


def read(folder):
    return [Run.read(file.parent) for file in sorted((folder / "s").glob("**/metrics.json"))]


def test_costs_of_an_arm_include_its_trials(swept):
    (comparison,) = compare(read(swept))
    full, dora, lora = comparison.groups
    assert (full.cost("trials"), dora.cost("trials"), lora.cost("trials")) == (None, 8, 8)
    assert lora.cost("trial_cpu_seconds") == 480.0
    assert lora.cost("trial_gpu_seconds") is None
    assert lora.trials.num_failed == 1
    headings, cells = cost_table(comparison)
    assert dict(zip(headings, cells[2], strict=True))["tuning, CPU minutes"] == "8.0"


def test_gpu_seconds_and_flops_are_those_of_the_records(swept):
    for run in (*read(swept), *(Run.read(file.parent) for file in swept.glob("s.search/*/lora/*/metrics.json"))):
        change_record(run.folder, device="NVIDIA H200", processes=2, training_flops=3e15)
    (comparison,) = compare(read(swept))
    headings, cells = cost_table(comparison)
    full, _, lora = (dict(zip(headings, row, strict=True)) for row in cells)
    assert (full["GPU minutes"], full["FLOPs"]) == ("3.0", "3.00e+15")
    assert (lora["tuning, GPU minutes"], lora["tuning, FLOPs"]) == ("24.0", "2.40e+16")


def test_cost_of_trials_equals_the_mean_over_all_subsets(swept):
    spent = [10.0, 70.0, 30.0, 40.0, 20.0, 60.0, 80.0, 5.0]
    for n, seconds in enumerate(spent):
        change_record(swept / f"s.search/quora/lora/trial_{n}", cpu_seconds=seconds)
    trials = find_trials(Run.read(swept / "s/quora/lora/seed_1"))
    for k in (1, 3, 8):
        mean = np.mean([sum(subset) for subset in itertools.combinations(spent, k)])
        assert trials.mean_cost("cpu_seconds", k) == pytest.approx(mean)
        assert trials.within("cpu_seconds", mean) == k
        assert trials.within("cpu_seconds", mean - 0.1) == k - 1
    assert trials.within("cpu_seconds", 1e9) == 8
    assert trials.mean_cost("gpu_seconds", 1) is None


def test_pretraining_of_a_base_is_paid_once(swept):
    base = {"digest": "x", "origin": "abc", "recipe": "text", "seconds": 500.0, "cpu_seconds": 900.0}
    for n in range(8):
        change_record(swept / f"s.search/quora/lora/trial_{n}", base=base, training_flops=1e12)
    trials = find_trials(Run.read(swept / "s/quora/lora/seed_1"))
    assert trials.total("cpu_seconds") == 900.0 + 480.0
    assert trials.mean_cost("cpu_seconds", 2) == 900.0 + 120.0
    assert [trials.within("cpu_seconds", budget) for budget in (899.0, 959.0, 961.0)] == [0, 0, 1]
    assert trials.total("training_flops") is None  # those of the pretraining are not recorded


def test_search_is_read_with_its_space_seed_and_chosen_values(swept):
    trials = find_trials(Run.read(swept / "s/quora/lora/seed_1"))
    assert trials.space == {KEY: {"low": 1e-5, "high": 1e-2, "log": True}}
    assert (trials.seed, trials.sampler, trials.chosen) == (0, "random", {KEY: "0.001"})
    file = swept / "s.search/quora/lora.json"
    file.write_text(json.dumps({"space": [], "seed": 0}))
    with pytest.raises(InputError, match=r"lora.json.*space must be a valid dictionary"):
        find_trials(Run.read(swept / "s/quora/lora/seed_1"))
    file.unlink()
    assert find_trials(Run.read(swept / "s/quora/lora/seed_1")).sampler == "unknown"


def test_expected_best_is_that_of_independent_trials_only(swept):
    (comparison,) = compare(read(swept))
    _, dora, lora = comparison.groups
    scores = np.array([score or 0.0 for score in SCORES])
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
    assert find_trials(Run.read(fake_run(swept / "other", "lora", 1, [True]))) is None
    shutil.rmtree(swept / "s.search")
    main(["compare", str(swept / "s")])


def test_trials_and_pretraining_below_a_folder_are_left_out_with_a_note(swept, capsys):
    for seed in (1, 2):
        sweep_run(swept / f"s.pretrain/quora/text/seed_{seed}", "text", seed, np.ones(100, bool))
    own = fake_run(swept / "my.search/version_0", "own", 1, np.ones(100, bool))  # no sweep has started it
    for paths, labels, note in (
        ([swept], ["full", "dora", "lora", "own"], "16 search trials and 2 pretraining runs are left out"),
        (
            [swept, swept / "s.pretrain/quora/text/seed_1"],
            ["full", "dora", "lora", "own", "text"],
            "1 pretraining run ",
        ),
        ([swept / "s"], ["full", "dora", "lora"], None),
        ([swept / "s.search/quora/lora"], ["lora"], None),
        ([swept / "s", own], ["full", "dora", "lora", "own"], None),
    ):
        runs, notes = read_runs(paths)
        assert [group.label for group in compare(runs)[0].groups] == labels
        assert (note in notes[0]) if note else (notes == [])
    main(["compare", str(swept)])
    assert "note: 16 search trials and 2 pretraining runs are left out" in capsys.readouterr().out
    shutil.rmtree(swept / "s")
    shutil.rmtree(own)
    with pytest.raises(InputError, match="other runs than 16 search trials and 2 pretraining runs"):
        read_runs([swept])


def test_trials_of_lower_better_scores_are_negative(swept):
    for file in (swept / "s.search").glob("**/metrics.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"mode": "min"}))
    lora, *_ = (run for run in read(swept) if run.strategy == "lora")
    trials = find_trials(lora)
    assert max(trials.scores) == -0.5
    assert np.isneginf(trials.best_of(1).expected)  # a failed trial has the worst score
    assert trials.best_of(2).expected == best_of(np.array(trials.scores), 2).expected
