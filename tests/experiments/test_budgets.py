"""Scores at equal budgets against enumeration and binomial order statistics, and how strategies were tuned."""

import itertools
import json

import numpy as np
import pytest
from helpers.searches import KEY, change_record, fake_search, sweep_run
from scipy import stats

from gpt2_pl.commands import main
from gpt2_pl.experiments.budgets import (
    best_of,
    budget_costs,
    budget_table,
    equal_budgets,
    space_text,
    tuning_as_json,
    tuning_table,
)
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.figures import _budgets, plot_names
from gpt2_pl.experiments.run import Run

LORA = [0.30, 0.55, 0.41, 0.60, 0.58, 0.12, 0.47, 0.52, 0.59, 0.36, 0.44, 0.57]
PREFIX = [0.50, 0.40, 0.45, None, 0.48, 0.47]


@pytest.fixture
def sweep(tmp_path):
    """Folder of a task in a sweep: full was not tuned, lora and prefix by random search, dora by an adaptive one."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "s/quora"
    for strategy in ("full", "dora", "lora", "prefix"):
        for seed in (1, 2):
            sweep_run(folder / strategy / f"seed_{seed}", strategy, seed, generator.random(100) < 0.6, 300.0)
    fake_search(folder, "lora", LORA, cpu_seconds=60.0)
    fake_search(folder, "prefix", PREFIX, cpu_seconds=90.0)
    fake_search(folder, "dora", LORA, cpu_seconds=30.0, sampler="tpe")
    return folder


def read(folder):
    (comparison,) = compare([Run.read(file.parent) for file in sorted(folder.glob("**/metrics.json"))])
    return comparison


def test_best_of_equals_the_mean_over_all_subsets_with_binomial_limits(sweep):
    comparison = read(sweep)
    trials = {group.label: group.trials for group in comparison.groups}
    for name, scores in (("lora", LORA), ("prefix", [score or 0.0 for score in PREFIX])):
        ordered = [None, *sorted(scores)]
        n = len(scores)
        for k in range(1, n + 1):
            found = best_of(comparison, trials[name], k)
            assert found.expected == pytest.approx(np.mean([max(s) for s in itertools.combinations(scores, k)]))
            share = stats.binom(n, 0.5 ** (1 / k))  # of trials below the median best of k
            lower = [r for r in range(1, n + 1) if share.cdf(r - 1) <= 0.025]
            upper = [s for s in range(1, n + 1) if share.sf(s - 1) <= 0.025]
            assert found.worse == (ordered[max(lower)] if lower else None)
            assert found.better == (ordered[min(upper)] if upper else None)
            assert found.is_imprecise == (k > n / 2)


def test_budgets_are_reached_by_every_random_search(sweep):
    """The cheapest search is that of prefix, 540 seconds; a quarter pays for one of its trials of 90 seconds."""
    comparison = read(sweep)
    assert equal_budgets(comparison, "cpu_seconds") == [135.0, 270.0, 540.0]
    for n in range(len(LORA)):  # a trial of lora takes longer than half of that
        change_record(sweep.parent.parent / f"s.search/quora/lora/trial_{n}", cpu_seconds=280.0)
    assert equal_budgets(read(sweep), "cpu_seconds") == [540.0]


def test_budget_table_has_the_best_of_the_trials_that_a_budget_pays_for(sweep):
    comparison = read(sweep)
    headings, cells = budget_table(comparison, "cpu_seconds")
    assert headings == ["strategy", "2.25 CPU minutes", "4.5 CPU minutes", "9 CPU minutes"]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["dora"] == ["not estimated"] * 3
    assert rows["full"][:2] == ["less than one run"] * 2
    assert rows["full"][2].endswith(", one run")
    for (name, cost, scores), column in itertools.product((("lora", 60, LORA), ("prefix", 90, PREFIX)), range(3)):
        k = int((135, 270, 540)[column] // cost)
        scores = [score or 0.0 for score in scores]
        expected = 100 * np.mean([max(subset) for subset in itertools.combinations(scores, k)])
        star = "*" if k > len(scores) / 2 else ""
        assert rows[name][column].startswith(f"{expected:.1f}{star} ("), (name, k)
        assert rows[name][column].endswith(f"k = {k}")


def test_arm_whose_trial_exceeds_the_budget_has_no_score(sweep):
    for n in range(len(LORA)):
        change_record(sweep.parent.parent / f"s.search/quora/lora/trial_{n}", cpu_seconds=1000.0)
    rows = {row[0]: row[1:] for row in budget_table(read(sweep), "cpu_seconds")[1]}
    assert rows["lora"] == ["less than one trial"]


def test_budgets_are_gpu_time_and_flops_if_every_arm_records_them(sweep):
    files = sorted(sweep.parent.parent.glob("**/metrics.json"))
    assert budget_costs(read(sweep)) == ["cpu_seconds"]
    for file in files:
        change_record(file.parent, device="NVIDIA H200", training_flops=1e12)
    assert budget_costs(read(sweep)) == ["gpu_seconds", "training_flops"]
    change_record(sweep / "full/seed_1", device="cpu")
    change_record(sweep / "full/seed_2", device="cpu", training_flops=None)
    assert budget_costs(read(sweep)) == ["cpu_seconds", "training_flops"]
    for file in files:
        change_record(file.parent, cpu_seconds=None, training_flops=None)
    assert budget_costs(read(sweep)) == []


def test_budgets_without_a_random_search_have_no_table(sweep):
    comparison = read(sweep)
    comparison.groups = [group for group in comparison.groups if group.label in ("full", "dora")]
    assert budget_table(comparison, "cpu_seconds")[1] == []
    comparison.groups = comparison.groups[:1]
    assert tuning_table(comparison)[1] == []


def test_tuning_table_has_one_line_for_every_arm(sweep):
    rows = {row[0]: row[1:] for row in tuning_table(read(sweep))[1]}
    searched = "model.optimizer.lr: 1e-05 to 0.01, log"
    assert rows["lora"] == ["12", "0", "random", "0", searched, "model.optimizer.lr: 0.001", "12"]
    assert rows["prefix"][:3] == ["6", "1", "random"]
    assert rows["dora"][:3] == ["12", "0", "tpe"]
    assert rows["full"] == ["0", "", "", "", "no search is known: settings were given", "", ""]


def test_space_text_lists_ranges_steps_and_choices():
    space = {"data.batch_size": [8, 16], "model.surgery": {"low": 1, "high": 9, "step": 2}, KEY: {"low": 1, "high": 2}}
    assert space_text(space) == (
        "data.batch_size: one of 8, 16; model.surgery: 1 to 9, step 2; model.optimizer.lr: 1 to 2"
    )
    assert len(space_text({"data.batch_size": list(range(1000))})) < 100
    assert space_text({"data.batch_size": {"low": [1], "step": "x"}})  # of an invalid file


def test_unequal_numbers_of_trials_are_noted(sweep):
    note = next(note for note in read(sweep).notes if "different numbers of trials" in note)
    assert "(full: no search is known, dora: 12, lora: 12, prefix: 6)" in note
    assert note.endswith("An untuned strategy beside tuned ones is compared unfairly.")
    assert any("(dora: tpe)" in note for note in read(sweep).notes)
    comparison = read(sweep / "lora")
    assert comparison.notes == []


def test_budget_figure_shows_estimates_by_mean_cost_and_no_adaptive_search(sweep):
    comparison = read(sweep)
    assert plot_names(comparison) == ["curves", "costs", "budgets"]
    figure = _budgets(comparison)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"full (no search)", "lora (12 trials)", "prefix (6 trials)"}
    shown = lines["lora (12 trials)"]
    np.testing.assert_allclose(shown.get_xdata(), np.arange(1, 7))  # minutes; the others are pale
    means = [100 * np.mean([max(s) for s in itertools.combinations(LORA, k)]) for k in range(1, 7)]
    np.testing.assert_allclose(shown.get_ydata(), means)
    pale = axes.lines[axes.lines.index(shown) + 1]
    np.testing.assert_allclose(pale.get_xdata(), np.arange(6, 13))
    assert pale.get_alpha() < 0.5
    assert pale.get_ydata()[-1] == pytest.approx(60.0)


def test_budget_figure_of_an_arm_without_a_search_is_its_learning_curve(sweep):
    comparison = read(sweep / "full")
    figure = _budgets(comparison)
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [5 / 3, 10 / 3, 5.0])
    runs = comparison.groups[0].runs
    means = [100 * np.mean([run.record["epochs"][e]["val/accuracy"] for run in runs]) for e in range(3)]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), means)
    assert len(axes.collections) == 1
    for run in runs:
        base = {"digest": "x", "origin": "abc", "seconds": 60.0, "cpu_seconds": 120.0}
        change_record(run.folder, base=base)
    axes = _budgets(read(sweep / "full")).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [2 + 5 / 3, 2 + 10 / 3, 7.0])


def test_budget_figure_of_losses_with_failed_trials_is_drawn(sweep):
    for file in sweep.parent.parent.glob("**/metrics.json"):
        record = json.loads(file.read_text())
        record["scores"]["val/loss"] = 1 - record["scores"]["val/accuracy"]
        change_record(file.parent, scores=record["scores"], monitor="val/loss", mode="min")
    comparison = read(sweep)
    trials = next(group.trials for group in comparison.groups if group.label == "prefix")
    first, second = (best_of(comparison, trials, k) for k in (1, 2))
    assert (first.expected, first.worse) == (np.inf, None)
    losses = [1 - score for score in PREFIX if score is not None]
    pairs = [min(pair) for pair in itertools.combinations([*losses, np.inf], 2)]
    assert second.expected == pytest.approx(np.mean(pairs))
    lines = _budgets(comparison).axes[0].lines
    shown = next(line for line in lines if line.get_label() == "prefix (6 trials)")
    np.testing.assert_allclose(shown.get_xdata(), [3.0, 4.5])
    rows = {row[0]: row[1:] for row in budget_table(comparison, "cpu_seconds")[1]}
    assert rows["prefix"][0] == "not finite (≥ 0.5), k = 1"
    json.dumps(tuning_as_json(comparison, trials), allow_nan=False)


def test_report_lists_searches_budgets_and_curves(sweep, tmp_path):
    main(["compare", str(sweep), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/report.md").read_text()
    assert "How each strategy was tuned" in text
    assert "| strategy | 2.25 CPU minutes | 4.5 CPU minutes | 9 CPU minutes |" in text
    assert (tmp_path / "out/ParaphraseDetector_budgets.pdf").is_file()
    (found,) = json.loads((tmp_path / "out/report.json").read_text())
    tuning = {group["strategy"]: group["tuning"] for group in found["groups"]}
    assert tuning["full"] is None
    assert tuning["dora"]["best_of"] == []
    assert [point["costs"]["cpu_seconds"] for point in tuning["prefix"]["best_of"]] == [90.0 * k for k in range(1, 7)]
    assert tuning["lora"]["best_of"][11]["expected"] == pytest.approx(0.6)
