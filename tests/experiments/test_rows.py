"""Scores and contributions of rows against torchmetrics, scikit-learn and deletion row by row."""

import time

import numpy as np
import pytest
from sklearn.metrics import f1_score
from torch import tensor
from torchmetrics.functional.classification import multiclass_f1_score

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.rows import classification_scores, read_row_table


@pytest.mark.parametrize("K", [2, 5])
def test_classification_scores_of_random_predictions_equal_torchmetrics(K):
    generator = np.random.default_rng(K)
    label = generator.integers(0, K - (K == 5), 200)  # of five classes one is neither a label nor a prediction
    prediction = np.where(generator.random(200) < 0.5, label, generator.integers(0, K - (K == 5), 200))
    scores = classification_scores(label, prediction, K)
    expected = {"accuracy": (label == prediction).mean()}
    expected["macro_f1"] = float(multiclass_f1_score(tensor(prediction), tensor(label), K, average="macro"))
    if K == 2:
        expected["f1"] = float(multiclass_f1_score(tensor(prediction), tensor(label), K, average="none")[1])
    assert {name: score.value for name, score in scores.items()} == pytest.approx(expected)


def test_classification_contributions_equal_deletion_of_every_row():
    generator = np.random.default_rng(0)
    label = generator.choice(3, 60, p=[0.6, 0.37, 0.03])
    prediction = np.where(generator.random(60) < 0.6, label, generator.integers(0, 3, 60))
    classes = np.union1d(label, prediction)
    scores = classification_scores(label, prediction, 4)

    def macro_f1(label, prediction):
        return f1_score(label, prediction, labels=classes, average="macro", zero_division=0)

    whole = macro_f1(label, prediction)
    without = [macro_f1(np.delete(label, i), np.delete(prediction, i)) for i in range(60)]
    assert scores["macro_f1"].value == pytest.approx(whole)
    assert scores["macro_f1"].contributions == pytest.approx([60 * whole - 59 * other for other in without])
    assert scores["accuracy"].contributions == pytest.approx((label == prediction).astype(float))
    assert scores["accuracy"].is_binary
    assert not scores["macro_f1"].is_binary


def test_losses_of_poems_are_weighted_by_tokens(tmp_path):
    rows = np.array([[30.0, 10], [2.0, 1], [7.0, 4]])
    lines = "".join(f"{i},{n:.0f},{loss}\n" for i, (loss, n) in enumerate(rows))
    (tmp_path / "losses_test.csv").write_text(f"poem,n_tokens,loss\n{lines}")
    scores = read_row_table(tmp_path, "test", ()).scores().scores
    assert scores["test/loss"].value == pytest.approx(39 / 15)
    without = [(39 - loss) / (15 - n) for loss, n in rows]
    assert scores["test/loss"].contributions == pytest.approx([3 * 39 / 15 - 2 * other for other in without])
    assert scores["test/perplexity"] is scores["test/loss"]  # compared by its logarithm


def test_losses_of_clusters_are_deleted_together(tmp_path):
    generator = np.random.default_rng(0)
    cluster, n = generator.integers(0, 7, 40), generator.integers(1, 60, 40)
    loss, rhyme = generator.gamma(4.0, n), generator.random(40)
    columns = zip(n.tolist(), loss.tolist(), cluster.tolist(), rhyme.tolist(), strict=True)
    rows = "".join(f"{i},{','.join(map(str, cells))},x {i}\n" for i, cells in enumerate(columns))
    (tmp_path / "losses_val.csv").write_text(f"row,n_tokens,loss,cluster,rhyme,text\n{rows}")
    table = read_row_table(tmp_path, "val", ("rhyme",))
    scores = table.scores().scores
    assert len(table) == 7
    for name, sums, counts in (("loss", loss, n), ("perplexity", loss, n), ("rhyme", rhyme, np.ones(40))):
        without = [sums[cluster != c].sum() / counts[cluster != c].sum() for c in range(7)]
        value = sums.sum() / counts.sum()
        assert scores[f"val/{name}"].value == pytest.approx(value)
        assert scores[f"val/{name}"].contributions == pytest.approx([7 * value - 6 * other for other in without])
    (tmp_path / "losses_val.csv").write_text(f"row,n_tokens,loss,cluster,rhyme,text\n{rows.replace('x 3', 'y')}")
    assert read_row_table(tmp_path, "val", ()).digest != table.digest


def test_counts_of_text_scores_are_summed_and_checked(tmp_path):
    file, counts = tmp_path / "losses_test.csv", "3 3 2 1 0 0 3 2 1 0"
    header = "row,n_tokens,loss,bleu_counts,bleu_seen_counts,rouge_l_seen\n"
    file.write_text(f"{header}1,2,3.0,{counts},{counts},0.5\n2,2,3.0,5 4 5 4 3 2 5 4 3 2,,\n")
    metrics = ["bleu", "bleu_seen", "rouge_l_seen"]
    scores = read_row_table(tmp_path, "test", metrics).scores().scores
    assert scores["test/bleu"].value == pytest.approx(100 * (7 / 8 * 5 / 6 * 3 / 4 * 1) ** 0.25)
    assert scores["test/bleu_seen"].value == 0.0  # a text of three words has no 4-gram
    assert scores["test/rouge_l_seen"].value == 0.5
    for wrong in ("1 2 3", "3 3 2 1 0 0 3 2 1 x"):
        file.write_text(f"{header}1,2,3.0,{wrong},{counts},0.5\n")
        with pytest.raises(InputError, match=r"losses_test\.csv is broken"):
            read_row_table(tmp_path, "test", metrics)
    file.write_text(f"{header}1,2,3.0\n")
    with pytest.raises(InputError, match=r"losses_test\.csv is broken"):
        read_row_table(tmp_path, "test", metrics)


def test_outcome_columns_of_other_tasks_are_means_over_rows(tmp_path):
    content = "row,text,label,prediction,mae,note\n1,a,3,2,1,x\n2,b,3,3.5,0.5,y\n"
    (tmp_path / "predictions_val.csv").write_text(content)
    scores = read_row_table(tmp_path, "val", ("mae",)).scores().scores
    assert list(scores) == ["val/mae"]
    assert scores["val/mae"].value == 0.75
    assert list(scores["val/mae"].contributions) == [1.0, 0.5]


def test_label_shares_are_those_of_the_classes_in_their_order(tmp_path):
    for labels, shares in (("bba", [1 / 3, 2 / 3]), ("aaa", None)):
        rows = "".join(f"{i},x{i},{label},a,0.5,0.5\n" for i, label in enumerate(labels))
        (tmp_path / "predictions_val.csv").write_text(f"row,text,label,prediction,p(a),p(b)\n{rows}")
        assert read_row_table(tmp_path, "val", ()).scores().label_shares == shares


def test_contributions_of_two_hundred_classes_take_less_than_three_seconds():
    generator = np.random.default_rng(1)
    label, prediction = generator.integers(0, 200, (2, 2000))
    since = time.process_time()
    scores = classification_scores(label, prediction, 200)
    assert time.process_time() - since < 3.0
    assert len(scores["macro_f1"].contributions) == 2000
