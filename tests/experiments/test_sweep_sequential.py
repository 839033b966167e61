"""Seeds that a sweep adds until every strategy is decided."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from helpers.refusals import names
from helpers.runs import fake_run
from helpers.sweeps import FILE, sweep

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.statistics.sequential import Decision
from gpt2_pl.experiments.sweep.config import SweepConfig

UNTIL = f"""
name: s
seeds: [1, 2, 3]
tasks:
  toy:
    configs: [{ROOT}/configs/quickstart.yaml]
    until: {{margin: 2, at_most: 6}}
    strategies:
      full:
      lora:
      llrd:
      prefix_tuning:
"""
ACCURACY = {"full": 0.80, "lora": 0.60, "llrd": 0.95, "prefix_tuning": 0.79}
N = 1000


@pytest.fixture
def rule(tmp_path, monkeypatch):
    """Read the sweep file and return its rule."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(UNTIL)

    def read(change=("", "")):
        (tmp_path / "s.yaml").write_text(UNTIL.replace(*change))
        (rule,) = SweepConfig.read(tmp_path / "s.yaml").sequential_seeds()
        return rule

    return read


def finish(rule):
    """Write the missing runs of all experiments, with accuracies that vary by seed."""
    for experiment in rule.experiments:
        for run, seed in zip(experiment.runs(), experiment.seeds, strict=True):
            if not run.folder.exists():
                generator = np.random.default_rng([seed, len(experiment.strategy)])
                accuracy = ACCURACY[experiment.strategy] + generator.normal(0, 0.01)
                fake_run(run.folder, experiment.strategy, seed, generator.random(N) < accuracy)


def test_sequential_seeds_clear_differences_are_decided_at_first_look(rule):
    seeds = rule()
    assert seeds.update() == []
    assert {one.strategy: one.seeds for one in seeds.experiments} == dict.fromkeys(ACCURACY, (1, 2, 3))
    finish(seeds)
    lines = seeds.update()
    assert [line.partition(":")[0] for line in lines] == ["toy lora", "toy llrd"]
    assert seeds.decisions["lora"][0] is Decision.INFERIOR
    assert seeds.decisions["llrd"][0] is Decision.BETTER
    assert re.search(r"after 3 seeds; D = -2\d\.\d\d points \(95 % ", lines[0])
    now = {one.strategy: one.seeds for one in seeds.experiments}
    assert now == {"full": (1, 2, 3, 4), "lora": (1, 2, 3), "llrd": (1, 2, 3), "prefix_tuning": (1, 2, 3, 4)}


def test_sequential_seeds_undecided_strategy_stops_at_most_and_restart_repeats_decisions(rule):
    seeds = rule()
    for _ in range(10):
        finish(seeds)
        seeds.update()
    decision, difference = seeds.decisions["prefix_tuning"]
    assert decision in (Decision.UNDECIDED, Decision.NON_INFERIOR)
    assert difference.contrast.num_seeds == (len(seeds.experiments[3].seeds),) * 2
    assert 4 <= len(seeds.baseline.seeds) <= 6
    again = rule()
    again.update()
    assert [one.seeds for one in again.experiments] == [one.seeds for one in seeds.experiments]
    assert {name: found for name, (found, _) in again.decisions.items()} == {
        name: found for name, (found, _) in seeds.decisions.items()
    }


def test_sequential_seeds_unfinished_run_waits(rule):
    seeds = rule()
    finish(seeds)
    file = seeds.experiments[1].runs()[1].folder / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "running"}))
    assert seeds.update() == []
    assert not seeds.decisions


def test_sequential_seeds_invalid_rule_names_key(rule):
    for change, key in (
        (("margin: 2", "margin: 0"), "tasks.toy.until.margin"),
        (("at_most: 6", "at_most: 16"), "tasks.toy.until.at_most"),
        (("at_most: 6", "at_most: 2"), "tasks.toy.until.at_most"),
        (("seeds: [1, 2, 3]", "seeds: [1, 2, 3, 4, 5, 6, 7]"), "until.at_most"),
        (("at_most: 6", "baseline: fulll"), "until.baseline"),
        (("      lora:", "      lora: {seeds: [4, 5, 6]}"), "until"),
    ):
        with pytest.raises(InputError) as error:
            rule(change)
        assert names(error.value, key), error.value


def test_sweep_until_adds_seeds_to_undecided_runs(tmp_path):
    strategies = f"      llrd: {{configs: [{ROOT}/configs/strategy/llrd.yaml]}}\n"
    until = "    until: {margin: 50, at_most: 3}\n    strategies:"
    (tmp_path / "s.yaml").write_text(FILE.replace("    strategies:", until) + strategies)
    status, out, error = sweep(tmp_path, "--max_parallel=2")
    assert status == 0, error
    versions = {path.parent.name for path in tmp_path.glob("lightning_logs/s/toy/*/*/metrics.json")}
    assert versions == {"seed_1", "seed_2", "seed_3"}
    assert "toy llrd: " in out
    assert "after 3 seeds" in out
