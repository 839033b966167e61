"""Comparison of runs by scores of rows that did not choose the epoch."""

import json

import numpy as np
import pytest
from helpers.runs import fake_run
from torch import tensor
from torchmetrics.functional.classification import multiclass_f1_score

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.report import about, markdown
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.selection import select
from gpt2_pl.experiments.statistics.selection import half_splits
from gpt2_pl.experiments.tables import selection_table

N = 120
HEADER = "row,text,label,prediction,p(no),p(yes)\n"


def write_rows(folder, labels, predictions, split="val"):
    folder.mkdir(parents=True, exist_ok=True)
    words = ["no", "yes"]
    rows = (
        f"{i},t{i},{words[a]},{words[b]},0.5,0.5\n" for i, (a, b) in enumerate(zip(labels, predictions, strict=True))
    )
    (folder / f"predictions_{split}.csv").write_text(HEADER + "".join(rows))


def run_with_validations(folder, strategy, seed, num_validations=4, test=False):
    """Return a run, the labels (N,) and the predictions (E, N) of its validations."""
    labels = np.random.default_rng(0).integers(0, 2, N)
    generator = np.random.default_rng([seed, len(strategy)])
    predictions = np.where(generator.random((num_validations, N)) < 0.7, labels, 1 - labels)
    right = (predictions == labels).mean(1)
    fake_run(folder, strategy, seed, np.full(N, True))
    for i, of_validation in enumerate(predictions):
        write_rows(folder / "validations" / f"step_{9 * (i + 1)}", labels, of_validation)
    write_rows(folder, labels, predictions[right.argmax()])
    record = json.loads((folder / "metrics.json").read_text())
    record["scores"] = {"val/accuracy": right.max(), "best_epoch": int(right.argmax()) + 1}
    record["epochs"] = [{"epoch": i + 1, "val/accuracy": score} for i, score in enumerate(right)]
    if test:
        write_rows(folder, labels, predictions[0], "test")
        record["scores"]["test/accuracy"] = right[0]
    (folder / "metrics.json").write_text(json.dumps(record))
    return Run.read(folder), labels, predictions


def arms(folder, **options):
    names = [("full", 1), ("full", 2), ("lora", 1), ("lora", 2)]
    return [run_with_validations(folder / f"{name}{seed}", name, seed, **options) for name, seed in names]


def crossed_files(labels, predictions, digest):
    """Yield the predictions of every crossed file, by a loop over rows."""
    for first in half_splits(digest, N):
        chosen = []
        for half in (first, ~first):
            right = [
                np.mean([p == t for p, t, used in zip(row, labels, half, strict=True) if used]) for row in predictions
            ]
            chosen.append(right.index(max(right)))
        yield np.array([predictions[chosen[1] if first[i] else chosen[0], i] for i in range(N)])


def test_select_scores_equal_scoring_of_every_crossed_file(tmp_path):
    run, labels, predictions = run_with_validations(tmp_path / "a", "full", 1)
    selection = select(run)
    files = list(crossed_files(labels, predictions, run.validations[0].digest))
    assert selection.scores["val/accuracy"].value == pytest.approx(np.mean([(file == labels).mean() for file in files]))
    assert selection.scores["val/accuracy"].contributions == pytest.approx(
        np.mean([file == labels for file in files], 0)
    )
    f1 = [float(multiclass_f1_score(tensor(file), tensor(labels), 2, average="macro")) for file in files]
    assert selection.scores["val/macro_f1"].value == pytest.approx(np.mean(f1))
    assert selection.chosen.sum() == 2 * len(files)


def test_compare_runs_with_all_validations_scores_rows_that_did_not_choose(tmp_path):
    found = arms(tmp_path)
    (comparison,) = compare([run for run, *_ in found])
    assert comparison.is_crossed
    expected = [select(run).scores["val/accuracy"].value for run, *_ in found[:2]]
    assert comparison.groups[0].mean("val/accuracy") == pytest.approx(np.mean(expected))
    best = np.mean([(predictions == labels).mean(1).max() for _, labels, predictions in found[:2]])
    assert comparison.groups[0].mean("val/accuracy") < best
    assert "half-splits" in about(comparison)
    headings, cells = selection_table(comparison)
    assert cells[0][headings.index("best epoch")] == f"{100 * best:.1f}"
    assert float(cells[0][headings.index("optimism")]) == pytest.approx(100 * (best - np.mean(expected)), abs=0.05)
    assert "did not choose it" in markdown([comparison], {})


def test_compare_runs_with_test_scores_compares_these_and_shows_the_optimism(tmp_path):
    found = arms(tmp_path, test=True)
    (comparison,) = compare([run for run, *_ in found])
    assert comparison.primary_metric == "test/accuracy"
    assert not comparison.is_crossed
    assert not comparison.is_optimistic
    expected = np.mean([(predictions[0] == labels).mean() for _, labels, predictions in found[:2]])
    assert comparison.groups[0].mean("test/accuracy") == pytest.approx(expected)
    headings, cells = selection_table(comparison)
    assert cells[0][headings.index("test/accuracy")].startswith(f"{100 * expected:.1f}")


def test_compare_some_runs_without_test_scores_compares_validation_scores(tmp_path):
    runs = [run for run, *_ in arms(tmp_path, test=True)]
    record = {**runs[0].record, "scores": {"val/accuracy": runs[0].record["scores"]["val/accuracy"]}}
    (tmp_path / "full1/metrics.json").write_text(json.dumps(record))
    (comparison,) = compare([Run.read(run.folder) for run in runs])
    assert comparison.primary_metric == "val/accuracy"
    assert any("3 of 4 runs have scores of a test set" in note for note in comparison.notes)


def test_compare_one_run_without_validations_keeps_the_scores_of_the_best_epoch(tmp_path):
    found = arms(tmp_path)
    for file in (tmp_path / "lora2/validations").rglob("*.csv"):
        file.unlink()
    (comparison,) = compare([Run.read(run.folder) for run, *_ in found])
    assert comparison.is_optimistic
    assert "optimistic" in about(comparison)
    assert [row[0] for row in selection_table(comparison)[1]] == ["full"]
    best = np.mean([run.record["scores"]["val/accuracy"] for run, *_ in found[:2]])
    assert comparison.groups[0].mean("val/accuracy") == pytest.approx(best)


def test_select_validations_of_another_run_or_other_rows_are_refused(tmp_path):
    run, labels, predictions = run_with_validations(tmp_path / "a", "full", 1)
    best = int((predictions == labels).mean(1).argmax())
    write_rows(run.folder / f"validations/step_{9 * (best + 1)}", labels, 1 - labels)
    with pytest.raises(InputError, match="best validation must have the score"):
        select(Run.read(run.folder))
    write_rows(run.folder / f"validations/step_{9 * (best + 1)}", labels[:-1], predictions[best][:-1])
    with pytest.raises(InputError, match="same rows"):
        select(Run.read(run.folder))
