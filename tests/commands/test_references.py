"""Reference baselines for the data of a run."""

import csv
import shutil

import numpy as np
import pytest
import sacrebleu
from conftest import metrics
from helpers.configs import CONFIGS
from helpers.refusals import refused
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from gpt2_pl.commands import main
from gpt2_pl.datamodules.sonnets import read_poems
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.reference_comparison import reference_table, text_reference_table
from gpt2_pl.experiments.references import (
    bag_of_words,
    linear_model,
    majority,
    mean_label,
    nearest_source,
    random_continuation,
)
from gpt2_pl.experiments.run import Run


@pytest.fixture(scope="module")
def trained(fitted, base, files):
    """Run folder of a classifier of two classes, trained for one epoch."""
    flags = [f"--data.{split}_file={path}" for split, path in files.items()]
    task = ["fit", f"--config={CONFIGS}/task/imdb.yaml", f"--model.base={base}", "--data.max_length=48"]
    return fitted(*task, *flags, "--trainer.max_epochs=1", "--early_stopping_patience=null")


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """Copy of the run in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "lightning_logs/imdb/version_0")


def rows(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t" if "predictions" not in str(file) else ","))


def test_references_deterministic_ones_are_runs_on_the_same_rows(workplace, files, capsys):
    main(["references", "lightning_logs/imdb/version_0"])
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("compare them: ")
    folder = workplace.parents[1] / "references/imdb"
    run = Run.read(workplace)
    for name in ("majority", "bag_of_words", "frozen_features"):
        reference = Run.read(folder / name / "version_0")
        assert reference.strategy == name
        assert reference.comparison_key("val") == run.comparison_key("val")
        for split in ("val", "test"):
            scored = reference.row_scores[split].scores
            recorded = metrics(reference.folder)["scores"]
            for metric in ("accuracy", "macro_f1"):
                assert recorded[f"{split}/{metric}"] == pytest.approx(scored[f"{split}/{metric}"].value)
    labels = [int(row["sentiment"]) for row in rows(files["train"])]
    most_frequent = int(np.mean(labels) > 0.5)
    expected = np.mean([int(row["sentiment"]) == most_frequent for row in rows(files["test"])])
    assert metrics(folder / "majority/version_0")["scores"]["test/accuracy"] == pytest.approx(expected)


@pytest.fixture(scope="module")
def poem_run(fitted, base, poem_files):
    """Run folder of a poem generator, trained for one step."""
    flags = [f"--data.{split}_file={path}" for split, path in poem_files.items()]
    task = ["fit", f"--config={CONFIGS}/task/sonnets.yaml", f"--model.base={base}", "--data.max_length=64"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--early_stopping_patience=null"]
    return fitted(*task, *flags, *short)


def test_references_of_poems_are_runs_with_the_scores_of_their_texts(poem_run, poem_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(poem_run, tmp_path / "lightning_logs/poems/version_0")
    main(["references", str(folder), "--name=refs", "--draws=3"])
    refs = tmp_path / "lightning_logs/refs"
    versions = {path.parent.name: len(list(path.parent.glob("version_*"))) for path in refs.glob("*/version_0")}
    assert versions == {"random_continuation": 3, "copy_source": 1, "nearest_source": 1}
    run, true, training = Run.read(folder), *(read_poems(str(poem_files[key]), "f") for key in ("test", "train"))
    endings = [poem.lines[3:] for poem in training]
    (comparison,) = compare([run, *(Run.read(path.parent) for path in refs.glob("*/*/metrics.json"))])
    for group in comparison.references:
        for reference in group.runs:
            assert reference.comparison_key("test") == run.comparison_key("test")
            assert reference.record.get("seed") == (int(reference.folder.name[8:]) if len(group.runs) > 1 else None)
            poems = read_poems(str(reference.folder / "poems_test.txt"), "f")
            assert [poem.lines[:3] for poem in poems] == [poem.lines[:3] for poem in true]
            completions = [poem.lines[3:] for poem in poems]
            if group.label == "copy_source":
                assert completions == [poem.lines[:3] for poem in true]
            else:
                assert all(lines in endings for lines in completions)
            texts = [["\n".join(lines) for lines in part] for part in (completions, [poem.lines[3:] for poem in true])]
            scored = reference.row_scores["test"].scores
            assert reference.score("test/chrf") == pytest.approx(sacrebleu.corpus_chrf(texts[0], [texts[1]]).score)
            assert scored["test/chrf"].value == pytest.approx(reference.score("test/chrf"))
            assert {"test/distinct_1", "test/distinct_2", "test/seq_rep_4"} < scored.keys()
            assert "test/perplexity" not in {*scored, *reference.record["scores"]}
    headings, cells = text_reference_table(comparison)
    assert headings == ["score", "strategy", "copy_source", "nearest_source", "random_continuation"]
    chrf = next(row for row in cells if row[:2] == ["chrf", "(score)"])
    drawn = [run.score("test/chrf") for run in comparison.references[2].runs]
    unit = comparison.unit("test/chrf")
    assert chrf[4] == f"{unit.format_score(np.mean(drawn))} ± {unit.format_score(np.std(drawn, ddof=1))}"
    assert not {"lines", "perplexity"} & {row[0] for row in cells}
    assert reference_table(comparison)[0] == ["strategy"]


def test_random_continuation_is_drawn_evenly_and_depends_on_the_seed_only():
    targets = ["a", "b", "c"]
    drawn = random_continuation(targets, 3000, 1)
    assert drawn == random_continuation(targets, 3000, 1)
    assert drawn != random_continuation(targets, 3000, 2)
    assert all(900 < drawn.count(target) < 1100 for target in targets)


def test_nearest_source_equals_a_loop_over_all_training_rows():
    generator = np.random.default_rng(0)
    train, sources = ([" ".join(generator.choice(list("abcdefghij"), 5)) for _ in range(n)] for n in (30, 300))
    words = sorted(set(" ".join(train).split()))

    def vector(text):
        counts = [text.split().count(word) for word in words]
        rarity = [1 + np.log(31 / (1 + sum(word in other.split() for other in train))) for word in words]
        weights = np.array(
            [(1 + np.log(count)) * idf if count else 0 for count, idf in zip(counts, rarity, strict=True)]
        )
        return weights / np.linalg.norm(weights)

    found = nearest_source(train, [str(i) for i in range(30)], sources)
    similarity = np.array([[vector(source) @ vector(other) for other in train] for source in sources])
    np.testing.assert_allclose(similarity[np.arange(300), [int(i) for i in found]], similarity.max(1))


def test_references_existing_folder_or_other_task_is_refused(workplace, run, capsys, poem_run):
    (workplace.parents[1] / "references/imdb/majority/version_0").mkdir(parents=True)
    assert refused(run, capsys, "references", workplace, "--only=majority").key == "name"
    assert "--only" in refused(run, capsys, "references", workplace, "--only=best")
    assert refused(run, capsys, "references", workplace.parent).error is not None
    assert refused(run, capsys, "references", workplace, "--draws=0").key == "draws"
    assert refused(run, capsys, "references", workplace, "--only=copy_source", "--name=other").key == "only"
    assert refused(run, capsys, "references", poem_run, "--only=majority", "--name=other").key == "only"
    untested = shutil.copytree(poem_run, workplace.parent / "untested")
    lines = (untested / "config.yaml").read_text().splitlines(keepends=True)
    (untested / "config.yaml").write_text("".join(line for line in lines if "test_file" not in line))
    assert refused(run, capsys, "references", untested, "--name=other").key == "data.test_file"


def test_references_random_init_trains_the_shape_of_the_base(workplace, base):
    main(["references", str(workplace), "--only=random_init", "--name=refs"])
    folder = workplace.parents[1] / "refs/random_init/version_0"
    record, of_run = metrics(folder), metrics(workplace)
    assert record["parameters"]["total"] == of_run["parameters"]["total"]
    assert record["reference"] == "random_init"
    assert Run.read(folder).comparison_key("val") == Run.read(workplace).comparison_key("val")
    assert record["epochs"][0]["train/loss"] != of_run["epochs"][0]["train/loss"]


def test_bag_of_words_equals_scikit_learn_with_chosen_penalty():
    generator = np.random.default_rng(0)
    words = np.array(["good", "bad", "film", "the", "plot", "dull", "fine", "cast"])
    texts = [(" ".join(generator.choice(words, 6)),) for _ in range(120)]
    labels = np.array([int("good" in text or "fine" in text) for (text,) in texts])
    p = bag_of_words(texts[:90], labels[:90], {"val": texts[90:]}, 2)["val"]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit([text for (text,) in texts[:90]])
    train, val = (vectorizer.transform([text for (text,) in part]) for part in (texts[:90], texts[90:]))
    by_penalty = {
        C: LogisticRegression(C=C, max_iter=2000).fit(train, labels[:90]).predict_proba(val)
        for C in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    }
    assert any(np.allclose(p, expected, atol=1e-4) for expected in by_penalty.values())
    assert f1_score(labels[90:], p.argmax(1)) > 0.8


def test_bag_of_words_pair_features_do_not_depend_on_order():
    pairs = [("how to cook rice", "cook rice how"), ("what is love", "where is rome"), ("a b c d", "d c b a")] * 20
    labels = np.array([1, 0, 1] * 20)
    swapped = [(second, first) for first, second in pairs]
    p = bag_of_words(pairs, labels, {"a": pairs, "b": swapped}, 2)
    np.testing.assert_allclose(p["a"], p["b"])


def test_linear_model_absent_class_has_no_probability():
    features = np.random.default_rng(0).normal(size=(40, 3))
    labels = (features[:, 0] > 0).astype(int) * 2
    p = linear_model(features, labels, {"val": features}, 3)["val"]
    assert (p[:, 1] == 0).all()
    assert (p.argmax(1) == labels).mean() > 0.9


def test_majority_gives_fractions_of_labels():
    np.testing.assert_allclose(majority(np.array([0, 2, 2, 2]), 2, 3), [[0.25, 0, 0.75]] * 2)


def test_bag_of_words_of_numbers_equals_ridge_regression_with_chosen_penalty():
    generator = np.random.default_rng(0)
    words = np.array(["good", "bad", "film", "the", "plot", "dull", "fine", "cast"])
    texts = [(" ".join(generator.choice(words, 6)),) for _ in range(120)]
    labels = np.array([text.count("good") - text.count("dull") / 2 for (text,) in texts])
    predicted = bag_of_words(texts[:90], labels[:90], {"val": texts[90:]}, None)["val"]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit([text for (text,) in texts[:90]])
    train, val = (vectorizer.transform([text for (text,) in part]).toarray() for part in (texts[:90], texts[90:]))
    centered, mean = train - train.mean(0), labels[:90].mean()
    by_penalty = {}
    for C in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):  # in closed form; rows of TF-IDF have norm 1
        weights = np.linalg.solve(centered.T @ centered + np.eye(train.shape[1]) / C, centered.T @ (labels[:90] - mean))
        by_penalty[C] = mean + (val - train.mean(0)) @ weights
    assert any(np.allclose(predicted, expected, atol=1e-3) for expected in by_penalty.values())
    assert np.corrcoef(predicted, labels[90:])[0, 1] > 0.8
    assert mean_label(labels[:90], 2).tolist() == [mean, mean]


def test_references_run_without_base_leaves_out_frozen_features(run, capsys):
    shape = "{vocab_size: 300, n_positions: 64, n_embd: 16, n_layer: 1, n_head: 2}"
    flags = ["--data.n_train=200", "--data.vocab_size=300", f"--model.config={shape}", "--trainer.max_epochs=1"]
    folder = run("fit", "--config=quickstart", *flags)
    main(["references", str(folder)])
    assert "frozen_features is left out: the run has no pretrained base" in capsys.readouterr().out
    written = sorted(path.name for path in (folder.parents[1] / "references/quickstart").iterdir())
    assert written == ["bag_of_words", "majority"]
    assert "frozen_features needs a pretrained base" in refused(
        run, capsys, "references", folder, "--only=frozen_features", "--name=x"
    )
