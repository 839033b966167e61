"""Few training rows of each class, and examples in the prompt."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metrics
from helpers.refusals import names, refused
from helpers.row_files import write

from gpt2_pl.datamodules import QuoraPairs, TextClassification
from gpt2_pl.datamodules.batching import TokenDataset, TrainingLoader, training_batches
from gpt2_pl.datamodules.few_shot import draw_shots, in_turn, shuffled_classes
from gpt2_pl.errors import InputError

LABELS = ["bad", "fair", "good"]


@pytest.fixture
def rows(tmp_path):
    numbered = [{"sentence": f"text {i}", "label": (i * 7) % 3} for i in range(60)]
    return write(tmp_path / "train.csv", numbered)


def training_texts(base, file, seed, monkeypatch, **options):
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    data = TextClassification(train_file=str(file), labels=LABELS, tokenizer=str(base), **options)
    data.setup()
    labels = data.encoded["train"].labels
    return [(row["sentence"], int(label)) for row, label in zip(data.rows["train"], labels, strict=True)]


def test_shots_of_one_seed_are_nested_and_equally_many_of_each_class(base, rows, monkeypatch):
    drawn = {k: training_texts(base, rows, 3, monkeypatch, shots=k) for k in (1, 4, 9)}
    for k, texts in drawn.items():
        assert [label for _, label in texts].count(0) == [label for _, label in texts].count(2) == k
        assert len(set(texts)) == len(texts) == 3 * k
    assert set(drawn[1]) < set(drawn[4]) < set(drawn[9])
    assert drawn[4] == training_texts(base, rows, 3, monkeypatch, shots=4)
    assert drawn[4] != training_texts(base, rows, 4, monkeypatch, shots=4)


def test_shots_without_validation_file_share_no_row_with_validation(base, rows, monkeypatch):
    data = TextClassification(train_file=str(rows), labels=LABELS, tokenizer=str(base), shots=2)
    data.setup()
    assert not set(data.rows["train"]["sentence"]) & set(data.rows["val"]["sentence"])


def test_shots_with_swapped_pairs_draw_both_orders_of_a_pair(base, tmp_path):
    pairs = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "is_duplicate": i % 2} for i in range(20)]
    files = {"train_file": str(write(tmp_path / "train.csv", pairs)), "val_file": str(tmp_path / "train.csv")}
    data = QuoraPairs(**files, tokenizer=str(base), swap_pairs=True, shots=3)
    data.setup()
    rows = list(data.rows["train"])
    assert len(rows) == 12
    assert {(row["sentence1"], row["sentence2"]) for row in rows} == {
        (row["sentence2"], row["sentence1"]) for row in rows
    }


@pytest.mark.parametrize(
    ("options", "key"),
    [({"shots": 0}, "data.shots"), ({"shots": 2, "balance": "oversample"}, "data.balance"),
     ({"demonstrations": 0}, "data.demonstrations"), ({"steps_per_epoch": 0}, "data.steps_per_epoch")],
)  # fmt: skip
def test_shots_or_demonstrations_out_of_range_are_refused(options, key):
    with pytest.raises(InputError, match=key):
        TextClassification(**options)


def test_shots_above_a_class_name_the_class_and_its_rows(base, rows, monkeypatch):
    with pytest.raises(InputError, match=r"data\.shots must be at most 1[0-9], the number of training rows of '"):
        training_texts(base, rows, 0, monkeypatch, shots=21)


def test_draw_shots_equals_a_loop_over_classes():
    labels = np.array([0, 1, 1, 0, 2, 2, 1, 0])
    rows = np.arange(8)
    drawn = draw_shots(labels, rows, 2, "abc", seed=5)
    expected = []
    for k in range(3):
        order = np.random.default_rng([5, k]).permutation([i for i in range(8) if labels[i] == k])
        expected += order[:2].tolist()
    assert drawn.tolist() == sorted(expected)
    turns = in_turn(shuffled_classes(labels, rows, 3, 5))
    assert labels[turns].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


# Steps in an epoch


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("per_epoch", [1, 2, 7])
def test_training_loader_batches_per_epoch_cuts_consecutive_passes(per_epoch, world_size):
    lengths = np.random.default_rng(0).integers(1, 9, 11)
    rows = TokenDataset(np.arange(lengths.sum()), np.concatenate([[0], lengths.cumsum()]))
    passes = [batch for i in range(6) for batch in training_batches(lengths, 2, 3, i, world_size)]
    loader = TrainingLoader(rows, 2, seed=3, world_size=world_size)
    loader.batches_per_epoch = per_epoch
    seen = []
    for epoch in range(12 // per_epoch):
        loader.set_epoch(epoch)
        batches = [batch["row"].tolist() for batch in loader]
        assert len(batches) == len(loader) == per_epoch
        seen += batches
    assert seen == [batch[::world_size].tolist() for batch in passes[: len(seen)]]


def test_steps_per_epoch_counts_optimizer_steps_with_accumulated_batches(run):
    options = ["--config=quickstart", "--data.n_train=8", "--data.batch_size=3", "--data.steps_per_epoch=4"]
    record = metrics(run("fit", *options, "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=2"))
    assert record["status"] == "finished"
    assert (record["steps"], len(record["epochs"])) == (8, 2)


def test_steps_per_epoch_run_resumed_within_a_pass_is_bitwise_equal(run):
    options = ["fit", "--config=quickstart", "--data.n_train=12", "--data.batch_size=4", "--data.steps_per_epoch=2"]
    options += ["--model.schedule={class_path: gpt2_pl.optim.ConstantWithWarmup, init_args: {warmup: 0}}"]
    whole = run(*options, "--trainer.max_epochs=4", "--name=whole")
    part = run(*options, "--trainer.max_steps=5", "--name=part")
    resumed = run(*options, "--trainer.max_epochs=4", f"--ckpt_path={part}/checkpoints/last.ckpt", "--name=resumed")
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, resumed)]
    assert ends[0]["global_step"] == 8
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())


# Demonstrations


def demonstrated(base, rows, monkeypatch, **options):
    """Return data with a stand-in for a trainer whose model is a verbalizer, and the token ids of its rows."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    data = TextClassification(
        train_file=str(rows),
        test_file=str(rows),
        labels=LABELS,
        tokenizer=str(base),
        template="{sentence} is",
        **options,
    )
    module = SimpleNamespace(label_words=[" bad", " fair", " good"], max_length=64)
    data.trainer = SimpleNamespace(lightning_module=module, state=SimpleNamespace(fn=None), max_epochs=0)
    data.setup("test")
    return data, [data.encoded["test"].row(n).tolist() for n in range(60)]


def test_demonstrations_precede_the_query_with_their_label_words(base, rows, monkeypatch):
    data, ids = demonstrated(base, rows, monkeypatch, demonstrations=4)
    train, words = data.rows["train"], [" bad", " fair", " good"]
    labels = np.asarray(data.encoded["train"].labels)
    order = in_turn(shuffled_classes(labels, np.arange(len(labels)), 3, 2))[:4]
    examples = "".join(f"{train[int(n)]['sentence']} is{words[labels[n]]}\n" for n in order)
    for n, row in enumerate(data.rows["test"]):
        assert ids[n] == data.tokenizer.encode(f"{examples}{row['sentence']} is").ids
    assert data.description()["demonstrations"] == {"val": 4.0, "test": 4.0}


def test_demonstrations_that_do_not_fit_are_left_out_whole(base, rows, monkeypatch):
    data, ids = demonstrated(base, rows, monkeypatch, demonstrations="all", max_length=40)
    _, plain = demonstrated(base, rows, monkeypatch)
    newline = data.tokenizer.encode("\n").ids[-1]
    for row, query in zip(ids, plain, strict=True):
        assert row[-len(query) :] == query
        assert len(row) <= 40
        assert row[: -len(query)][-1] == newline
        assert len(row) > 40 - 12  # another example would not fit
    assert data.mean_demonstrations["test"] == np.mean([row.count(newline) for row in ids])


def test_fit_without_epochs_scores_the_verbalizer_in_context(run, capsys, base, rows):
    files = [f"--data.{split}_file={rows}" for split in ("train", "val", "test")]
    words = ["--model.head=verbalizer", '--model.label_words=[" the", " a", " is"]']
    files += [f"--data.labels={json.dumps(LABELS)}", "--data.max_length=64"]
    args = ["fit", "--config=task/imdb", f"--model.base={base}", *files, *words, "--data.label_column=label",
            "--data.demonstrations=2", "--name=in_context"]  # fmt: skip
    assert names(refused(run, capsys, *args), "data.demonstrations")
    folder = run(*args, "--trainer.max_epochs=0")
    record = metrics(folder)
    assert record["status"] == "finished"
    assert record["parameters"]["trainable"] == 0
    assert {"val/accuracy", "test/accuracy"} <= record["scores"].keys()
    assert record["data"]["demonstrations"] == {"val": 2.0, "test": 2.0}
    assert (folder / "predictions_test.csv").is_file()
    validated = metrics(run("validate", *args[1:]))
    assert validated["scores"] == {name: value for name, value in record["scores"].items() if name.startswith("val/")}


def test_fit_without_epochs_refuses_a_random_head(run, capsys, base, rows):
    args = ["fit", "--config=task/imdb", f"--model.base={base}", f"--data.train_file={rows}", "--trainer.max_epochs=0",
            "--data.max_length=64"]  # fmt: skip
    assert names(refused(run, capsys, *args), "trainer.max_epochs")
