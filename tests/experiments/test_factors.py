"""Effects of factors against the textbook's contrasts of means."""

import itertools
import json

import numpy as np
import pytest
from helpers.runs import fake_run

from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.factors import effect_table, factor_effects
from gpt2_pl.experiments.run import Run

LEVELS = {"adapter": ["none", "lora", "prefix"], "rates": ["flat", "llrd"]}
N = 400


def design(folder, accuracy, seeds=(1, 2, 3), skip=()):
    """Write the runs of a 3 x 2 design; the accuracy of a cell is a function of its levels."""
    for cell in itertools.product(*LEVELS.values()):
        if cell in skip:
            continue
        name = "+".join(level for level in cell if level not in ("none", "flat")) or "full"
        for seed in seeds:
            generator = np.random.default_rng([seed, sum(map(ord, name))])
            run = fake_run(folder / name / f"seed_{seed}", name, seed, generator.random(N) < accuracy(*cell))
            levels = dict(zip(LEVELS, cell, strict=True))
            (run / "sweep.json").write_text(json.dumps({"files": {}, "flags": {}, "base": None, "levels": levels}))
    (comparison,) = compare([Run.read(path.parent) for path in sorted(folder.glob("*/*/metrics.json"))])
    return comparison


def means(comparison):
    return {tuple(group.runs[0].levels.values()): np.mean(group.values("val/accuracy")) for group in comparison.groups}


def test_factor_effects_are_differences_of_unweighted_cell_means(tmp_path):
    comparison = design(tmp_path, lambda adapter, rates: {"none": 0.6, "lora": 0.7, "prefix": 0.5}[adapter])
    mean = means(comparison)
    effects = {(effect.factors, effect.levels): effect for effect in factor_effects(comparison)}
    assert list(effects) == [
        (("adapter",), ("lora",)), (("adapter",), ("prefix",)), (("rates",), ("llrd",)),
        (("adapter", "rates"), ("lora", "llrd")), (("adapter", "rates"), ("prefix", "llrd")),
    ]  # fmt: skip
    lora = np.mean([mean["lora", rates] - mean["none", rates] for rates in LEVELS["rates"]])
    llrd = np.mean([mean[adapter, "llrd"] - mean[adapter, "flat"] for adapter in LEVELS["adapter"]])
    both = (mean["lora", "llrd"] - mean["none", "llrd"]) - (mean["lora", "flat"] - mean["none", "flat"])
    for key, expected in (
        ((("adapter",), ("lora",)), lora), ((("rates",), ("llrd",)), llrd),
        ((("adapter", "rates"), ("lora", "llrd")), both),
    ):  # fmt: skip
        assert effects[key].contrast.estimate == pytest.approx(expected, abs=1e-12)


def test_factor_effects_of_two_cells_equal_the_difference_of_strategies(tmp_path):
    comparison = design(tmp_path, lambda adapter, rates: 0.6, skip=[("prefix", "flat"), ("prefix", "llrd"),
                                                                     ("none", "llrd"), ("lora", "llrd")])  # fmt: skip
    (effect,) = factor_effects(comparison)
    (group,) = comparison.groups[1:]
    expected = group.differences["val/accuracy"].contrast
    assert effect.contrast.interval() == pytest.approx(expected.interval(), abs=1e-12)
    assert effect.contrast.df == pytest.approx(expected.df)


def test_factor_effects_interaction_in_data_is_found_and_absent_one_is_not(tmp_path):
    def accuracy(adapter, rates):
        return 0.5 + 0.3 * (adapter == "lora" and rates == "llrd")

    effects = {effect.levels: effect for effect in factor_effects(design(tmp_path, accuracy, seeds=range(1, 6)))}
    low, high = effects["lora", "llrd"].contrast.interval()
    assert 0.15 < low < 0.3 < high < 0.45
    assert effects["lora", "llrd"].p_adjusted < 0.01
    assert effects["prefix", "llrd"].p_adjusted > 0.05


def test_factor_effects_missing_cell_or_single_seed_has_a_reason(tmp_path):
    comparison = design(tmp_path / "a", lambda *_: 0.6, skip=[("lora", "llrd")])
    effects = {effect.levels: effect for effect in factor_effects(comparison)}
    assert effects[("lora",)].contrast is None
    assert effects[("lora",)].reason == "no run of lora+llrd"
    assert effects[("prefix",)].contrast is not None
    assert all(effect.contrast is None for effect in factor_effects(design(tmp_path / "b", lambda *_: 0.6, seeds=[1])))
    table = effect_table(comparison, list(effects.values()))
    assert len(table[1]) == len(effects)
    assert all(len(row) == len(table[0]) for row in table[1])


def test_factor_effects_runs_without_levels_have_none(tmp_path):
    for seed in (1, 2):
        for name in ("full", "lora"):
            fake_run(tmp_path / name / f"{seed}", name, seed, np.arange(10) % 3 > 0)
    (comparison,) = compare([Run.read(path.parent) for path in tmp_path.glob("*/*/metrics.json")])
    assert factor_effects(comparison) == []
