"""Differences of arms from the tables of their runs: brute force, invariances, degenerate cases and false findings."""

import csv
import json

import numpy as np
import pytest
from helpers.runs import fake_run
from scipy import stats
from sklearn.metrics import f1_score

from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.differences import Difference, compare_arms, judge
from gpt2_pl.experiments.latex import latex
from gpt2_pl.experiments.levels import collapsed, score_interval, spread_interval
from gpt2_pl.experiments.report import as_json
from gpt2_pl.experiments.rows import RowScores, classification_scores
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.contrast import Arm, contrast, difference
from gpt2_pl.experiments.statistics.intervals import bootstrap_t_interval
from gpt2_pl.experiments.statistics.power import Pilot, detectable_difference
from gpt2_pl.experiments.summary import summary
from gpt2_pl.experiments.tables import difference_table
from gpt2_pl.experiments.units import Unit

POINTS = Unit(True, True)
# The published vector: outcomes of eight texts for three and four seeds.
A = ("11011011", "11010011", "10011111")
B = ("10011010", "10111000", "00011010", "10010011")


def bits(text):
    return np.array([character == "1" for character in text])


def write(folder, strategy, outcomes):
    """Write a run for every seed's outcomes and read them."""
    return [Run.read(fake_run(folder / f"{strategy}{i}", strategy, i, right)) for i, right in enumerate(outcomes)]


def find(runs, baseline, score="val/accuracy", unit=POINTS):
    return compare_arms(runs, baseline, score, unit, ("arm", "baseline"))


def in_memory(label, predictions, K=2):
    """Runs with these predictions (S, N), whose rows are not read from files."""
    runs = []
    for prediction in predictions:
        scores = classification_scores(label, prediction, K)
        run = Run("", {"scores": {f"val/{name}": score.value for name, score in scores.items()}}, {})
        run.row_scores = {"val": RowScores("x", {f"val/{name}": score for name, score in scores.items()})}
        runs.append(run)
    return runs


def test_difference_of_the_published_vector_is_read_from_run_folders(tmp_path):
    runs, baseline = (write(tmp_path, name, map(bits, rows)) for name, rows in (("lora", A), ("full", B)))
    found = find(runs, baseline)
    assert found.contrast.estimate == pytest.approx(0.2395833, abs=5e-8)
    assert found.contrast.interval() == pytest.approx((-0.0103302, 0.4894968), abs=2e-7)
    line = "D = +24.0 points (95 % -1.0 to +48.9), 3 + 4 seeds, 8 texts, df 37.9; variance: seeds 73 %, texts 27 %"
    assert found.line() == line


def test_difference_run_row_order_and_swap_change_nothing_but_the_sign(tmp_path):
    order = np.random.default_rng(0).permutation(8)
    first = find(*(write(tmp_path / "a", name, map(bits, rows)) for name, rows in (("lora", A), ("full", B)))).contrast
    shuffled = [
        write(tmp_path / "b", name, [bits(row)[order] for row in rows[::-1]])
        for name, rows in (("lora", A), ("full", B))
    ]
    other, swapped = find(*shuffled).contrast, find(*reversed(shuffled)).contrast
    assert (other.estimate, other.variance, other.df) == pytest.approx((first.estimate, first.variance, first.df))
    assert swapped.estimate == pytest.approx(-first.estimate)
    assert swapped.interval() == pytest.approx(tuple(-limit for limit in reversed(first.interval())))


def test_macro_f1_difference_equals_the_contrast_of_values_by_deletion():
    generator = np.random.default_rng(1)
    label = generator.choice(3, 40, p=[0.5, 0.3, 0.2])
    arms, runs = [], []
    for share in (0.7, 0.5):
        predictions = np.where(generator.random((3, 40)) < share, label, generator.integers(0, 3, (3, 40)))

        def f1(prediction, kept):
            return f1_score(label[kept], prediction[kept], labels=range(3), average="macro", zero_division=0)

        keeps = [np.arange(40) != i for i in range(40)]
        whole = np.array([f1(p, np.arange(40)) for p in predictions])
        values = [40 * w - 39 * np.array([f1(p, k) for k in keeps]) for w, p in zip(whole, predictions, strict=True)]
        arms.append(Arm(whole, np.array(values)))
        runs.append(in_memory(label, predictions, 3))
    found, expected = find(*runs, "val/macro_f1").contrast, difference(*arms)
    assert found.estimate == pytest.approx(expected.estimate)
    assert found.interval() == pytest.approx(expected.interval())


def test_macro_f1_intervals_in_simulated_worlds_cover_no_difference():
    generator, covered = np.random.default_rng(2), 0
    for _ in range(200):
        label = generator.choice(4, 245, p=[0.5, 0.3, 0.15, 0.05])
        hard = generator.random(245) < 0.3
        runs = []
        for _ in range(2):
            skill = 0.6 + 0.03 * generator.standard_normal((3, 1))
            right = ~hard | (generator.random((3, 245)) < skill)
            runs.append(in_memory(label, np.where(right, label, generator.integers(0, 4, (3, 245))), 4))
        low, high = find(*runs, "val/macro_f1").contrast.interval()
        covered += low <= 0 <= high
    assert 0.91 <= covered / 200 <= 1.0


@pytest.mark.slow
def test_family_without_differences_has_few_verdicts_and_pays_for_its_size():
    generator, false = np.random.default_rng(3), 0
    label = np.ones(200, int)
    for _ in range(100):
        hard = generator.random(200)
        arms = [
            in_memory(
                label, (hard < 0.7 + 0.03 * generator.standard_normal((3, 1))) ^ (generator.random((3, 200)) < 0.05)
            )
            for _ in range(6)
        ]
        judged = judge({str(i): find(arm, arms[0]) for i, arm in enumerate(arms[1:])}, None)
        false += any(one.sentence() in ("Better.", "Worse.") for one in judged.values())
        for one in judged.values():
            (low, high), (low_all, high_all) = one.contrast.interval(), one.together
            assert low_all < low < high < high_all
            assert one.p_adjusted >= one.contrast.p_value()
    assert false / 100 <= 0.09


def test_detectable_difference_is_that_of_a_plan_with_the_same_seeds():
    generator = np.random.default_rng(4)
    label = np.ones(300, int)
    runs = [
        in_memory(label, generator.random((4, 300)) < 0.7 + 0.1 * generator.standard_normal((4, 1))) for _ in range(2)
    ]
    judged = judge({"arm": find(*runs)}, 0.01)["arm"]
    assert judged.detectable == pytest.approx(detectable_difference(Pilot.from_contrast(judged.contrast), 4, 300))


@pytest.mark.parametrize(
    ("runs", "baseline", "reason", "notice"),
    [
        (A[:1], B, "one seed", None),
        (A[:2], B, "", "2 seeds estimate the variance over seeds poorly"),
        ((A[0], A[0]), B, "", "seeds have no effect in arm (deterministic?)"),
        ((A[0],) * 2, (A[0],) * 2, "identical on all 8 rows (for these weights, new texts may differ by ±36.9 points)",
         None),
        (("10", "01"), ("10", "01"), "", None),
        (("1", "0"), ("0", "0"), "fewer than two texts", None),
        (("11", "11"), ("00", "00"), "no spread", None),
        (("1111111101", "1111111101"), ("1111111111", "1111111111"), "", "one text dominates"),
    ],
)  # fmt: skip
def test_degenerate_differences_have_reasons_and_notices(runs, baseline, reason, notice):
    label = np.ones(len(runs[0]), int)
    found = find(*(in_memory(label, np.array([bits(row).astype(int) for row in rows])) for rows in (runs, baseline)))
    assert found.reason == reason
    assert notice is None or any(text.startswith(notice) for text in found.notices)
    judged = judge({"arm": found}, None)["arm"]
    if reason:
        remedy = "; run it again with another --seed_everything" if reason == "one seed" else ""
        assert judged.sentence() == f"Not assessed: {reason}{remedy}."
        assert judged.together_text() == ""
    if "identical" in reason or reason == "no spread":
        assert judged.interval_text() == ""
        assert "95 %" not in judged.line()


def test_deterministic_scores_that_are_no_sums_of_bits_have_no_interval_by_rounding():
    label = np.array([0, 0, 0, 1, 1, 2] * 5)
    same = in_memory(label, np.tile(np.array([0, 0, 1, 1, 1, 2] * 5), (3, 1)), 3)
    more = in_memory(label, np.tile(np.array([0, 0, 1, 1, 1, 2] * 5), (7, 1)), 3)
    assert find(same, more, "val/macro_f1").reason == "identical on all 30 rows"


def judged(low, high, margin, unit=POINTS):
    """The sentence of a difference with these limits, from many seeds."""
    error = (high - low) / 2 / stats.norm.ppf(0.975)
    one = difference(*(Arm(np.array([0.0, 1.0]), np.array([[0.0, 0.0], [1.0, 1.0]])),) * 2)
    from dataclasses import replace

    made = replace(one, estimate=(low + high) / 2, variance=error**2, df=1e9, num_texts=1000, text_variance=0.0)
    return judge({"a": Difference(made, unit, True)}, margin)["a"].sentence()


def test_sentences_of_verdicts_name_the_margin_and_never_equality():
    assert judged(0.015, 0.03, 0.01) == "Better by more than 1 point."
    assert judged(0.002, 0.03, 0.02) == "Better; the gain may be smaller than 2 points."
    assert judged(-0.008, 0.008, 0.01) == "No difference of 1 point or more in either direction."
    assert judged(-0.008, 0.018, 0.01) == "Not worse by 1 point or more; a gain is not shown."
    expected = "These data allow differences from -1.80 to +1.80 points; more seeds are needed."
    assert judged(-0.018, 0.018, 0.01) == judged(-0.018, 0.018, None) == expected
    ratio = Unit(False, False, True)
    assert judged(-0.02, 0.02, None, ratio).startswith(
        "These data allow differences from a perplexity ratio of 0.980 to"
    )
    assert judged(-0.05, -0.03, np.log(1.02), ratio) == "Worse by more than 2 %."


def test_score_intervals_are_wilsons_for_one_run_and_over_seeds_for_more():
    label = np.ones(12, int)
    (one,) = in_memory(label, [np.arange(12) < 10])
    assert score_interval([one], "val/accuracy", POINTS) == pytest.approx((0.5520, 0.9530), abs=5e-5)
    rows = np.array([bits(row) for row in A])
    several = in_memory(np.ones(8, int), rows.astype(int))
    expected = contrast([Arm(rows.mean(1), rows.astype(float))], [1.0]).interval()
    assert score_interval(several, "val/accuracy", POINTS) == pytest.approx(expected)
    low, high = spread_interval([1.0, 2.0, 3.0], Unit())
    assert (low, high) == pytest.approx((0.52, 6.28), abs=0.005)
    assert spread_interval([1.0], Unit()) is None


def test_intervals_of_shares_with_two_seeds_stay_within_possible_shares(tmp_path):
    far = [[True] * 8, [True] * 2 + [False] * 6]
    runs, baseline = (write(tmp_path, name, rows) for name, rows in (("lora", far), ("full", far[::-1])))
    found = judge({"lora": find(runs, baseline)}, None)["lora"]
    assert found.contrast.interval()[1] > 1.0  # by the formula
    assert (found.interval_text(), found.together_text()) == ("-100.0 to +100.0", "-100.0 to +100.0")
    assert score_interval(runs, "val/accuracy", POINTS) == (0.0, 1.0)
    assert spread_interval([1.0, 0.25], POINTS)[1] == 0.5
    loss, low = Unit(False), -3.0
    assert loss.limit_difference((low, 5.0)) == (low, 5.0)
    assert loss.limit_score(low) == low
    assert POINTS.format_interval((-3.0, 1.5), 10, reach=2.0) == "-200.0 to +150.0"
    assert np.isnan(POINTS.limit_difference((np.nan, np.nan))).all()


def test_reports_of_impossible_differences_say_that_none_could_have_been_shown(tmp_path):
    far = [[True] * 8, [True] * 2 + [False] * 6]
    runs = [run for name in ("full", "lora") for run in write(tmp_path, name, far)]
    comparisons = compare(runs)
    text = " ".join(summary(comparisons).split())
    assert "No difference could have been shown." in text
    assert "0.0 to 100.0" in text
    (found,) = (group.differences["val/accuracy"] for group in comparisons[0].compared)
    assert found.detectable > 1.0
    written = as_json(comparisons[0])["groups"][1]["differences"]["val/accuracy"]
    assert (written["low"], written["high"], written["low_together"]) == (-1.0, 1.0, -1.0)
    assert "100.0 to $+$100.0" in latex(comparisons)
    assert difference_table(comparisons[0])[1][0][7] == "none"


@pytest.mark.parametrize("is_skewed", [False, True])
def test_score_interval_of_one_run_of_losses_is_that_of_their_mean(tmp_path, is_skewed):
    losses = np.random.default_rng(7).normal(1.0, 0.7 if is_skewed else 0.1, 30)
    losses = np.exp(losses) if is_skewed else losses
    (run,) = write(tmp_path, "full", [[True]])
    (run.folder / "predictions_val.csv").unlink()
    lines = "".join(f"{i},100,{100 * loss}\n" for i, loss in enumerate(losses))
    (run.folder / "losses_val.csv").write_text(f"poem,n_tokens,loss\n{lines}")
    run = Run(run.folder, run.record, run.settings)
    expected = bootstrap_t_interval(losses) if is_skewed else stats.ttest_1samp(losses, 0).confidence_interval()
    for name, unit, convert in (("loss", Unit(False), float), ("perplexity", Unit(False, False, True), np.exp)):
        limits = score_interval([run], f"val/{name}", unit)
        assert limits == pytest.approx(tuple(map(convert, expected)))


def test_collapsed_runs_are_below_the_majority_class_of_the_training_rows(tmp_path):
    run = Run.read(fake_run(tmp_path / "full", "full", 1, [True] * 3 + [False] * 5))
    text = (run.folder / "predictions_val.csv").read_text().replace("yes,no,0.5,0.5\n", "no,yes,0.5,0.5\n", 2)
    (run.folder / "predictions_val.csv").write_text(text)  # two of eight rows are "no", and three are right
    for counts, is_collapsed in (({"train": [9, 1]}, False), ({"train": [1, 9]}, True), ({}, False)):
        record = {**run.record, "data": {**run.record["data"], "class_counts": counts}}
        again = Run(run.folder, record, run.settings)
        assert collapsed([again], "val/accuracy", POINTS) == [again] * is_collapsed


def test_failed_and_collapsed_runs_are_counted_and_collapsed_ones_kept(tmp_path):
    generator = np.random.default_rng(5)
    outcomes = [generator.random(400) < share for share in (0.8, 0.8, 0.8, 0.4)]
    full, lora = (write(tmp_path, name, outcomes) for name in ("full", "lora"))
    for run, changes in ((full[0], {"status": "failed"}), (lora[0], {})):
        record = json.loads((run.folder / "metrics.json").read_text()) | changes
        if not changes:
            record["scores"]["val/accuracy"] = float("nan")
        (run.folder / "metrics.json").write_text(json.dumps(record))
    (comparison,) = compare([Run.read(run.folder) for run in [*full, *lora]])
    for group in comparison.groups:
        assert group.notices[0].startswith("1 of 4 runs failed (95 % of the rate: 1 to 81 %)")
        assert group.notices[1].startswith("collapsed runs: 1 of 3 (seed 3: ")
        assert group.notices[1].endswith("95 % of the rate: 1 to 91 %), kept in the analysis")
        assert len(group.usable("val/accuracy")) == 3
    assert comparison.groups[1].differences["val/accuracy"].contrast.num_seeds == (3, 3)


def test_runs_whose_rows_contradict_their_scores_are_noted(tmp_path):
    (run,) = write(tmp_path, "full", [[True, False] * 10])
    with (run.folder / "predictions_val.csv").open(newline="") as file:
        table = list(csv.reader(file))
    table[1][3] = "no"
    with (run.folder / "predictions_val.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    (comparison,) = compare([Run.read(run.folder)])
    assert comparison.notes == [f"{run.folder}: val/accuracy is 0.5, its rows give 0.45"]


def test_few_seeds_with_many_arms_and_unequal_numbers_of_epochs_are_noted(tmp_path):
    generator = np.random.default_rng(6)
    runs = [
        run for i in range(6) for run in write(tmp_path, f"s{i}", generator.random((3, 100)) < 0.7)
    ]  # fmt: skip
    record = json.loads((runs[0].folder / "metrics.json").read_text())
    record["epochs"] = record["epochs"][:2]
    (runs[0].folder / "metrics.json").write_text(json.dumps(record))
    (comparison,) = compare([Run.read(run.folder) for run in runs])
    assert any(note.startswith("With 3 seeds and 5 comparisons only very large") for note in comparison.notes)
    assert any("Runs chose among 2 to 3 epochs" in note for note in comparison.notes)
