"""TextRegressor against transformers and scipy, and the commands that use it."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import metrics, write_splits
from helpers.refusals import names, refused
from scipy.stats import pearsonr, spearmanr
from transformers import GPT2ForSequenceClassification

from gpt2_pl.commands import main
from gpt2_pl.datamodules import STSB, TextRegression
from gpt2_pl.datamodules.synthetic import toy_reviews
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.rows import read_row_table, regression_scores
from gpt2_pl.experiments.statistics.contributions import pearson, spearman
from gpt2_pl.tasks import TextRegressor


@pytest.fixture(scope="module")
def number_files(tmp_path_factory):
    """Tab-separated reviews rated 0 to 4 in steps of a quarter."""

    def rated(n, seed):
        numbers = np.random.default_rng(seed).integers(0, 5, n) / 4
        rows = toy_reviews(n, seed)
        return [{**row, "sentiment": row["sentiment"] * 1.5 + more} for row, more in zip(rows, numbers, strict=True)]

    return write_splits(tmp_path_factory.mktemp("numbers"), rated)


@pytest.fixture(scope="module")
def flags(number_files, base):
    files = [f"--data.{split}_file={path}" for split, path in number_files.items()]
    return ["--config=task/sst5_regression", f"--model.base={base}", *files, "--data.max_length=48",
            "--trainer.max_epochs=2", "--model.optimizer.init_args.lr=0.003"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(fitted, flags):
    return fitted("fit", *flags, "--name=rated")


def table(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def test_text_regressor_loss_and_gradient_equal_transformers(base):
    task = TextRegressor(base=str(base), dropout=0.0)
    task.configure_model()
    theirs = GPT2ForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0).eval()
    with torch.no_grad():
        theirs.score.weight.copy_(task.head.linear.weight)
    input_ids = torch.randint(1, 400, (5, 9))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": torch.rand(5) * 5}
    loss = (task(batch) - batch["labels"]).square().mean()
    expected = theirs(input_ids, labels=batch["labels"]).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward(), expected.backward()
    torch.testing.assert_close(task.gpt2.wte.weight.grad, theirs.transformer.wte.weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [(pearson, pearsonr), (spearman, spearmanr)])
def test_correlation_contributions_equal_deletion_of_every_row(ours, theirs):
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 6, 50) / 2.0  # many ties
    predictions = np.round(labels + generator.normal(size=50), 1)
    whole = theirs(labels, predictions)[0]
    without = [theirs(np.delete(labels, i), np.delete(predictions, i))[0] for i in range(50)]
    value, contributions = ours(labels, predictions)
    assert value == pytest.approx(whole)
    assert contributions == pytest.approx([50 * whole - 49 * other for other in without])


@pytest.mark.parametrize("score", [pearson, spearman])
def test_correlation_with_equal_numbers_is_zero_and_with_nan_is_nan(score):
    labels = np.array([0.1, 3.0, 2.5, 0.7])
    value, contributions = score(labels, np.full(4, 2.6))
    assert value == 0.0
    assert contributions.tolist() == [0.0] * 4
    assert np.isnan(pearson(labels, np.full(4, np.nan))[0])


def test_fit_scores_and_tables_of_a_regressor_agree(trained):
    record = metrics(trained)
    assert record["monitor"] == "val/pearson"
    rows = table(trained / "predictions_test.csv")
    label, prediction = (np.array([float(row[name]) for row in rows]) for name in ("label", "prediction"))
    expected = {
        "loss": np.square(prediction - label).mean(),
        "mae": np.abs(prediction - label).mean(),
        "pearson": pearsonr(label, prediction)[0],
        "spearman": spearmanr(label, prediction)[0],
    }
    of_rows = read_row_table(trained, "test", list(record["metrics"])).scores()
    for name, value in expected.items():
        assert record["scores"][f"test/{name}"] == pytest.approx(value, abs=1e-4)
        assert of_rows.scores[f"test/{name}"].value == pytest.approx(value, abs=1e-4)
    assert of_rows.label_shares is None
    assert {name: one.value for name, one in regression_scores(label, prediction).items()} == pytest.approx(expected)


def test_classify_predict_and_transformers_give_the_numbers_of_the_test(trained, number_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tested = [float(row["prediction"]) for row in table(trained / "predictions_test.csv")]
    main(["classify", str(trained), "--input", str(number_files["test"]), "--out", "said.jsonl", "--precision=32-true"])
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert list(said[0]) == ["row", "sentence", "prediction"]
    bf16 = 2e-2  # the test ran in mixed precision where the machine supports it
    assert [row["prediction"] for row in said] == pytest.approx(tested, abs=bf16)
    main(["export", str(trained), "--format=hf", "--out=exported"])
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert theirs.config.num_labels == 1
    tokenizer = TextRegression(test_file=str(number_files["test"]), tokenizer=str(tmp_path / "exported")).tokenizer
    prompts = [tokenizer.encode(f"Review: {row['sentence'].strip()} Sentiment:").ids for row in said]
    complete = [(row, ids) for row, ids in zip(said, prompts, strict=True) if len(ids) <= 48]  # not truncated
    assert len(complete) > 5
    for row, ids in complete:
        assert theirs(torch.tensor([ids])).logits.item() == pytest.approx(row["prediction"], abs=1e-4)


def test_compare_inspect_and_references_read_runs_of_a_regressor(trained, run, flags, capsys, tmp_path):
    second = run("fit", *flags, "--name=rated", "--seed_everything=2", "--config=strategy/linear_probe",
                 "--trainer.max_epochs=2", "--model.num_dropout_samples=2", "--model.head_dropout=0.1")  # fmt: skip
    run("references", second, "--name=refs")
    capsys.readouterr()
    mean = metrics(tmp_path / "lightning_logs/refs/mean/version_0")["scores"]
    assert mean["test/pearson"] == 0.0
    assert mean["test/mae"] > metrics(tmp_path / "lightning_logs/refs/bag_of_words/version_0")["scores"]["test/mae"]
    run("compare", trained, second, tmp_path / "lightning_logs/refs", "--out=report", "--baseline=linear_probe")
    report = (tmp_path / "report/report.md").read_text()
    for text in ("TextRegressor", "test/pearson", "bag_of_words", "frozen_features"):
        assert text in report
    run("inspect", second, "--out=page")
    assert "Spearman correlation" in capsys.readouterr().out
    assert names(refused(run, capsys, "references", second, "--only=majority"), "only")
    assert names(refused(run, capsys, "classify", second, "--input=x.csv", "--out=y.csv", "--calibrated"), "calib")


def test_regression_without_classes_refuses_shots_in_one_line(run, flags, capsys):
    assert "TextRegression has no argument 'shots'" in refused(run, capsys, "fit", *flags, "--data.shots=4")


@pytest.mark.parametrize("label", ["", "six", "nan", "inf", "-0.1", "5.01"])
def test_number_out_of_range_names_file_and_row(base, tmp_path, label):
    file = tmp_path / "test.csv"
    file.write_text(f"sentence1,sentence2,score\na,b,2.5\nc,d,{label}\n")
    with pytest.raises(InputError, match=r"test\.csv, row 2: .*'score' must be a number in \[0, 5\]"):
        STSB(test_file=str(file), tokenizer=str(base)).setup()


def test_stsb_numbers_are_float32_and_skipped_rows_are_counted(base, tmp_path):
    file = tmp_path / "test.jsonl"
    rows = [{"sentence1": "a", "sentence2": "b", "label": value} for value in (3.2, 7, 5, "0.25")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = STSB(test_file=str(file), tokenizer=str(base), on_invalid_row="skip")
    with pytest.warns(UserWarning, match="1 of 4 rows"):
        data.setup()
    batch = next(iter(data.test_dataloader()))
    assert batch["labels"].dtype == torch.float32
    assert sorted(batch["labels"].tolist()) == pytest.approx([0.25, 3.2, 5.0])
    with pytest.raises(InputError, match=r"data\.min_label must be below data\.max_label"):
        TextRegression(min_label=2.0, max_label=2.0)
    with pytest.raises(TypeError, match="shots"):
        TextRegression(shots=4)
