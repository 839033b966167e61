"""Strategies beside reference baselines in a report."""

import json

import numpy as np
import pytest
from helpers.runs import fake_run
from scipy import stats

from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.reference_comparison import mark, reference_table
from gpt2_pl.experiments.report import markdown, page
from gpt2_pl.experiments.run import Run, counted_runs
from gpt2_pl.experiments.summary import summary

N = 800


@pytest.fixture
def comparison(tmp_path):
    """Three strategies of accuracy 0.8, 0.6 and 0.45, and references of 0.6 and 0.3."""
    generator = np.random.default_rng(0)
    for strategy, accuracy in (("full", 0.8), ("lora", 0.6), ("probe", 0.45)):
        for seed in (1, 2, 3):
            fake_run(tmp_path / strategy / f"{seed}", strategy, seed, generator.random(N) < accuracy)
    for name, accuracy in (("bag_of_words", 0.6), ("majority", 0.3)):
        folder = fake_run(tmp_path / name / "0", name, 0, np.arange(N) < accuracy * N)
        record = json.loads((folder / "metrics.json").read_text())
        del record["seed"]
        (folder / "metrics.json").write_text(json.dumps({**record, "reference": name}))
    (found,) = compare([Run.read(path.parent) for path in sorted(tmp_path.glob("*/*/metrics.json"))])
    return found


def test_mark_of_interval_below_above_or_around_zero(comparison):
    assert [group.label for group in comparison.groups] == ["full", "lora", "probe"]
    words, majority = sorted(comparison.references, key=lambda group: group.label)
    assert [mark(comparison, group, words).word for group in comparison.groups] == [
        "above", "not shown to be above", "below",
    ]  # fmt: skip
    assert {mark(comparison, group, majority).word for group in comparison.groups} == {"above"}


def test_mark_deterministic_reference_has_no_variance_over_seeds(comparison):
    """With seeds of independent rows, the variance is that of the seeds' means and of the reference's rows."""
    full, words = comparison.groups[0], comparison.references[0]
    contrast = mark(comparison, full, words).contrast
    assert contrast.seed_variances[1].of_mean == 0
    assert contrast.num_texts == N
    low, high = contrast.interval()
    difference = np.mean(full.values("val/accuracy")) - words.mean("val/accuracy")
    assert (low + high) / 2 == pytest.approx(difference)
    rows = [run.row_scores["val"].scores["val/accuracy"].contributions for run in full.runs]
    reference = words.runs[0].row_scores["val"].scores["val/accuracy"].contributions
    texts_only = stats.ttest_rel(np.mean(rows, 0), reference)
    assert contrast.standard_error >= abs(difference / texts_only.statistic) * (1 - 1e-9)


def test_report_counts_references_apart_from_runs(comparison):
    text = page([comparison], {})
    assert "9 runs and 2 references, finished" in text
    assert counted_runs(comparison.groups[0].runs[:1]) == "1 run"


def test_report_references_are_in_a_table_and_not_in_the_family(comparison):
    assert {group.label for group in comparison.family} == {"lora", "probe"}
    headings, cells = reference_table(comparison)
    assert headings[0] == "strategy"
    assert sorted(headings[1:]) == ["bag_of_words", "majority"]
    assert [row[0] for row in cells] == ["(score)", "full", "lora", "probe"]
    column = headings.index("bag_of_words")
    assert cells[0][column] == "60.0"
    assert cells[2][column].endswith("not shown to be above")
    assert cells[3][column].endswith(" below")
    printed = summary([comparison], width=200)
    assert "references by accuracy: above bag_of_words, majority" in printed
    assert "references by accuracy: above majority; not shown to be above bag_of_words" in printed
    assert "references by accuracy: above majority; below bag_of_words" in printed
    report = markdown([comparison], {})
    assert "reference baselines" in report
    assert "| (score) |" in report


def test_compare_references_alone_are_compared_like_strategies(comparison):
    runs = [run for group in comparison.references for run in group.runs]
    (alone,) = compare(runs)
    assert not alone.references
    assert {group.label for group in alone.groups} == {"bag_of_words", "majority"}
