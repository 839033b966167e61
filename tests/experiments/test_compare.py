"""gpt2-pl compare: groups, statistics, excluded runs, and the written reports."""

import csv
import json
import math
import os
import re
import statistics
import time

import numpy as np
import pytest
import yaml
from conftest import ROOT
from conftest import started as start
from helpers.refusals import refused
from helpers.runs import fake_run
from scipy import stats

from gpt2_pl.commands import main
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.report import page
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.summary import summary
from gpt2_pl.experiments.tables import cost_text, difference_caption, summary_table

CONFIG = ROOT / "configs"


@pytest.fixture
def runs(tmp_path):
    generator = np.random.default_rng(0)
    both = generator.random(400) < 0.6
    folders = []
    for strategy, share in (("lora", 0.45), ("full", 0.15)):
        for seed in (1, 2, 3):
            right = both | (generator.random(400) < share)
            folders.append(fake_run(tmp_path / f"runs/{strategy}/version_{seed}", strategy, seed, right))
    return folders


def test_compare_two_strategies_gives_group_means_and_differences(runs):
    (comparison,) = compare([Run.read(folder) for folder in runs])
    full, lora = comparison.groups
    assert (full.label, lora.label) == ("full", "lora")
    scores = [json.loads((folder / "metrics.json").read_text())["scores"]["val/accuracy"] for folder in runs[:3]]
    assert lora.mean("val/accuracy") == pytest.approx(statistics.mean(scores))
    assert lora.std("val/accuracy") == pytest.approx(statistics.stdev(scores))
    assert lora.cost("examples_per_second") == 52.0
    assert lora.cost("seconds_to_best") == 60.0
    assert full.differences == {}
    difference = lora.mean("val/accuracy") - full.mean("val/accuracy")
    found = lora.differences["val/accuracy"]
    assert found.contrast.estimate == pytest.approx(difference)
    low, high = found.contrast.interval()
    assert 0 < low < difference < high
    assert found.p_adjusted == found.contrast.p_value() < 0.01
    assert not comparison.notes


def test_compare_incomparable_or_repeated_runs_are_left_out_with_notes(runs, tmp_path):
    right = np.arange(400) % 3 > 0
    extra = [
        fake_run(tmp_path / "a", "dora", 1, right, status="running"),
        fake_run(tmp_path / "b", "dora", 1, right, base="other"),
        fake_run(tmp_path / "c", "dora", 1, right, text="other texts"),
        fake_run(tmp_path / "d", "dora", 1, right),
        fake_run(tmp_path / "e", "dora", 1, right),
        fake_run(tmp_path / "f", "dora", 2, right),
        fake_run(tmp_path / "g", "dora", 2, ~right),
    ]
    (comparison,) = compare([Run.read(folder) for folder in [*runs, *extra]])
    assert [group.label for group in comparison.groups] == ["full", "dora", "lora"]
    assert [run.folder.name for run in comparison.groups[1].runs] == ["d", "f"]
    notes = {re.search(r"/(\w) ", note)[1]: note for note in comparison.notes}
    assert "not a finished training run (running)" in notes["a"]
    assert "other base than most (x, other)" in notes["b"]
    assert "other texts than most" in notes["c"]
    assert notes["e"].endswith("seed 1: the same scores to the last digit")
    assert notes["g"].endswith("seed 2: OTHER SCORES")


def test_compare_different_settings_of_a_strategy_form_groups(runs, tmp_path):
    right = np.arange(400) % 3 > 0
    fake_run(tmp_path / "x", "lora", 1, right, lr=0.5)
    named = fake_run(tmp_path / "y", "own", 1, right, configs=False)
    (comparison,) = compare([Run.read(folder) for folder in [*runs, tmp_path / "x", named]])
    assert [group.label for group in comparison.groups] == ["full", "lora (lr 0.001)", "lora (lr 0.5)", "own"]


def test_compare_non_finite_guard_separates_only_runs_with_skipped_steps(runs):
    for folder, skipped in zip(runs[:3], (0, 0, 4), strict=True):
        account = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps({**account, "skipped_steps": skipped}))
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "on_non_finite_loss": "skip"}))
    (comparison,) = compare([Run.read(folder) for folder in runs])
    labels = {group.label: [run.record["seed"] for run in group.runs] for group in comparison.groups}
    assert labels == {"full": [1, 2, 3], "lora (skipped_steps None)": [1, 2], "lora (skipped_steps 4)": [3]}


def test_compare_command_writes_repeatable_reports_and_plots(runs, tmp_path, capsys):
    out = tmp_path / "report"
    command = ["compare", str(tmp_path / "runs"), "--out", str(out)]
    main(command)
    shown = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *(f"report.{ending}" for ending in ("md", "html", "csv", "json", "tex")),
        *(f"ParaphraseDetector_{name}.{ending}" for name in ("curves", "costs") for ending in ("png", "pdf", "svg")),
    }
    text, html = ((out / f"report.{ending}").read_text() for ending in ("md", "html"))
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith(str(out)))
    line = re.search(r"D = \+(\d\d\.\d) points \(95 % \+[\d.]+ to \+[\d.]+\), 3 \+ 3 seeds, 400 texts, df [\d.]+; "
                     r"variance: seeds \d+ %, texts \d+ %", text)  # fmt: skip
    assert line
    assert line[0] in " ".join(shown.split())
    assert re.search(
        r"\| ParaphraseDetector \| accuracy \| full: \d\d\.\d ± [^|]+ \| lora: [^|]+ \| needs --margin ", text
    )
    assert re.search(rf"\| lora \| \+{line[1]} \| [^|]+ to [^|]+ \| [^|]+\. \| [^|]+ to [^|]+ \| < 0.001 \| ", text)
    assert re.search(r"\| lora \| 3 \| \d\d\.\d ± \d\.\d ", text)
    assert text.startswith("# Comparison of 6 runs\n\n## In short\n")
    assert "| full | 3 |" in text
    assert "![ParaphraseDetector: curves](ParaphraseDetector_curves.png)" in text
    assert html.count("data:image/png;base64,") == 2
    assert html.count("<table>") == 6
    assert 'src="http' not in html
    with (out / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    found = json.loads((out / "report.json").read_text())
    assert [group["strategy"] for group in found[0]["groups"]] == ["full", "lora"]
    assert {float(row["val/accuracy"]) for row in rows if row["strategy"] == "lora"} == set(
        found[0]["groups"][1]["scores"]["val/accuracy"]
    )
    main(command)
    assert ((out / "report.md").read_text(), (out / "report.html").read_text()) == (text, html)


def test_compare_command_invalid_run_folder_is_refused(runs, run, tmp_path, capsys):
    for folder, name, text, word in (
        (runs[0], "metrics.json", "{", "metrics.json"),
        (runs[1], "config.yaml", None, "config.yaml"),
        (runs[2], "metrics.json", None, "run folder"),
        (runs[3], "predictions_val.csv", "row,text,label,prediction,p(a)\n1,x,b,a,1\n", "predictions_val.csv"),
        (runs[4], "predictions_val.csv", "row,text,label,prediction,p(a),p(b)\n", "predictions_val.csv"),
    ):
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)
        line = refused(run, capsys, "compare", folder, "--out", tmp_path / "report")
        assert word in line
        assert str(folder) in line
    assert not (tmp_path / "report").exists()


def test_compare_command_starts_without_importing_torch(tmp_path):
    before = os.times()
    done = start(tmp_path, "compare", "--help")
    assert done.returncode == 0
    assert sum(os.times()[2:4]) - sum(before[2:4]) < 3.0  # of the processor; under one was measured
    (tmp_path / "run").mkdir()
    for name in ("metrics.json", "config.yaml"):
        (tmp_path / "run" / name).write_text("{}")
    done = start(tmp_path, "compare", "run", "--out", "x", PYTHONPROFILEIMPORTTIME="1")
    assert "gpt2_pl.experiments.comparison" in done.stderr
    assert not re.search(r"\| +(torch|lightning|transformers|datasets)$", done.stderr, flags=re.M)


def test_compare_real_runs_gives_groups_scores_and_costs(run, base, pair_flags, tmp_path):
    for name in ("full", "lora"):
        files = ["--config", CONFIG / "task/quora.yaml", "--config", CONFIG / f"strategy/{name}.yaml"]
        run("fit", *files, *pair_flags, f"--model.base={base}", "--data.max_length=48", "--trainer.max_epochs=1")
    (comparison,) = compare([Run.read(folder) for folder in tmp_path.glob("lightning_logs/quora/version_*")])
    assert [group.label for group in comparison.groups] == ["full", "lora"]
    assert {name for name, found in comparison.groups[1].differences.items() if found.has_rows} == {
        f"{split}/{name}" for split in ("val", "test") for name in ("accuracy", "macro_f1", "f1")
    }
    assert comparison.notes == []  # the scores of the rows are the recorded ones
    assert comparison.groups[0].cost("trainable") > comparison.groups[1].cost("trainable")


def test_compare_more_training_rows_form_a_group_and_keep_the_baseline(runs, tmp_path):
    right = np.arange(400) % 3 > 0
    fake_run(tmp_path / "more", "full", 1, right, rows={"train": 900, "val": 400})
    fake_run(tmp_path / "dora", "dora", 1, right)
    everything = [Run.read(folder) for folder in [*runs, tmp_path / "more", tmp_path / "dora"]]
    (comparison,) = compare(everything)
    labels = [group.label for group in comparison.groups]
    assert labels == ["full (training_rows 100)", "full (training_rows 900)", "dora", "lora"]
    assert not comparison.notes
    (comparison,) = compare(everything, "full (training_rows 900)")
    assert comparison.groups[0].label == "full (training_rows 900)"
    with pytest.raises(InputError, match=r"dora, full, lora.*'nonsense'"):
        compare(everything, "nonsense")
    (comparison,) = compare(everything[:3] + everything[-1:])  # lora and dora
    assert comparison.notes == ["there is no baseline 'full'; differences are to dora"]


def test_compare_run_given_twice_gives_no_notes(runs):
    (comparison,) = compare([Run.read(folder) for folder in [*runs, runs[0], runs[0].parent / "." / runs[0].name]])
    assert not comparison.notes


def test_compare_perplexities_of_another_context_are_left_out(runs):
    """Their number of contexts can equal that of the other runs."""
    for key, value in {"context": 512, "stride": 64}.items():
        for folder in runs:
            account = json.loads((folder / "metrics.json").read_text())
            account["data"].update({"context": 256, "stride": 256, **({key: value} if folder == runs[0] else {})})
            (folder / "metrics.json").write_text(json.dumps(account))
        (comparison,) = compare([Run.read(folder) for folder in runs])
        assert comparison.notes == [f"{runs[0]} is left out: other {key} than most ({value})"]


def test_compare_run_without_primary_score_is_left_out(runs):
    account = json.loads((runs[0] / "metrics.json").read_text())
    del account["scores"]["val/accuracy"]
    (runs[0] / "metrics.json").write_text(json.dumps(account))
    (comparison,) = compare([Run.read(folder) for folder in runs])
    assert comparison.notes == [f"{runs[0]} is left out: it has no val/accuracy"]


def test_compare_adapted_base_counts_as_same_base_and_adds_its_cost(runs, tmp_path):
    folder = fake_run(tmp_path / "ulmfit", "ulmfit", 1, np.arange(400) % 3 > 0, base="adapted")
    account = json.loads((folder / "metrics.json").read_text())
    account["base"] |= {"origin": "abc", "recipe": "text+ulmfit_lm", "seconds": 30.0, "cpu_seconds": 45.0}
    (folder / "metrics.json").write_text(json.dumps({**account, "cpu_seconds": 100.0}))
    (comparison,) = compare([Run.read(folder) for folder in [*runs, folder]])
    assert not comparison.notes
    (group,) = (group for group in comparison.groups if group.label == "ulmfit")
    assert group.cost("seconds") == 120.0
    assert group.cost("seconds_to_best") == 90.0
    assert group.cost("cpu_seconds") == 145.0


def poem_run(folder, strategy, seed, losses):
    """Write a run of poems with the given losses per token."""
    fake_run(folder, strategy, seed, [True])
    account = json.loads((folder / "metrics.json").read_text())
    scores = {"val/loss": float(np.mean(losses)), "test/perplexity": float(np.exp(np.mean(losses)))}
    account |= {"task": "PoemGenerator", "monitor": "val/loss", "mode": "min", "scores": scores,
                "primary": "test/perplexity", "metrics": {"perplexity": {"higher_is_better": False}},
                "epochs": [{"epoch": 1, "val/loss": scores["val/loss"]}]}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(account))
    (folder / "predictions_val.csv").unlink()
    for split in ("val", "test"):
        rows = "".join(f"{i},100,{100 * loss}\n" for i, loss in enumerate(losses))
        (folder / f"losses_{split}.csv").write_text(f"poem,n_tokens,loss\n{rows}")


def test_compare_poem_runs_gives_differences_in_perplexity(tmp_path):
    generator = np.random.default_rng(0)
    of_poem = generator.normal(4.5, 0.3, 12)
    for seed in (1, 2):
        for strategy, more in (("full", 0.0), ("prefix", 0.05), ("lora", 0.001)):
            poem_run(tmp_path / f"{strategy}{seed}", strategy, seed, of_poem + more + generator.normal(0, 0.005, 12))
    (comparison,) = compare([Run.read(folder) for folder in sorted(tmp_path.iterdir())])
    full, lora, prefix = comparison.groups
    assert comparison.primary_metric == "test/perplexity"
    found = prefix.differences["test/perplexity"]
    logs = [np.log(group.values("test/perplexity")).mean() for group in (full, prefix)]
    assert found.contrast.estimate == pytest.approx(logs[0] - logs[1], abs=1e-6)
    assert float(found.estimate_text()) == pytest.approx(np.exp(logs[1] - logs[0]), abs=1e-3)
    low, high = map(float, found.interval_text().split(" to "))
    assert 1.0 < low < np.exp(logs[1] - logs[0]) < high
    assert found.sentence() == "Worse."
    assert prefix.differences["val/loss"].contrast.estimate == pytest.approx(-0.05, abs=0.01)
    assert comparison.best() is full
    assert lora.differences["test/perplexity"].p_adjusted > 0.05


def test_compare_cheapest_group_without_a_loss_of_the_margin_is_named(runs, tmp_path):
    text = (np.arange(400) % 8 > 5).astype(bool)
    fake_run(tmp_path / "bad", "prompt", 1, text)
    for folder, count in ((runs[3], 10**6), (runs[4], 10**6), (runs[5], 10**6), (tmp_path / "bad", 10)):
        account = json.loads((folder / "metrics.json").read_text())
        account["parameters"] = {"trainable": count, "total": 10**6}
        (folder / "metrics.json").write_text(json.dumps(account))
    everything = [Run.read(folder) for folder in [*runs, tmp_path / "bad"]]
    (comparison,) = compare(everything)
    assert comparison.cheapest() is None  # without a margin nothing is shown not to be worse
    (comparison,) = compare(everything, margin=1.0)
    assert comparison.best().label == comparison.cheapest().label == "lora"
    (comparison,) = compare(everything, "lora", 1.0)
    assert comparison.cheapest().label == "lora"
    for margin in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="margin must be above 0"):
            compare(everything, margin=margin)


@pytest.mark.slow
def test_compare_two_hundred_runs_takes_less_than_ten_seconds(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(200):
        fake_run(tmp_path / f"runs/{i}", f"s{i // 4}", i % 4, generator.random(1101) < 0.5)
    since = time.process_time()
    main(["compare", str(tmp_path / "runs"), "--margin=1", f"--out={tmp_path / 'report'}"])
    assert time.process_time() - since < 10.0
    (found,) = json.loads((tmp_path / "report/report.json").read_text())
    assert len(found["groups"]) == 50


def test_compare_resumed_run_joins_group_and_other_data_or_base_does_not(runs, tmp_path):
    """A resumed run joins its group; other training rows, training limits or bases form other groups."""
    right = np.arange(400) % 3 > 0

    def variant(name, settings=None, account=None):
        folder = fake_run(tmp_path / name, "full", 4, right)
        content = yaml.safe_load((folder / "config.yaml").read_text())
        for key, value in (settings or {}).items():
            content[key] = {**content[key], **value}
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        stored = json.loads((folder / "metrics.json").read_text())
        for key, value in (account or {}).items():
            stored[key] = {**stored[key], **value}
        (folder / "metrics.json").write_text(json.dumps(stored))
        return Run.read(folder)

    whole = [Run.read(folder) for folder in runs[3:]]
    model = {"model": {"class_path": "T", "init_args": {"optimizer": {"init_args": {"lr": 1e-3}}, "surgery": []}}}
    (comparison,) = compare([*whole, variant("resumed", model)])
    assert [len(group.runs) for group in comparison.groups] == [4]
    for other in (
        variant("limited", {"trainer": {"limit_train_batches": 0.1}}),
        variant("elsewhere", account={"data": {"files": {"train": ["other.csv"], "val": "dev.csv"}}}),
        variant("based", account={"base": {"digest": "other", "origin": "abc", "recipe": "text+ulmfit_lm"}}),
    ):
        (comparison,) = compare([*whole, other])
        assert sorted(len(group.runs) for group in comparison.groups) == [1, 3]


def test_compare_one_seed_per_group_recommends_no_cheapest_group(runs, tmp_path):
    probe = fake_run(tmp_path / "probe", "linear_probe", 1, np.zeros(400, bool))
    (comparison,) = compare([Run.read(folder) for folder in [runs[3], probe]])
    found = comparison.groups[1].differences["val/accuracy"]
    # one seed of each says nothing of others
    assert found.sentence() == "Not assessed: one seed; run it again with another --seed_everything."
    assert "comparison" not in summary([comparison], 80)
    assert "(Holm)" not in difference_caption(comparison)
    assert comparison.cheapest() is None
    assert found.line().endswith("these weights only")
    assert found.contrast.p_value() < 0.001


def test_compare_runs_without_row_outcomes_have_welchs_interval_and_no_verdict(runs):
    for folder in runs:
        (folder / "predictions_val.csv").unlink()
    (comparison,) = compare([Run.read(folder) for folder in runs])
    full, lora = comparison.groups
    found = lora.differences["val/accuracy"]
    welch = stats.ttest_ind(lora.values("val/accuracy"), full.values("val/accuracy"), equal_var=False)
    assert found.contrast.p_value() == pytest.approx(welch.pvalue)
    assert found.contrast.interval() == pytest.approx(tuple(welch.confidence_interval()))
    assert found.line().endswith("these texts only")
    assert found.sentence().startswith("Not assessed: not all runs have outcomes of the same rows")
    assert math.isnan(found.p_adjusted)


def test_page_turns_tables_of_many_columns_and_breaks_long_names(runs, tmp_path):
    main(["compare", str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"])
    shown = (tmp_path / "out/report.html").read_text()
    tables = [re.findall(r"<th>(.*?)</th>", table) for table in shown.split("<table>")[1:]]
    assert max(map(len, tables)) <= 8
    assert "&lt;&nbsp;0.001" in shown
    assert ["strategy", "lora"] in tables  # the differences, of ten columns in the report as text
    (comparison,) = compare([Run.read(folder) for folder in runs])
    comparison.groups[1].label = "prefix_tuning<b>"
    assert "prefix_<wbr>tuning&lt;b&gt;" in page([comparison], {})


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0"), (2.9, "< 0.1"), (3.1, "0.1"), (90, "1.5")])
def test_cost_text_small_cost_is_not_zero(tmp_path, seconds, text):
    run = Run.read(fake_run(tmp_path / "run", "full", 1, np.ones(10, bool)))
    run.record["cpu_seconds"] = seconds
    assert cost_text(RunGroup("full", [run]), "cpu_seconds") == text
    ((*_, baseline, _, _, _),) = summary_table([*compare([run])])[1]
    assert baseline.endswith(f", {text} CPU minutes")
