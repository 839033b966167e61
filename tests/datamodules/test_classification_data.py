"""Templates, rows, batches and their order."""

import csv
import itertools
import json
import random

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS
from helpers.batches import padding_share
from helpers.refusals import names
from lightning.pytorch import Callback, Trainer

from gpt2_pl import GPT2Config
from gpt2_pl.datamodules import IMDB, SST5, TextClassification, ToySentiment
from gpt2_pl.datamodules.batching import (
    EvaluationLoader,
    TokenDataset,
    TrainingLoader,
    evaluation_batches,
    training_batches,
)
from gpt2_pl.datamodules.prompt_template import Template
from gpt2_pl.errors import InputError
from gpt2_pl.tasks import SentimentClassifier
from gpt2_pl.text.tokenizer import load_tokenizer

# Templates


def test_template_encode_long_fields_are_cut_and_template_words_kept(base):
    tokenizer = load_tokenizer(base)
    template = Template("Sentence1: {a}, Sentence2: {b} → Are they paraphrases?")
    rng = random.Random(0)
    for _ in range(60):
        row = {
            key: " ".join(rng.choice(["film", "naïve", "日本", "plot!", "the"]) for _ in range(rng.randrange(1, 60)))
            for key in "ab"
        }
        limit = rng.randrange(45, 120)
        (ids,) = template.encode([row], tokenizer, limit)
        assert len(ids) <= limit
        text = tokenizer.decode(ids)
        head, middle, tail = text.partition(", Sentence2: ")
        assert head.startswith("Sentence1: ")
        assert middle
        assert tail.endswith(" → Are they paraphrases?")
        a, b = head.removeprefix("Sentence1: "), tail.removesuffix(" → Are they paraphrases?")
        assert row["a"].startswith(a.rstrip("\ufffd"))
        assert row["b"].startswith(b.rstrip("\ufffd"))
        whole = tokenizer.encode(template.fill(row)).ids
        if len(whole) <= limit:
            assert ids == whole
        else:
            assert len(ids) >= limit - 8  # no more is lost than must be


def test_template_encode_any_field_lengths_keeps_the_fixed_parts(base):
    tokenizer, template, rng = load_tokenizer(base), Template(WORDS), random.Random(5)
    parts = WORDS.replace("{sentence2}", "{sentence1}").split("{sentence1}")
    for _ in range(100):
        row = {
            field: "a" + "".join(rng.choice("aé日 →?{},:x ") for _ in range(rng.choice([0, 1, 3, 30, 300])))
            for field in ("sentence1", "sentence2")
        }
        shortest = len(tokenizer.encode(template.fill(dict.fromkeys(row, ""))).ids)
        limit = rng.randrange(shortest + 4, shortest + 60)
        (ids,) = template.encode([row], tokenizer, limit)
        text, at = tokenizer.decode(ids), 0
        assert len(ids) <= limit
        for part in parts:
            found = text.find(part.strip(), at)
            assert found >= 0, text
            at = found + len(part.strip())
        assert text.startswith(parts[0].rstrip())
        assert text.endswith(parts[-1])


def test_template_encode_two_fields_cuts_longest_first(base):
    tokenizer = load_tokenizer(base)
    row = {"a": "short one", "b": "the plot is really boring " * 20}
    (ids,) = Template("{a} | {b} |").encode([row], tokenizer, 40)
    assert tokenizer.decode(ids).startswith("short one | the plot")


def test_template_invalid_syntax_is_refused(subtests):
    for text in ("no field", "{}", "{a!r}", "{a:>3}", "{a", "{a.b}"):
        with subtests.test(text), pytest.raises(InputError) as caught:
            Template(text)
        assert names(caught.value, "template")


def test_template_encode_without_room_for_text_raises(base):
    tokenizer = load_tokenizer(base)
    for text, limit in (("{a} is", len(tokenizer.encode(" is").ids)), ("Review: {a} Sentiment:", 3)):
        with pytest.raises(InputError, match=f"got {limit}") as caught:
            Template(text).encode([{"a": "a wonderful film"}], tokenizer, limit)
        assert names(caught.value, "max_length")


# Batches


def token_rows(n, seed=0):
    lengths = np.random.default_rng(seed).integers(1, 60, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenDataset(np.arange(offsets[-1], dtype=np.int32), offsets, np.arange(n) % 5)


def test_token_dataset_batch_pads_rows_on_the_right():
    rows = token_rows(20)
    batch = rows.batch(np.array([3, 17, 5]))
    assert batch["attention_mask"].sum(1).tolist() == rows.lengths[[3, 17, 5]].tolist()
    for i, n in enumerate((3, 17, 5)):
        text = batch["input_ids"][i, : rows.lengths[n]].tolist()
        assert text == list(range(rows.offsets[n], rows.offsets[n + 1]))
    assert batch["labels"].tolist() == [3, 2, 0]


GEOMETRIES = [(100, 8, 1), (101, 8, 2), (37, 5, 3), (7, 64, 2), (33, 16, 2), (25, 12, 2), (9, 1, 4), (128, 16, 1)]


def test_training_loader_any_world_size_yields_each_row_once(subtests):
    for n, size, world in GEOMETRIES:
        with subtests.test(n=n, size=size, world=world):
            check_batches_of_ranks(token_rows(n), n, size, world)


def check_batches_of_ranks(rows, n, size, world):
    """Check that all ranks have the same number of batches, and together each row at most once."""
    loaders = [TrainingLoader(rows, size, 1, rank, world) for rank in range(world)]
    seen = [[batch["row"].tolist() for batch in loader] for loader in loaders]
    assert len({len(batches) for batches in seen}) == 1
    assert all(len(batches) == len(loader) for batches, loader in zip(seen, loaders, strict=True))
    flat = sorted(row for batches in seen for batch in batches for row in batch)
    left_out = n % (size * world) if n % (size * world) < world else 0
    assert len(flat) == len(set(flat)) == n - left_out
    assert all(batches and all(batches) for batches in seen)
    evaluated = [evaluation_batches(rows.lengths, size, rank, world) for rank in range(world)]
    assert sorted(row for batches in evaluated for batch in batches for row in batch.tolist()) == list(range(n))
    assert len({len(batches) for batches in evaluated}) == 1
    assert all(0 < len(batch) <= size + 1 for batches in evaluated for batch in batches)


def test_training_batches_one_and_two_ranks_have_equal_global_batches():
    lengths = token_rows(101).lengths
    one, two = training_batches(lengths, 16, 3, 2, 1), training_batches(lengths, 8, 3, 2, 2)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_training_batches_order_depends_on_seed_and_epoch():
    lengths = token_rows(200).lengths
    order = lambda seed, epoch: np.concatenate(training_batches(lengths, 8, seed, epoch)).tolist()  # noqa: E731
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_training_batches_remainder_has_other_rows_in_each_epoch():
    lengths = token_rows(101).lengths
    smaller = [[b for b in training_batches(lengths, 8, 0, epoch) if len(b) < 8] for epoch in range(4)]
    assert [[len(b) for b in batches] for batches in smaller] == [[5]] * 4
    assert len({tuple(sorted(batch.tolist())) for (batch,) in smaller}) == 4


def test_training_loader_next_batch_skips_finished_batches():
    rows = token_rows(90)
    whole = [batch["row"].tolist() for batch in TrainingLoader(rows, 8, 5)]
    assert [batch["row"].tolist() for batch in TrainingLoader(rows, 8, 5, next_batch=lambda: 4)] == whole[4:]


def test_train_dataloader_of_sst5_padding_is_at_most_five_percent(shared):
    file = str(shared / "data" / "ids-sst-train.csv")
    data = SST5(train_file=file, tokenizer=str(shared / "base" / "gpt2-tiny"), val_fraction=0.01)
    data.setup()
    assert padding_share([batch["attention_mask"] for batch in data.train_dataloader()]) <= 0.05


def test_evaluation_loader_any_set_yields_every_row():
    assert sorted(n for batch in EvaluationLoader(token_rows(13), 4) for n in batch["row"].tolist()) == list(range(13))


def test_evaluation_batches_with_a_limit_hold_every_row_once():
    for (n, size, world), limit in itertools.product(GEOMETRIES, [0, 1, 2, 3, 0.3, 0.5, 1.0, 1000]):
        lengths, case = token_rows(n).lengths, (n, size, world, limit)
        batches = [evaluation_batches(lengths, size, rank, world, limit) for rank in range(world)]
        everything = [evaluation_batches(lengths, size, rank, world) for rank in range(world)]
        assert [[len(b) for b in own] for own in batches] == [[len(b) for b in own] for own in everything], case
        assert sorted(row for own in batches for b in own for row in b.tolist()) == list(range(n)), case


def test_evaluation_batches_within_the_limit_are_a_sample_of_all_lengths():
    """Every tenth of the rows by length is represented equally in the limited evaluation."""
    lengths = np.random.default_rng(3).permutation(2000) + 1
    for case in itertools.product([1, 2, 4], [1, 2, 3, 5, 0.1, 0.25, 0.5, 0.9]):
        world, limit = case
        of_ranks = (evaluation_batches(lengths, 40 // world, rank, world, limit) for rank in range(world))
        batches = [np.concatenate(parts) for parts in zip(*of_ranks, strict=True)]
        n = int(limit * len(batches)) if isinstance(limit, float) else limit
        sample = np.concatenate(batches[:n])
        counts = np.bincount((lengths[sample] - 1) // 200, minlength=10)
        assert counts.max() - counts.min() <= 1, case
        assert counts.sum() == 40 * n, case
        for batch in batches[:n]:  # of similar length, as all batches are
            assert np.ptp(lengths[batch]) <= 2000 / n + 2 * 2000 / len(sample), case


def test_evaluation_batches_with_a_limit_ignore_the_order_of_the_file():
    """Rows of one length, in which the two classes alternate or come one after the other."""
    for limit in (1, 4, 0.5):
        batches = evaluation_batches(np.full(512, 7), 32, limit=limit)
        sample = np.concatenate(batches[: int(limit * 16) if isinstance(limit, float) else limit])
        for labels in (np.arange(512) % 2, np.arange(512) // 256):
            assert 0.25 < labels[sample].mean() < 0.75, limit


def test_evaluation_batches_without_a_limit_begin_with_the_longest():
    lengths = token_rows(101).lengths
    order = np.concatenate(evaluation_batches(lengths, 8))
    assert (np.diff(lengths[order]) <= 0).all()


def test_fit_limited_evaluation_batches_hold_both_classes_equally(run, base, tmp_path):
    """Evaluate parts of a set with long rows of one class and short rows of the other."""
    rows = ["a wonderful film\t0"] * 50 + ["a film that goes on and on and on without an end\t1"] * 50
    (tmp_path / "rows.csv").write_text("\n".join(["sentence\tlabel", *rows]))
    files = [f"--data.{split}_file={tmp_path / 'rows.csv'}" for split in ("train", "val", "test")]
    folder = run("fit", "--config", ROOT / "configs/task/imdb.yaml", f"--model.base={base}", *files,
                 "--data.max_length=48", "--data.eval_batch_size=10", "--trainer.max_epochs=1",
                 "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0.4",
                 "--trainer.limit_test_batches=1")  # fmt: skip
    for split, n in (("val", 40), ("test", 10)):
        with (folder / f"predictions_{split}.csv").open(newline="") as lines:
            labels = [row["label"] for row in csv.DictReader(lines)]
        assert len(labels) == n
        assert labels.count("negative") == n // 2


# Rows

ROWS = [
    {"text": 'He said "no",\tthen left; NA', "label": 1},
    {"text": "null", "label": 0},
    {"text": "日本", "label": 1},
]


def write(folder, ending):
    file = folder / f"rows{ending}"
    if ending == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif ending == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(file)
    else:
        with file.open("w", encoding="utf-8-sig", newline="") as lines:
            writer = csv.DictWriter(lines, ["text", "label"], delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    return str(file)


def test_text_classification_any_file_format_gives_same_rows(base, tmp_path):
    for ending in (".csv", ".tsv", ".jsonl", ".parquet"):
        data = TextClassification(test_file=write(tmp_path, ending), template="{text}", tokenizer=str(base))
        data.setup("test")
        rows = data.encoded["test"]
        assert rows.labels.tolist() == [1, 0, 1], ending
        decoded = [data.tokenizer.decode(rows.values[a:b].tolist()) for a, b in itertools.pairwise(rows.offsets)]
        assert decoded == [row["text"] for row in ROWS], ending


INVALID_CSV = {
    "": "is empty",
    "sentence,sentiment\n": "no rows",
    "review,sentiment\na,1\n": "'sentence'.*'review', 'sentiment'",
    "sentence,sentiment\ngood,1\nbad,7\n": "row 2: .*'sentiment'.* got '7'",
    "sentence,sentiment\ngood,1\n  ,0\n": "row 2: .*'sentence'.* got '  '",
    "sentence,sentence\ngood,1\n": "'sentence' twice",
    b"sentence,sentiment\ngood,1\ngr\xfcn,1\n": "row 2 .*UTF-8",
    "sentence,sentiment\ngood,1\nbad,0,0,0\n": "row 2 .* 2 values, got 4",
}


def test_setup_invalid_csv_is_refused_by_file_and_row(base, tmp_path, subtests):
    file = tmp_path / "rows.csv"
    for content, words in INVALID_CSV.items():
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with subtests.test(content=content), pytest.raises(InputError, match=rf"rows\.csv.*{words}"):
            IMDB(train_file=str(file), val_file=str(file), tokenizer=str(base)).setup()


def test_setup_label_names_are_mapped_and_number_as_text_is_refused(base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"sentence": "a", "sentiment": "positive"}\n{"sentence": "b", "sentiment": "negative"}\n')
    data = IMDB(test_file=str(file), tokenizer=str(base))
    data.setup()
    assert data.encoded["test"].labels.tolist() == [1, 0]
    file.write_text('{"sentence": 3, "sentiment": 1}\n')
    with pytest.raises(InputError, match=r"row 1: .*'sentence'.* got 3"):
        IMDB(test_file=str(file), tokenizer=str(base)).setup()


def test_setup_missing_file_or_unknown_extension_is_refused(base, tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    for name in ("nowhere.csv", "rows.xlsx"):
        with pytest.raises(InputError, match=name) as caught:
            IMDB(train_file=str(tmp_path / name), tokenizer=str(base)).setup()
        assert names(caught.value, "data.train_file")


def test_setup_hub_dataset_without_network_is_refused():
    with pytest.raises(InputError, match="SetFit/sst5"):
        SST5(tokenizer="x").setup("fit")


def test_setup_val_fraction_gives_disjoint_reproducible_splits(files, base):
    data = IMDB(train_file=str(files["train"]), tokenizer=str(base), val_fraction=0.2, train_fraction=0.5)
    data.setup()
    assert (len(data.encoded["val"]), len(data.encoded["train"])) == (19, 39)
    split = lambda name: {row["sentence"] for row in data.rows[name]}  # noqa: E731
    source = [line.split("\t")[0] for line in files["train"].read_text().splitlines()[1:]]
    repeated = {text for text in source if source.count(text) > 1}
    assert split("train") & split("val") <= repeated
    again = IMDB(train_file=str(files["train"]), tokenizer=str(base), val_fraction=0.2, train_fraction=0.5)
    again.setup()
    assert np.array_equal(again.encoded["train"].values, data.encoded["train"].values)


def test_toy_sentiment_single_word_does_not_determine_label():
    data = ToySentiment(n_train=400)
    data.setup()
    assert np.bincount(data.encoded["train"].labels).min() > 100
    labels_of_word = {}
    for row, label in zip(data.rows["train"], data.encoded["train"].labels, strict=True):
        for word in row["sentence"].split():
            labels_of_word.setdefault(word, set()).add(label)
    assert all(len(labels) > 1 for word, labels in labels_of_word.items() if word in ("wonderful", "boring", "long"))


def test_padding_share_one_of_four_tokens_padded_is_a_quarter():
    assert padding_share([torch.tensor([[1, 1], [1, 0]])]) == 0.25


def test_overfit_batches_trains_on_the_same_rows_in_every_epoch():
    seen = []

    class Rows(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch["row"].tolist())

    data = ToySentiment(vocab_size=300, n_train=60, batch_size=10, max_length=32)
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    task = SentimentClassifier(config=config, num_classes=3)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", max_epochs=3, overfit_batches=2, callbacks=[Rows()], **quiet).fit(task, data)
    assert len(seen) == 6
    assert seen[:2] == seen[2:4] == seen[4:]


@pytest.mark.parametrize("special", [False, True])
def test_template_encode_field_without_a_token_gives_no_ids(special, base, tmp_path):
    settings = json.loads((base / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[z0]"}, "content": ""}
    if special:
        begin = {"SpecialToken": {"id": "x", "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        settings["post_processor"] = {"type": "TemplateProcessing", "single": [begin, a], "pair": [a, b],
                                      "special_tokens": {"x": {"id": "x", "ids": [7], "tokens": ["x"]}}}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer, template = load_tokenizer(tmp_path), Template("{{0}}: {a}, {b} and {a}!")
    rows = [{"a": a, "b": b} for a in ("film", "z", "zfilmz", " 0z0") for b in ("good", "zz", "0good film", "z0 ")]
    for row, ids in zip(rows, template.encode(rows, tokenizer, 64), strict=True):
        has_tokens = all(tokenizer.encode(text.strip(), add_special_tokens=False).ids for text in row.values())
        assert ids == (tokenizer.encode(template.fill(row)).ids if has_tokens else [])
