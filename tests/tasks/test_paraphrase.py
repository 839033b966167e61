"""QuoraPairs and ParaphraseDetector: formats, augmentation, invalid rows, scores and thresholds."""

import csv
import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, metrics, weights
from helpers.batches import padding_share
from helpers.refusals import names, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2Config
from gpt2_pl.datamodules import QuoraPairs, ToyPairs
from gpt2_pl.datamodules.classification import balanced
from gpt2_pl.errors import InputError
from gpt2_pl.metrics import best_threshold
from gpt2_pl.surgery import PromptTuning
from gpt2_pl.tasks import ParaphraseDetector
from gpt2_pl.text.tokenizer import load_tokenizer

CONFIG = ROOT / "configs"
SHAPE = GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2, dropout=0.1)


def texts(data, split):
    encoded = data.encoded[split]
    return [data.tokenizer.decode(encoded.batch(np.array([n]))["input_ids"][0].tolist()) for n in range(len(encoded))]


# Data


def test_quora_pairs_published_formats_give_the_same_rows(base, tmp_path):
    formats = {
        "cs224n.csv": 'id\tsentence1\tsentence2\tis_duplicate\n7\tA fine "film\t"He said ""no"""\t1\n8\tb\tc\t0\n',
        "qqp.tsv": 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\tA fine "film\t"He said ""no"""\t1\n'
        "8\t3\t4\tb\tc\t0\n",
        "glue.jsonl": '{"question1": "A fine \\"film", "question2": "He said \\"no\\"", "label": 1, "idx": 0}\n'
        '{"question1": "b", "question2": "c", "label": 0, "idx": 1}\n',
        "mrpc.txt": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tA fine "film\tHe said "no"\r\n'
        "0\t8\t9\tb\tc\r\n",
    }
    for name, content in formats.items():
        file = tmp_path / name
        file.write_bytes(content.encode())
        data = QuoraPairs(test_file=str(file), tokenizer=str(base))
        data.setup()
        assert texts(data, "test") == ['A fine "film\nHe said "no"\n', "b\nc\n"], name
        assert data.encoded["test"].labels.tolist() == [1, 0]
        assert data.text("test", 0) == 'A fine "film | He said "no"'


def test_quora_pairs_several_files_and_formats_form_one_set(base, pair_files, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"question1": "one", "question2": "two", "label": 1}\n')
    data = QuoraPairs(train_file=[str(pair_files["train"]), str(other)], tokenizer=str(base), val_fraction=0.25)
    data.setup()
    assert 90 < len(data.encoded["train"]) + len(data.encoded["val"]) <= 98  # less the pairs that stand in both
    alone = QuoraPairs(test_file=str(other), tokenizer=str(base))
    alone.setup()
    assert sum(text == "one\ntwo\n" for split in ("train", "val") for text in texts(data, split)) == 1
    assert all(data.text("val", n) == texts(data, "val")[n].strip().replace("\n", " | ") for n in range(24))


def test_quora_pairs_swap_pairs_adds_swapped_rows_to_training_only(base, pair_files):
    settings = {"train_file": str(pair_files["train"]), "tokenizer": str(base), "val_fraction": 0.2}
    plain, both = QuoraPairs(**settings), QuoraPairs(**settings, swap_pairs=True)
    plain.setup(), both.setup()
    turned = ["\n".join(reversed(text.strip().split("\n"))) + "\n" for text in texts(plain, "train")]
    assert texts(both, "train") == texts(plain, "train") + turned
    assert both.encoded["train"].labels.tolist() == 2 * plain.encoded["train"].labels.tolist()
    assert texts(both, "val") == texts(plain, "val")


@pytest.mark.parametrize("how", ["oversample", "undersample"])
def test_quora_pairs_balance_gives_equal_class_counts(how, base, pair_files):
    labels = np.array([0] * 7 + [1] * 3 + [2] * 5)
    rows = balanced(labels, how, 0)
    assert np.bincount(labels[rows]).tolist() == [7 if how == "oversample" else 3] * 3
    times = np.bincount(rows, minlength=15)
    assert all(np.ptp(times[labels == label]) <= 1 for label in range(3))
    assert (times.min() >= 1) == (how == "oversample")
    data = QuoraPairs(train_file=str(pair_files["train"]), tokenizer=str(base), balance=how)
    data.setup()
    assert data.encoded["train"].labels.mean() == 0.5
    whole = QuoraPairs(test_file=str(pair_files["train"]), tokenizer=str(base))
    whole.setup()
    assert set(texts(data, "train")) <= set(texts(whole, "test"))


HEADER = b"sentence1\tsentence2\tis_duplicate\n"
BAD = {
    "only one": (b"a\tb\t1\na\t \t1\n", "row 2: .*'sentence2'.* got ' '"),
    "no label": (b"a\tb\t1\na\tb\t\n", "row 2: .*'is_duplicate'.* got ''"),
    "not binary": (b"a\tb\t1\na\tb\t2\n", "row 2: .* got '2'"),
    "stray tab": (b"a\tb\t1\na\tb\tc\t0\n", "row 2 .* 3 values, got 4"),
    "too few": (b"a\tb\t1\n\na\tb\n", "row 2 .* 3 values, got 2"),
    "Latin-1": (b"a\tb\t1\na\tgr\xfcn\t0\n", "row 2 .*UTF-8"),
    "two lines": (b'a\t"b\nc"\t1\na\tb\n', "row 2 .* 3 values, got 2"),
}


def test_quora_pairs_invalid_rows_are_named_or_skipped_and_counted(base, tmp_path, subtests):
    for name, (rows, message) in BAD.items():
        with subtests.test(name):
            check_invalid_rows(rows, message, base, tmp_path / "pairs.csv")


def check_invalid_rows(rows, message, base, file):
    file.write_bytes(HEADER + rows + b"d\te\t0\n")
    with pytest.raises(InputError, match=rf"pairs\.csv, {message}"):
        QuoraPairs(test_file=str(file), tokenizer=str(base)).setup()
    data = QuoraPairs(test_file=str(file), tokenizer=str(base), on_invalid_row="skip")
    with pytest.warns(match=rf"pairs\.csv: 1 of 3 rows are skipped: {message}"):
        data.setup()
    assert len(data.encoded["test"]) == 2
    assert texts(data, "test")[1] == data.text("test", 1).replace(" | ", "\n") + "\n" == "d\ne\n"
    assert data.encoded["test"].labels.tolist() == [1, 0]
    assert data.description()["skipped"] == {str(file): 1}
    again = QuoraPairs(test_file=str(file), tokenizer=str(base), on_invalid_row="skip")  # from the cache
    with pytest.warns(match="1 of 3"):
        again.setup()
    assert again.skipped == data.skipped


def test_quora_pairs_without_valid_rows_is_refused(base, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("sentence1\tsentence2\tis_duplicate\na\tb\t7\n")
    with pytest.warns(match="1 of 1"), pytest.raises(InputError, match=r"pairs\.csv.*rows"):
        QuoraPairs(test_file=str(file), tokenizer=str(base), on_invalid_row="skip").setup()


def test_quora_pairs_real_files_have_the_known_counts(shared):
    folder, tokenizer = shared / "data", str(shared / "base" / "gpt2-tiny")
    train = [str(folder / f"quora-train-{n}.csv") for n in (1, 2)]
    data = QuoraPairs(train_file=train, val_file=str(folder / "quora-dev.csv"), tokenizer=tokenizer)
    data.setup()
    assert (len(data.encoded["train"]), len(data.encoded["val"])) == (66283, 5000)
    assert data.encoded["train"].labels.sum() == 13296 + 13212
    assert data.encoded["val"].labels.sum() == 1819
    assert padding_share([batch["attention_mask"] for batch in data.train_dataloader()]) <= 0.05
    mrpc = QuoraPairs(test_file=str(folder / "msr_paraphrase_train.txt"), tokenizer=tokenizer)
    mrpc.setup()
    assert mrpc.encoded["test"].labels.sum() == 2753
    assert len(mrpc.encoded["test"]) == 4076
    first = 'Amrozi accused his brother, whom he called "the witness", of deliberately distorting his evidence.'
    assert mrpc.text("test", 0).startswith(first)


# The task


def threshold_score(p, y, threshold, score):
    predicted = p >= np.float32(threshold)
    hits = (predicted & (y == 1)).sum()
    return (predicted == y).mean() if score == "accuracy" else 2 * hits / max(predicted.sum() + y.sum(), 1)


@pytest.mark.parametrize("score", ["accuracy", "f1"])
@given(st.data())
@settings(max_examples=150, derandomize=True, deadline=None)
def test_best_threshold_is_the_optimum_over_all_distinct_thresholds(score, draw):
    special = st.sampled_from([0.0, 1e-45, 0.5, np.nextafter(1, 0, dtype=np.float32).item(), 1.0])
    numbers = st.one_of(special, st.floats(0.0, 1.0, width=32), st.integers(0, 10).map(lambda n: n / 10))
    p = np.array(draw.draw(st.lists(numbers, min_size=1, max_size=20)), dtype=np.float32)
    y = np.array(draw.draw(st.lists(st.integers(0, 1), min_size=len(p), max_size=len(p))))
    threshold, reached = best_threshold(torch.tensor(p), torch.tensor(y), score)
    assert 0.0 <= threshold <= np.nextafter(1, 2, dtype=np.float32)
    best = max(threshold_score(p, y, t, score) for t in [*np.unique(p), 2.0])  # 2.0: no row is called 1
    assert reached == pytest.approx(threshold_score(p, y, threshold, score)) == pytest.approx(best)


def test_fit_paraphrase_scores_equal_loops_and_tuned_threshold_is_used(run, base, pair_flags, tmp_path):
    quora = ["--config", CONFIG / "task/quora.yaml", f"--model.base={base}", "--data.max_length=64", *pair_flags,
             "--trainer.accelerator=cpu", "--trainer.precision=32-true"]  # fmt: skip
    folder = run("fit", *quora, "--trainer.max_epochs=2", "--model.threshold=f1", "--model.optimizer.init_args.lr=1e-3")
    account, tuned = metrics(folder), weights(folder / "checkpoints/best.ckpt")["decision_threshold"].item()
    assert tuned != 0.5
    epoch = account["epochs"][int(account["scores"]["best_epoch"]) - 1]
    assert tuned == pytest.approx(epoch["val/threshold"])
    for split, threshold in (("val", 0.5), ("test", tuned)):
        with (folder / f"predictions_{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        predictions = [float(row["p(duplicate)"]) >= threshold for row in rows]
        truth = [row["label"] == "duplicate" for row in rows]
        assert [row["prediction"] for row in rows] == ["duplicate" if yes else "not_duplicate" for yes in predictions]
        hits = sum(a and b for a, b in zip(predictions, truth, strict=True))
        expected = {
            "accuracy": sum(a == b for a, b in zip(predictions, truth, strict=True)) / len(rows),
            "precision": hits / sum(predictions) if sum(predictions) else 0.0,
            "recall": hits / sum(truth),
            "f1": 2 * hits / (sum(predictions) + sum(truth)),
        }
        for name, value in expected.items():
            assert account["scores"][f"{split}/{name}"] == pytest.approx(value, abs=1e-6), (split, name)
    fixed = run("test", *quora, "--model.threshold=0.9", "--ckpt_path", folder / "checkpoints/best.ckpt")
    with (fixed / "predictions_test.csv").open(encoding="utf-8", newline="") as file:
        assert all((float(r["p(duplicate)"]) >= 0.9) == (r["prediction"] == "duplicate") for r in csv.DictReader(file))


def test_paraphrase_detector_options_out_of_range_are_refused(subtests):
    words = {"head": "verbalizer", "label_words": ["a", "b"]}
    for options, key in (
        ({"num_classes": 3}, "model.num_classes"),
        ({"threshold": 1.0}, "model.threshold"),
        ({**words, "num_dropout_samples": 3}, "model.head"),
        ({"num_dropout_samples": 0}, "model.num_dropout_samples"),
        ({"num_dropout_samples": 10**400}, "model.num_dropout_samples"),
        ({**words, "head_dropout": 0.1}, "model.head"),
    ):
        with subtests.test(options):
            with pytest.raises(InputError) as caught:
                ParaphraseDetector(config=SHAPE, **options)
            assert names(caught.value, key)


def test_validate_verbalizer_probabilities_equal_transformers(run, base, pair_flags):
    folder = run("validate", "--config", CONFIG / "task/quora.yaml", "--config", CONFIG / "strategy/verbalizer.yaml",
                 f"--model.base={base}", *pair_flags, "--trainer.accelerator=cpu",
                 "--trainer.precision=32-true")  # fmt: skip
    tokenizer, theirs = load_tokenizer(base), GPT2LMHeadModel.from_pretrained(base).eval()
    no, yes = (tokenizer.encode(word).ids for word in (" no", " yes"))
    with (folder / "predictions_val.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 33
    for row in rows:
        first, second = row["text"].split(" | ")
        ids = tokenizer.encode(WORDS.format(sentence1=first, sentence2=second)).ids
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, -1, [*no, *yes]]
        assert float(row["p(duplicate)"]) == pytest.approx(logits.softmax(0)[1].item(), abs=2e-6)


def test_predict_proba_is_independent_of_padding_side_and_batch(base, pair_files, subtests):
    data = QuoraPairs(test_file=str(pair_files["test"]), tokenizer=str(base), max_length=60)
    data.setup()
    for pooling, surgery in itertools.product(("last", "mean", "max", "mix", "concat"), ([], [PromptTuning(3)])):
        with subtests.test(pooling, surgery=surgery):
            check_padding(pooling, surgery, base, data)


def check_padding(pooling, surgery, base, data):
    torch.manual_seed(0)
    task = ParaphraseDetector(base=str(base), pooling=pooling, surgery=surgery)
    task.configure_model()
    torch.nn.init.normal_(task.head.linear.weight, std=0.2)
    task.eval()
    rows = data.encoded["test"]
    with torch.no_grad():
        alone = torch.cat([task.predict_proba(rows.batch(np.array([n]))) for n in range(len(rows))])
        together = task.predict_proba(rows.batch(np.arange(len(rows))[::-1].copy())).flip(0)
        batch = rows.batch(np.arange(len(rows)))
        length = batch["attention_mask"].sum(1)
        left = {
            key: torch.stack([pad(row[:n], (len(row) - n, 0)) for row, n in zip(batch[key], length, strict=True)])
            for key in ("input_ids", "attention_mask")
        }
        on_the_left = task.predict_proba(left)
    assert alone[:, 1].std() > 0.001
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(on_the_left, alone, rtol=0, atol=1e-5)


def test_toy_pairs_single_words_do_not_determine_the_label():
    data = ToyPairs(n_train=400)
    data.setup()
    labels = data.encoded["train"].labels
    assert 150 < labels.sum() < 250
    labels_of = {}
    for row, label in zip(data.rows["train"], labels, strict=True):
        for word in row["sentence1"].split() + row["sentence2"].split():
            labels_of.setdefault(word, set()).add(int(label))
    assert all(len(seen) == 2 for seen in labels_of.values())


# One wording


def test_command_test_with_other_template_or_labels_is_refused(run, capsys, base, pair_flags):
    quora = ["--config", CONFIG / "task/quora.yaml", f"--model.base={base}", *pair_flags]
    folder = run("fit", *quora, "--config", CONFIG / "trainer/debug.yaml")
    checkpoint = shutil.copy(folder / "checkpoints/best.ckpt", folder / "kept.ckpt")
    for args, words in (
        (["--data.template={sentence1} and {sentence2}"], ["data.template", "{sentence1} and {sentence2}", r"\n"]),
        (["--data.labels=[duplicate, not_duplicate]"], ["data.labels", "['not_duplicate', 'duplicate']"]),
    ):
        error = refused(run, capsys, "test", *quora, *args, "--ckpt_path", checkpoint)
        assert all(word in error for word in words), error
    run("test", *quora, "--ckpt_path", checkpoint)


# Rows that must not be merged, lost, or seen twice


def test_quora_pairs_unclosed_quote_is_named_and_never_merges_rows(base, tmp_path):
    header = "sentence1\tsentence2\tis_duplicate\n"
    stray = tmp_path / "stray.csv"
    stray.write_text(header + 'a\tb\t1\n"Dune part one\tb2\t1\nc\td\t0\n"Dune" part two\tz\t1\ng\th\t0\n')
    rest = tmp_path / "rest.csv"
    rest.write_text(header + 'a\tb\t1\n"open\tb\t1\n' + "c\td\t0\n" * 50)
    for file in (stray, rest):
        for on_invalid_row in ("error", "skip"):
            with pytest.raises(InputError, match=rf"{file.name}, row 2: .*data\.quoting"):
                QuoraPairs(test_file=str(file), tokenizer=str(base), on_invalid_row=on_invalid_row).setup()
    data = QuoraPairs(test_file=str(stray), tokenizer=str(base), quoting=False)
    data.setup()
    assert data.text("test", 1) == '"Dune part one | b2'
    assert len(data.encoded["test"]) == 5


def test_quora_pairs_invalid_json_lines_are_named_or_skipped(base, tmp_path):
    good = '{"sentence1": "a", "sentence2": "b", "is_duplicate": 1}\n'
    for bad, reason in (
        (b'{"sentence1": "gr\xfcn"}\n', "UTF-8"),
        (b'{"sentence1": "a",\n', ""),
        (b"7\n", "object"),
    ):
        file = tmp_path / "pairs.jsonl"
        file.write_bytes(good.encode() + bad + b"\n" + good.replace('"a"', '"c"').encode())
        with pytest.raises(InputError, match=rf"pairs\.jsonl, row 2 .*{reason}"):
            QuoraPairs(test_file=str(file), tokenizer=str(base)).setup()
        data = QuoraPairs(test_file=str(file), tokenizer=str(base), on_invalid_row="skip")
        with pytest.warns(match="1 of 3 rows are skipped: row 2"):
            data.setup()
        assert [data.text("test", n) for n in (0, 1)] == ["a | b", "c | b"]
        assert [data.row_number("test", n) for n in (0, 1)] == [1, 3]


def test_predict_skipped_rows_keeps_row_numbers_of_the_file(run, base, pair_flags, tmp_path):
    folder = run("fit", "--config", CONFIG / "task/quora.yaml", f"--model.base={base}", "--data.max_length=48",
                 *pair_flags, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2",
                 "--trainer.accelerator=cpu")  # fmt: skip
    rows = tmp_path / "new.csv"
    rows.write_text("sentence1,sentence2\na,b\n,b\nc,d\ne,f,g\nh,i\n")
    predicted = run("predict", "--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/best.ckpt",
                    f"--data.predict_file={rows}", "--data.on_invalid_row=skip")  # fmt: skip
    with (predicted / "predictions_predict.csv").open(newline="") as file:
        assert [(row["row"], row["text"]) for row in csv.DictReader(file)] == [
            ("1", "a | b"), ("3", "c | d"), ("5", "h | i"),
        ]  # fmt: skip


def test_quora_pairs_mirrored_pairs_are_not_split_between_train_and_val(base, tmp_path):
    file = tmp_path / "mirrored.csv"
    pairs = [(f"question {i}", f"other {i}") for i in range(40)]
    lines = [f"{a},{b},1" for a, b in pairs] + [f"{b},{a},1" for a, b in pairs]
    file.write_text("\n".join(["sentence1,sentence2,is_duplicate", *lines]))
    data = QuoraPairs(train_file=str(file), tokenizer=str(base), val_fraction=0.2, swap_pairs=True)
    data.setup()
    train, val = ({frozenset(text.strip().split("\n")) for text in texts(data, split)} for split in ("train", "val"))
    assert not train & val
    assert len(val) >= 12
    assert len(train) == 40 - len(val)


def test_quora_pairs_swap_pairs_swaps_custom_template_fields(base, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("a,b,is_duplicate\n" + "".join(f"x{i},y{i},1\n" for i in range(10)))
    data = QuoraPairs(
        train_file=str(file), val_file=str(file), tokenizer=str(base), template="{a} / {b}", swap_pairs=True
    )
    data.setup()
    assert texts(data, "train")[10:] == [f"y{i} / x{i}" for i in range(10)]
    with pytest.raises(InputError, match=r"data\.template.*data\.swap_pairs"):
        QuoraPairs(train_file=str(file), template="{sentence1}", swap_pairs=True)


def test_task_batches_without_row_numbers_are_numbered_in_order():
    from lightning.pytorch import Trainer

    task = ParaphraseDetector(config=SHAPE, threshold="f1")
    batch = {"input_ids": torch.ones(4, 3, dtype=torch.long), "attention_mask": torch.ones(4, 3, dtype=torch.long),
             "labels": torch.tensor([0, 1, 0, 1])}  # fmt: skip
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(**quiet).validate(task, torch.utils.data.DataLoader([batch, batch], batch_size=None), verbose=False)
    assert task.outcomes.compute()["row"].tolist() == list(range(8))
