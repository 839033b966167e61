"""Interactions of combined strategies against the effects of a factorial design and loops over outcomes."""

import json

import numpy as np
import pytest
from helpers.runs import fake_run

from gpt2_pl.commands import main
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.factors import factor_effects
from gpt2_pl.experiments.hybrids import interactions
from gpt2_pl.experiments.run import Run

N = 400
CELLS = {"full": ("none", "flat"), "lora": ("lora", "flat"), "llrd": ("none", "llrd"), "lora+llrd": ("lora", "llrd")}


def write(folder, accuracy, seeds=(1, 2, 3)):
    """Write runs of strategies with an accuracy each."""
    for name, share in accuracy.items():
        for seed in seeds:
            generator = np.random.default_rng([seed, sum(map(ord, name))])
            run = fake_run(folder / name / f"seed_{seed}", name, seed, generator.random(N) < share)
            levels = dict(zip(("adapter", "rates"), CELLS.get(name, ()), strict=False))
            (run / "sweep.json").write_text(json.dumps({"files": {}, "flags": {}, "base": None, "levels": levels}))
    (comparison,) = compare([Run.read(path.parent) for path in sorted(folder.glob("*/*/metrics.json"))])
    return comparison


def test_interactions_equal_that_of_the_factorial_design(tmp_path):
    comparison = write(tmp_path, {"full": 0.5, "lora": 0.6, "llrd": 0.55, "lora+llrd": 0.65})
    (found,) = interactions(comparison)
    effect = next(one for one in factor_effects(comparison) if len(one.factors) == 2)
    assert [group.label for group in found.groups] == ["lora+llrd", "lora", "llrd"]
    assert found.contrast.estimate == pytest.approx(effect.contrast.estimate, abs=1e-12)
    assert found.contrast.interval() == pytest.approx(effect.contrast.interval(), abs=1e-12)
    assert found.p_adjusted == pytest.approx(effect.p_adjusted)
    mean = {group.label: np.mean(group.values("val/accuracy")) for group in comparison.groups}
    combined, alone = mean["lora+llrd"] - mean["llrd"], mean["lora"] - mean["full"]
    assert found.contrast.estimate == pytest.approx(combined - alone, abs=1e-12)


def test_interactions_conflict_is_found_and_written(tmp_path, capsys):
    write(tmp_path / "runs", {"full": 0.5, "lora": 0.8, "llrd": 0.8, "lora+llrd": 0.5}, range(1, 6))
    main(["compare", str(tmp_path / "runs"), f"--out={tmp_path / 'report'}"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "lora changes llrd by -" in shown
    assert shown.count("worse than their sum") == 1
    assert "| lora+llrd | lora and llrd | -" in (tmp_path / "report/report.md").read_text()
    assert "worse than their sum" in (tmp_path / "report/report.html").read_text()
    (report,) = json.loads((tmp_path / "report/report.json").read_text())
    (found,) = report["interactions"]
    assert found["high"] < -0.3 < -0.2
    assert found["p_holm"] < 0.01


def test_interactions_three_parts_give_every_split_that_was_run(tmp_path):
    shares = dict.fromkeys(("full", "a", "b", "c", "a+b", "b+a+c"), 0.5)
    found = [[group.label for group in one.groups] for one in interactions(write(tmp_path, shares))]
    assert sorted(found) == [["a+b", "a", "b"], ["b+a+c", "c", "a+b"]]


def test_interactions_missing_part_or_single_seed_gives_none(tmp_path):
    assert interactions(write(tmp_path / "a", {"full": 0.5, "lora": 0.6, "lora+llrd": 0.6})) == []
    assert interactions(write(tmp_path / "b", dict.fromkeys(CELLS, 0.5), seeds=(1,))) == []


def test_sentence_shown_by_the_uncorrected_interval_alone_is_no_interaction(tmp_path):
    """Three strategies and their three pairs: Holm's correction triples the smallest p-value."""
    shares = dict.fromkeys(("full", "a", "b", "c", "a+c", "b+c"), 0.5) | {"a+b": 0.455}
    comparison = write(tmp_path, shares)
    found = interactions(comparison)
    assert len(found) == 3
    unit = comparison.unit(comparison.primary_metric)
    for one in found:
        assert ("no interaction shown" in one.sentence(unit, "full")) == (one.p_adjusted >= 0.05)
    below = [one for one in found if one.contrast.interval()[1] < 0 and one.p_adjusted >= 0.05]
    assert below, [(one.contrast.interval(), one.p_adjusted) for one in found]


def test_interactions_without_comparable_runs_are_none(tmp_path):
    comparison = write(tmp_path, {"full": 0.5})
    comparison.groups = []
    assert interactions(comparison) == []
