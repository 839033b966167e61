"""Texts that are longer than data.max_length: counted, also from the cache, recorded, and announced once."""

import json

import pytest
from conftest import ROOT, metrics
from helpers.row_files import data, rows_of, write
from helpers.saved_runs import saved_run

import gpt2_pl
from gpt2_pl.commands import main
from gpt2_pl.datamodules import Sonnets, SourceTargetPairs
from gpt2_pl.datamodules.prompt_template import Truncation
from gpt2_pl.tasks import SentimentClassifier
from gpt2_pl.text.tokenizer import load_tokenizer

LONG = "the plot is really boring " * 20
SENTENCE = "2 of 3 {} are longer than 16 tokens (data.max_length) and are truncated: 91 % of their tokens are lost"


def warned(caught):
    return [str(one.message) for one in caught if "truncated" in str(one.message)]


def test_truncated_rows_are_counted_from_the_cache_as_well(base, tmp_path):
    file = write(tmp_path / "rows.csv", rows_of(LONG, "a film", f"{LONG} again"))
    complete = data(base, file, max_length=512)
    complete.setup()
    for _ in ("written", "cached"):
        module = data(base, file, max_length=16)
        module.setup()
        assert module.description()["truncated"] == {"test": 2}
        lost = complete.encoded["test"].lengths - module.encoded["test"].lengths
        assert module.encoded["test"].lost.tolist() == lost.tolist()
        assert module.encoded["test"].select([1, 1, 2]).lost.tolist() == [0, 0, lost[2]]


def test_truncation_sentence_says_how_much_is_lost():
    counts = Truncation.of([16, 3, 16], [4, 0, 28]) + Truncation.of([5], [0])
    assert counts == Truncation(n_texts=4, n_truncated=2, kept=32, lost=32)
    assert counts.sentence(16).endswith("are truncated: 50 % of their tokens are lost")
    one = Truncation.of([1000], [1])
    assert one.sentence(1000, "poems") == (
        "1 of 1 poems is longer than 1,000 tokens (data.max_length) and is truncated: "
        "less than 1 % of its tokens are lost"
    )


def test_truncated_rows_counts_the_row_that_just_fits_as_whole(base, tmp_path):
    length = len(load_tokenizer(base).encode(LONG.strip()).ids)
    file = write(tmp_path / "rows.csv", rows_of(LONG, "a film"))
    for max_length, n in ((length, 0), (length - 1, 1)):
        module = data(base, file, max_length=max_length)
        module.setup()
        assert module.truncated == {"test": n}


def test_truncated_skipped_rows_are_not_counted(base, tmp_path):
    file = write(tmp_path / "rows.csv", [*rows_of(LONG, "a film"), {"sentence": LONG, "label": "x"}])
    module = data(base, file, max_length=16, on_invalid_row="skip")
    with pytest.warns(match="1 of 3 rows are skipped"):
        module.setup()
    assert module.truncated == {"test": 1}


def test_truncated_targets_and_poems_are_counted(base, poem_files, tmp_path):
    rows = [{"source": text[:9], "target": text} for text in (LONG, "fine", f"again {LONG}")]
    file = write(tmp_path / "pairs.csv", rows)
    poems = Sonnets(train_file=str(poem_files["train"]), tokenizer=str(base), max_length=400)
    poems.setup()
    lengths = poems.encoded["train"].lengths
    shorter = Sonnets(train_file=str(poem_files["train"]), tokenizer=str(base), max_length=max(lengths) - 1)
    pairs = SourceTargetPairs(train_file=str(file), val_file=str(file), tokenizer=str(base), max_length=16)
    for module in (shorter, pairs):
        module.setup()
    assert poems.truncated == {"train": 0, "val": 0}
    assert shorter.truncated["train"] == (lengths == max(lengths)).sum()
    assert pairs.truncated == {"train": 2, "val": 2}


def test_truncated_preference_pairs_are_counted_and_announced(base, poem_files, tmp_path):
    rows = [{"prompt": "a film", "chosen": "is fine", "rejected": text} for text in (LONG, "is bad", f"no {LONG}")]
    file = write(tmp_path / "pairs.csv", rows)
    module = Sonnets(train_file=str(poem_files["train"]), tokenizer=str(base), max_length=16)
    with pytest.warns(match=r"2 of 3 pairs of \S+pairs\.csv are longer than 16 tokens"):
        module.read_pairs(str(file), "model.dpo.pairs_file")
    assert module.truncated == {"pairs_file": 2}


def test_fit_announces_truncated_texts_once_and_records_them(run, base, tmp_path):
    file = write(tmp_path / "rows.csv", rows_of(LONG, "a film", f"{LONG} again"))
    with pytest.warns() as caught:
        folder = run("fit", "--config", ROOT / "configs/task/imdb.yaml", f"--model.base={base}", "--data.max_length=16",
                     *(f"--data.{split}_file={file}" for split in ("train", "val", "test")),
                     "--data.template={sentence}", "--trainer.max_steps=1")  # fmt: skip
    assert warned(caught) == [SENTENCE.format(f"{split} texts") for split in ("training", "validation", "test")]
    assert metrics(folder)["data"]["truncated"] == {"train": 2, "val": 2, "test": 2}


def test_fit_dropped_duplicates_are_announced_and_recorded(base, tmp_path):
    file = write(tmp_path / "rows.csv", rows_of(*["the same film"] * 4, *(f"film {i}" for i in range(16))))
    module = data(base, None, test_file=None, train_file=str(file), val_fraction=0.5)
    with pytest.warns(match=r"training rows? ha\w+ the texts of a validation row \(data\.val_fraction\)"):
        module.setup()
    n = module.description()["dropped_duplicates"]
    assert n >= 1
    assert len(module.encoded["train"]) == 10 - n


@pytest.fixture(scope="module")
def classifier(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    file = write(folder / "rows.csv", rows_of("a film", "the plot"))
    task = SentimentClassifier(base=str(base), num_classes=2)
    task.configure_model()
    return saved_run(folder, task, data(base, file, val_file=str(file), max_length=16, template="{sentence}"))


def test_predict_and_classify_warn_of_truncated_texts(classifier, tmp_path, capsys):
    texts = [LONG, "a film", f"{LONG} again"]
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))
    for use in (
        lambda: gpt2_pl.load(classifier).predict(texts),
        lambda: main(["classify", str(classifier), "--input", str(file), "--out", "-", "--batch_size", "1"]),
    ):
        with pytest.warns() as caught:
            use()
        assert warned(caught) == [SENTENCE.format("texts")]


def test_chat_warns_of_every_truncated_text(classifier, monkeypatch, capsys):
    lines = iter([LONG, "a film", LONG])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    with pytest.warns() as caught:
        main(["chat", str(classifier)])
    assert len(warned(caught)) == 2
