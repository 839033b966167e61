"""Comparison on the rows that all runs have: the same figures as of runs that never had the other rows."""

import csv
import json

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.runs import fake_run
from test_epoch_selection import run_with_validations

from gpt2_pl.commands import main
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.claims import Outcome, judge_claims
from gpt2_pl.experiments.claims_schema import ClaimNode
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.planning import make_plan
from gpt2_pl.experiments.reference_comparison import mark
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.statistics.selection import half_splits

N = 400
MISSING = {"lora1": [3], "lora2": [3, 398], "full0": [0], "bag_of_words0": [7]}  # rows that runs lack


def edit_rows(file, edit):
    """Rewrite a table of rows."""
    with file.open(newline="") as lines:
        header, *rows = csv.reader(lines)
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([header, *edit(rows)])


def write_runs(folder, missing, repeated=0):
    """Write three runs of two strategies and a reference, without the missing rows of each."""
    generator = np.random.default_rng(0)
    for strategy, share, seeds in (("full", 0.5, 3), ("lora", 0.7, 3), ("bag_of_words", 0.4, 1)):
        for seed in range(seeds):
            run = fake_run(folder / f"{strategy}{seed}", strategy, seed, generator.random(N) < share)
            without = missing.get(run.name, []) if isinstance(missing, dict) else missing
            edit_rows(run / "predictions_val.csv", lambda rows, out=without: [r for r in rows if int(r[0]) not in out])
            if strategy == "bag_of_words":
                record = json.loads((run / "metrics.json").read_text())
                del record["seed"]
                (run / "metrics.json").write_text(json.dumps({**record, "reference": strategy}))
    return [Run.read(path.parent) for path in sorted(folder.glob("*/metrics.json"))]


@pytest.fixture
def both(tmp_path):
    """The comparison of runs that lack some rows, and that of the same runs without any of those rows."""
    dropped = sorted({row for rows in MISSING.values() for row in rows})
    runs, common = write_runs(tmp_path / "some", MISSING), write_runs(tmp_path / "all", dropped)
    for run in common:
        del run.record["scores"]["val/loss"]  # is not known without the dropped rows
        run.record["scores"]["val/accuracy"] = run.row_scores["val"].scores["val/accuracy"].value
    (one,), (other,) = (compare(of, margin=1, allow_missing_rows=True) for of in (runs, common))
    return one, other


def test_differences_on_common_rows_equal_those_of_runs_that_have_only_these(both):
    one, other = both
    for group, same in zip(one.groups, other.groups, strict=True):
        assert group.values("val/accuracy") == pytest.approx(same.values("val/accuracy"))
    found, expected = (of.groups[1].differences["val/accuracy"] for of in both)
    assert found == expected
    assert found.contrast.num_texts == N - 4
    assert "val/loss" not in one.groups[1].differences  # no table of rows gives it


def test_references_claims_and_plans_use_the_common_rows(both):
    marks = [mark(of, of.groups[1], of.references[0]).contrast for of in both]
    assert marks[0] == marks[1]
    assert marks[0].num_texts == N - 4
    claim = ClaimNode(arm="lora", claim="better", margin=1)
    judged = [judge_claims([claim], [of])[0] for of in both]
    assert judged[0] == judged[1]
    assert judged[0].outcome is Outcome.HOLDS
    assert "396 texts" in judged[0].figures
    plans = [make_plan(of, of.groups[1], "val/accuracy", 1.0) for of in both]
    assert plans[0] == plans[1]


def test_dropped_rows_are_counted_in_every_output(tmp_path, capsys):
    write_runs(tmp_path / "runs", MISSING)
    main(["compare", str(tmp_path / "runs"), f"--out={tmp_path / 'report'}"])
    shown = " ".join(capsys.readouterr().out.split())
    outputs = [shown, *((tmp_path / f"report/report.{end}").read_text() for end in ("md", "html"))]
    for output in outputs:
        assert "(396 rows; 4 more are dropped, as not all runs have them)" in output
        assert "4 of 400 rows of val are dropped, because not all runs have them: " in output
        assert "lora2 lacks 2" in output
    (found,) = json.loads((tmp_path / "report/report.json").read_text())
    assert found["rows_dropped"] == 4
    main(["power", str(tmp_path / "runs"), "--difference=1"])
    assert "4 more are dropped" in " ".join(capsys.readouterr().out.split())


def test_more_than_one_percent_of_missing_rows_is_refused_unless_allowed(tmp_path, run, capsys):
    write_runs(tmp_path / "runs", MISSING | {"lora0": [9]})
    for command in (["compare"], ["power", "--difference=1"]):
        line = refused(run, capsys, *command, tmp_path / "runs")
        assert "5 of 400 rows of val are not in all runs" in line
        assert "lora2 lacks 2" in line
        assert line.endswith("at most 1 % may be missing unless --allow_missing_rows is given")
    main(["compare", str(tmp_path / "runs"), "--allow_missing_rows"])
    assert "395 texts" in " ".join(capsys.readouterr().out.split())


def test_runs_without_a_common_row_are_refused_and_other_data_left_out(tmp_path):
    def keep(*kept):
        return lambda rows: [row for row in rows if int(row[0]) in kept]

    runs = write_runs(tmp_path / "a", {})[1:]
    edit_rows(runs[0].folder / "predictions_val.csv", lambda rows: [[int(r[0]) + N, "x", *r[2:]] for r in rows])
    edit_rows(
        runs[1].folder / "predictions_val.csv", lambda rows: [[*r[:2], "no", *r[3:]] for r in rows[:9]] + rows[9:]
    )
    (comparison,) = compare([Run.read(run.folder) for run in runs])
    assert comparison.notes[:2] == [
        f"{runs[0].folder} is left out: other rows than most",
        f"{runs[1].folder} is left out: other texts than most (row 0)",
    ]
    assert comparison.num_dropped == 0
    for one, rows in zip(runs[-2:], ((1, 2), (3, 4)), strict=True):
        edit_rows(one.folder / "predictions_val.csv", keep(*rows))
    with pytest.raises(InputError, match="RUN: no row of val is in all runs"):
        compare([Run.read(run.folder) for run in runs[2:]], allow_missing_rows=True)


def test_rows_in_another_order_are_the_same_rows(tmp_path):
    runs = write_runs(tmp_path / "a", {})
    (expected,) = compare(runs)
    edit_rows(runs[-1].folder / "predictions_val.csv", lambda rows: rows[::-1])
    (found,) = compare([Run.read(run.folder) for run in runs])
    assert not found.notes
    for score in ("val/accuracy", "val/loss"):
        one, other = (of.groups[1].differences[score].contrast for of in (found, expected))
        assert one.interval() == pytest.approx(other.interval())
        assert found.groups[1].values(score) == expected.groups[1].values(score)


def test_crossed_scores_choose_and_score_on_the_common_rows(tmp_path):
    made = {
        f"{name}{seed}": run_with_validations(tmp_path / f"{name}{seed}", name, seed)
        for name in ("full", "lora")
        for seed in (1, 2)
    }
    for file in tmp_path.glob("lora2/**/predictions_val.csv"):
        edit_rows(file, lambda rows: [row for row in rows if row[0] != "5"])
    lacking = Run.read(tmp_path / "lora2")
    values = [table.scores().scores["val/accuracy"].value for table in lacking.validations]
    lacking.record["scores"]["val/accuracy"] = max(values)
    (comparison,) = compare([Run.read(tmp_path / name) for name in ("full1", "full2", "lora1")] + [lacking])
    assert comparison.is_crossed
    assert comparison.num_dropped == 1
    for run in (run for group in comparison.groups for run in group.runs):
        _, labels, predictions = made[run.folder.name]
        right = np.delete(predictions == labels, 5, axis=1)
        scores = []
        for first in half_splits(run.compared_rows("val").digest, 119):
            on_first, on_second = (right[:, half].mean(1).argmax() for half in (first, ~first))
            scores.append([right[on_second if first[i] else on_first, i] for i in range(119)])
        assert run.score("val/accuracy") == pytest.approx(np.mean(scores))
        assert run.row_score("val/accuracy").contributions == pytest.approx(np.mean(scores, 0))
        assert run.best_score("val/accuracy") in right.mean(1)


def test_poems_that_a_run_lacks_are_dropped(tmp_path):
    losses = np.random.default_rng(0).normal(4, 0.3, (2, 2, 200))
    for (i, j), of_run in zip(np.ndindex(2, 2), losses.reshape(4, -1), strict=True):
        folder = fake_run(tmp_path / f"{i}{j}", ("full", "lora")[i], j, [True])
        (folder / "predictions_val.csv").unlink()
        record = json.loads((folder / "metrics.json").read_text())
        record |= {"monitor": "val/loss", "mode": "min", "scores": {"val/loss": float(of_run.mean())}}
        (folder / "metrics.json").write_text(json.dumps(record))
        kept = [f"{n},10,{10 * loss}\n" for n, loss in enumerate(of_run) if not (n == 17 and (i, j) == (1, 0))]
        (folder / "losses_val.csv").write_text("poem,n_tokens,loss\n" + "".join(kept))
    (comparison,) = compare([Run.read(path) for path in sorted(tmp_path.iterdir())])
    expected = np.delete(losses, 17, axis=2).mean((1, 2))
    assert comparison.groups[1].differences["val/loss"].contrast.estimate == pytest.approx(expected[0] - expected[1])
    assert comparison.num_dropped == 1


def test_texts_of_several_contexts_are_dropped_as_a_whole(tmp_path):
    losses = np.random.default_rng(0).normal(4, 0.3, (2, 2, 300))
    clusters = np.arange(300) // 3
    for (i, j), of_run in zip(np.ndindex(2, 2), losses.reshape(4, -1), strict=True):
        folder = fake_run(tmp_path / f"{i}{j}", ("full", "lora")[i], j, [True])
        (folder / "predictions_val.csv").unlink()
        record = json.loads((folder / "metrics.json").read_text())
        record |= {"monitor": "val/loss", "mode": "min", "scores": {"val/loss": float(of_run.mean())}}
        (folder / "metrics.json").write_text(json.dumps(record))
        rows = zip(range(300), of_run, clusters, strict=True)
        kept = [f"{n},10,{10 * loss},{of}\n" for n, loss, of in rows if not (of == 20 and (i, j) == (0, 1))]
        (folder / "losses_val.csv").write_text("row,n_tokens,loss,cluster\n" + "".join(kept))
    (comparison,) = compare([Run.read(path) for path in sorted(tmp_path.iterdir())])
    contrast = comparison.groups[1].differences["val/loss"].contrast
    expected = losses[:, :, clusters != 20].mean((1, 2))
    assert contrast.estimate == pytest.approx(expected[0] - expected[1])
    assert contrast.num_texts == 99
    by_run = [run.row_score("val/loss").contributions for group in comparison.groups for run in group.runs]
    means = losses[:, :, clusters != 20].reshape(4, 99, 3).mean(2)
    assert np.array([values - values.mean() for values in by_run]) == pytest.approx(  # in the order of names
        np.array([(row - row.mean())[np.argsort(list(map(str, np.delete(np.arange(100), 20))))] for row in means])
    )
