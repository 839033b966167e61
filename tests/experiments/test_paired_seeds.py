"""Differences of runs that are paired by seed: a loop over pairs, textbook tests, simulated worlds, and outputs."""

import json

import numpy as np
import pytest
from helpers.runs import fake_run
from scipy import stats

from gpt2_pl.commands import main
from gpt2_pl.experiments.claims import judge_claims
from gpt2_pl.experiments.claims_schema import ClaimNode
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.reference_comparison import mark
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.contrast import Arm, difference, paired_difference

N = 300


def write_runs(folder, outcomes):
    """Write a run for every strategy and seed with its outcomes of rows."""
    for (strategy, seed), right in outcomes.items():
        path = fake_run(folder / f"{strategy}{seed}", strategy, seed, right)
        if strategy in ("majority", "random_init"):
            record = json.loads((path / "metrics.json").read_text()) | {"reference": strategy}
            if strategy == "majority":
                del record["seed"]
            (path / "metrics.json").write_text(json.dumps(record))
    return [Run.read(path) for path in sorted(folder.iterdir())]


def outcomes(seeds):
    """Outcomes of runs that share a part of the rows of their seed."""
    generator = np.random.default_rng(0)
    of_seed = generator.random((9, N))
    return {
        (strategy, seed): np.where(generator.random(N) < 0.8, of_seed[seed], generator.random(N)) < share
        for strategy, (share, chosen) in seeds.items()
        for seed in chosen
    }


def crossed_moments(rows):
    """The crossed moments of one arm with weight 1, by loops: estimate, variance, degrees of freedom."""
    S, N = len(rows), len(rows[0])
    scores = [sum(row) / N for row in rows]
    columns = [sum(row[i] for row in rows) / S for i in range(N)]
    grand = sum(scores) / S
    s2 = sum((score - grand) ** 2 for score in scores) / (S - 1)
    residuals = ((rows[s][i] - scores[s] - columns[i] + grand) ** 2 for s in range(S) for i in range(N))
    floor = sum(residuals) / ((S - 1) * (N - 1)) / N
    of_seeds, df = max(s2, floor) / S, (S - 1) * (1 if s2 >= floor else N - 1)
    of_texts = max(0.0, sum((column - grand) ** 2 for column in columns) / (N - 1) / N - floor / S)
    variance = of_seeds + of_texts
    return grand, variance, variance**2 / (of_seeds**2 / df + of_texts**2 / (N - 1))


def test_paired_comparison_equals_the_crossed_moments_of_the_differences_of_pairs(tmp_path):
    made = outcomes({"full": (0.6, (0, 1, 2, 3)), "lora": (0.5, (4, 3, 1, 0))})
    (comparison,) = compare(write_runs(tmp_path, made), margin=1, paired_seeds=True)
    group = comparison.groups[1]
    found = group.differences["val/accuracy"]
    rows = [list(made["lora", s].astype(float) - made["full", s]) for s in (0, 1, 3)]
    estimate, variance, df = crossed_moments(rows)
    assert (found.contrast.estimate, found.contrast.variance, found.contrast.df) == pytest.approx(
        (estimate, variance, df)
    )
    assert ", 3 pairs of seeds, 300 texts, df " in found.line()
    assert found.is_tested
    expected = "runs without a partner of the same seed are left out of the differences: 1 of lora and 1 of full"
    assert group.notices == [expected]
    (unpaired,) = compare(write_runs(tmp_path / "again", made))
    assert unpaired.groups[1].differences["val/accuracy"].contrast.num_seeds == (4, 4)
    assert not unpaired.groups[1].notices


def test_paired_comparison_of_deterministic_arms_is_the_paired_t_test_over_texts(tmp_path):
    one, other = (np.random.default_rng(i).random(N) < 0.5 for i in range(2))
    made = {("full", s): one for s in range(3)} | {("lora", s): other for s in range(3)}
    (comparison,) = compare(write_runs(tmp_path, made), paired_seeds=True)
    contrast = comparison.groups[1].differences["val/accuracy"].contrast
    expected = stats.ttest_rel(other.astype(float), one.astype(float))
    assert contrast.p_value() == pytest.approx(expected.pvalue)
    assert contrast.interval() == pytest.approx(tuple(expected.confidence_interval()))


def test_arms_with_fewer_than_two_common_seeds_are_not_assessed(tmp_path, capsys):
    seeds = {"full": (0.6, (0, 1)), "lora": (0.5, (1, 2)), "probe": (0.5, (5, 6))}
    runs = write_runs(tmp_path, outcomes(seeds))
    (comparison,) = compare(runs, paired_seeds=True)
    _, lora, probe = comparison.groups
    advice = "run both again with another --seed_everything"
    assert lora.differences["val/accuracy"].sentence() == f"Not assessed: one pair of seeds; {advice}."
    assert "lora and full have 1 seed in common; --paired_seeds needs at least 2" in lora.notices
    assert probe.differences == {}
    assert "probe and full have no seeds in common; --paired_seeds needs at least 2" in probe.notices
    main(["compare", str(tmp_path), "--paired_seeds", f"--out={tmp_path / 'report'}"])
    text = (tmp_path / "report/report.md").read_text()
    assert "Not assessed: no pairs of seeds." in text
    assert "probe and full have no seeds in common" in " ".join(capsys.readouterr().out.split())


def test_paired_seeds_of_one_strategy_are_noted(tmp_path):
    (comparison,) = compare(write_runs(tmp_path, outcomes({"full": (0.6, (0, 1))})), paired_seeds=True)
    assert comparison.notes == ["--paired_seeds has no effect: there is one strategy."]


def test_power_paired_seeds_plans_pairs(tmp_path, capsys):
    write_runs(tmp_path, outcomes({"full": (0.6, (0, 1, 2)), "lora": (0.5, (0, 1, 2, 3))}))
    main(["power", str(tmp_path), "--difference=1", "--paired_seeds"])
    assert "pilot of 3 pairs of seeds" in " ".join(capsys.readouterr().out.split())


def test_references_without_seeds_stay_as_they_are_and_others_are_paired(tmp_path):
    seeds = {"full": (0.6, (0, 1, 2)), "lora": (0.5, (0, 1, 2)), "majority": (0.4, (0,)), "random_init": (0.4, (2, 1))}
    made = outcomes(seeds)
    runs = write_runs(tmp_path, made)
    both = [compare(runs, paired_seeds=is_paired)[0] for is_paired in (False, True)]
    for group, of_pairs in zip(*(comparison.groups for comparison in both), strict=True):
        unpaired, paired = (mark(of, one, of.references[0]) for of, one in zip(both, (group, of_pairs), strict=True))
        assert unpaired == paired  # of the majority class
    found = mark(both[1], both[1].groups[1], both[1].references[1]).contrast
    rows = [list(made["lora", s].astype(float) - made["random_init", s]) for s in (1, 2)]
    assert (found.estimate, found.variance, found.df) == pytest.approx(crossed_moments(rows))


def test_claims_are_judged_on_pairs_and_outputs_state_the_pairing(tmp_path, capsys):
    write_runs(tmp_path / "runs", outcomes({"full": (0.6, (0, 1, 2)), "lora": (0.5, (0, 1, 2, 3))}))
    (tmp_path / "claims.yaml").write_text("claims: [{arm: lora, claim: worse}]")
    claim = ClaimNode(arm="lora", claim="worse")
    for options, word, seeds in (([], "not paired", "4 + 3 seeds"), (["--paired_seeds"], "paired", "3 pairs of seeds")):
        check = [f"--check={tmp_path / 'claims.yaml'}", f"--out={tmp_path / 'out'}"]
        main(["compare", str(tmp_path / "runs"), *check, *options])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"Holm's correction; seeds {word}; margin" in shown
        assert shown.count(seeds) == 2  # the difference and the claim
        assert f"Seeds are {word}" in (tmp_path / "out/report.md").read_text()
        assert f"Seeds are {word}" in (tmp_path / "out/report.html").read_text()
        (found,) = json.loads((tmp_path / "out/report.json").read_text())
        assert found["paired_seeds"] == bool(options)
    (comparison,) = compare([Run.read(path) for path in (tmp_path / "runs").iterdir()], paired_seeds=True)
    (judged,) = judge_claims([claim], [comparison])
    assert "3 pairs of seeds" in judged.figures


@pytest.mark.parametrize(("correlation", "unpaired", "paired"), [(0.0, 96.4, 95.1), (0.9, 99.7, 95.3)])
def test_intervals_of_correlated_pairs_cover_as_specified(correlation, unpaired, paired):
    generator, covered, worlds = np.random.default_rng(1), np.zeros(2), 1000
    for _ in range(worlds):
        scores = generator.normal(0, np.sqrt(correlation), 3) + generator.normal(0, np.sqrt(1 - correlation), (2, 3))
        arms = [Arm(of_arm, np.repeat(of_arm[:, None], 2, axis=1)) for of_arm in scores]
        for i, interval in enumerate((difference(*arms).interval(), paired_difference(*arms).interval())):
            covered[i] += interval[0] <= 0 <= interval[1]
    assert 100 * covered / worlds == pytest.approx([unpaired, paired], abs=2)
