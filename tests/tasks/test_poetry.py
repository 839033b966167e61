"""Sonnets and PoemGenerator: file format, targets and generated poems, against transformers and sacrebleu."""

import csv
import json
import math
import re

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import ROOT, flags, metrics
from helpers.cards import card, executed
from helpers.refusals import names, refused
from helpers.trainers import trainer
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.datamodules import Sonnets
from gpt2_pl.datamodules.sonnets import read_poems
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.rows import read_row_table
from gpt2_pl.experiments.run import Run
from gpt2_pl.tasks import PoemGenerator
from gpt2_pl.tasks.poetry import poem_scores
from gpt2_pl.text import metrics as scores
from gpt2_pl.text.poems import LineLengthProcessor, rhyme_share, split_lines
from gpt2_pl.text.tokenizer import END_OF_TEXT, load_tokenizer
from gpt2_pl.utils.run_schema import check_metrics

CONFIG = ROOT / "configs"
LONG = "--data.max_length=600"


@pytest.fixture(scope="module")
def long_base(base, tmp_path_factory):
    """A random GPT-2 with the tests' tokenizer whose context has room for a complete poem."""
    folder = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    GPT2(GPT2Config(vocab_size=400, n_positions=640, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    return folder


# Data


def test_read_poems_any_line_ends_and_line_counts_are_read(poem_files, tmp_path):
    poems = read_poems(str(poem_files["train"]), "data.train_file")
    assert [poem.number for poem in poems] == list(range(1, 10))
    assert all(len(poem.lines) == 14 and not any("\r" in line for line in poem.lines) for poem in poems)
    file = tmp_path / "odd.txt"
    file.write_bytes(
        b"\xef\xbb\xbfA notice\r\n\r\n99\r\n\r\n" + b"line\r\n" * 15 + b"\r\n126\r\n\r\n" + b"  line\r\n" * 12
    )
    assert [(poem.number, len(poem.lines), set(poem.lines)) for poem in read_poems(str(file), "f")] == [
        (99, 15, {"line"}),
        (126, 12, {"line"}),
    ]


def test_read_poems_invalid_file_is_refused(tmp_path, subtests):
    file = tmp_path / "poems.txt"
    for content, words in (
        (b"no number\n", "no poem"),
        (b"1\n\na\n\n1\n\nb\n", "line 5: poem 1"),
        (b"1\n\n2\n\nb\n", "poem 1"),
        (b"1\n\ngr\xfcn\n", "UTF-8"),
    ):
        file.write_bytes(content)
        with subtests.test(content):
            with pytest.raises(InputError, match=rf"poems\.txt.*{words}") as caught:
                read_poems(str(file), "data.train_file")
            assert names(caught.value, "data.train_file")


def test_sonnets_training_and_validation_poems_are_disjoint(poem_files, long_base):
    data = Sonnets(train_file=str(poem_files["train"]), tokenizer=str(long_base), val_fraction=0.3)
    data.setup()
    train, val = ({poem.number for poem in data.poems[split]} for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 3)
    assert not train & val
    assert data.description()["validated_on"] == sorted(val)


def test_sonnets_targets_exclude_the_prompt_lines_in_evaluation(poem_files, long_base):
    data = Sonnets(
        train_file=str(poem_files["train"]), test_file=str(poem_files["test"]), tokenizer=str(long_base), prompt_lines=3
    )
    data.setup()
    tokenizer = load_tokenizer(long_base)
    for split in ("train", "test"):
        batch = data.encoded[split].batch(np.arange(len(data.poems[split])))
        for poem, ids, mask, targets in zip(
            data.poems[split], batch["input_ids"], batch["attention_mask"], batch["targets"], strict=True
        ):
            wanted = targets[targets != -100].tolist()
            n = int(mask.sum())
            assert (targets[n:] == -100).all()
            scored = poem.text[len("\n".join(poem.lines[:3])) + 1 :] if split == "test" else poem.text
            text = tokenizer.decode(wanted, skip_special_tokens=False)
            assert text.endswith("\n" + END_OF_TEXT)
            assert scored.endswith(text.removesuffix(END_OF_TEXT))
            assert len(wanted) == (n if split == "train" else n - len(tokenizer.encode(poem.opening(3)).ids) + 1)
            assert (ids[1:n] == targets[: n - 1])[targets[: n - 1] != -100].all()


def test_sonnets_special_tokens_around_texts_are_left_out(poem_files, long_base, tmp_path):
    """Special tokens would separate the given lines from the others."""
    settings = json.loads((long_base / "tokenizer.json").read_text())
    x, a, b = {"SpecialToken": {"id": "x", "type_id": 0}}, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    settings["post_processor"] = {"type": "TemplateProcessing", "single": [x, a, x], "pair": [a, b],
                                  "special_tokens": {"x": {"id": "x", "ids": [7], "tokens": ["x"]}}}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    encoded = []
    for folder in (long_base, tmp_path):
        data = Sonnets(test_file=str(poem_files["test"]), tokenizer=str(folder))
        data.setup()
        encoded.append(data.encoded["test"].values)
    assert np.array_equal(*encoded)


def test_sonnets_poem_without_a_token_is_named(long_base, tmp_path):
    settings = json.loads((long_base / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[z\n]"}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    for lines, words in (("z\nzz\nz\na day", "the first 3"), ("a\nb\nc\nzz", "after the first 3")):
        (tmp_path / "poems.txt").write_text(f"12\n\n{lines}\n")
        with pytest.raises(InputError, match=rf"poems\.txt.* {words}.* poem 12"):
            Sonnets(test_file=str(tmp_path / "poems.txt"), tokenizer=str(tmp_path)).setup()


def test_sonnets_openings_without_room_for_more_lines_are_refused(poem_files, long_base, tmp_path):
    file = tmp_path / "openings.txt"
    file.write_text("132\n\na\nb\nc\n")
    with pytest.raises(InputError, match=r"openings\.txt: poem 132 .* got 3"):
        Sonnets(val_file=str(file), tokenizer=str(long_base)).setup()
    file.write_text("131\n\na\nb\nc\nd\n132\n\na\nb\nc\n")
    with pytest.raises(InputError, match=r"openings\.txt: poem 132 .* got 3"):
        Sonnets(test_file=str(file), tokenizer=str(long_base)).setup()
    with pytest.raises(InputError, match=r"data\.max_length.* poem \d+, got 20"):
        Sonnets(test_file=str(poem_files["test"]), tokenizer=str(long_base), max_length=20).setup()


# The task


def greedy(model, tokenizer, prompt, n, guide):
    """Return the greedy continuation of a prompt by full passes of transformers' model."""
    ids, process = torch.tensor([prompt]), LineLengthProcessor(tokenizer, 400) if guide else lambda logits, *_: logits
    for _ in range(n):
        with torch.no_grad():
            logits = process(model(ids).logits[:, -1], ids, torch.ones_like(ids))
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    new = ids[0, len(prompt) :].tolist()
    return new[: [*new, tokenizer.token_to_id(END_OF_TEXT)].index(tokenizer.token_to_id(END_OF_TEXT))]


def check_card(out):
    """Check that the example of a model card completes a poem from its first lines."""
    variables, text = executed(out), card(out)
    assert variables["settings"] == {
        "temperature": 1.0, "top_k": 0, "top_p": 0.9, "max_new_tokens": 60, "do_sample": True
    }  # fmt: skip
    prompt = text.partition("tokenizer('")[2].partition("'")[0]
    assert prompt.count("\\n") == 3
    assert prompt.endswith("\\n")
    assert "It completes a poem from its first 3 lines, to at most 14 lines; `gpt2-pl generate FOLDER" in text
    assert "the tokens after the first 3 lines of each poem" in text
    assert "9 poems, digest" in text


def test_fit_sonnets_scores_equal_references_and_generate_writes_poems(
    run, long_base, poem_files, capsys, tmp_path, monkeypatch
):
    folder = run("fit", "--config", CONFIG / "task/sonnets.yaml", f"--model.base={long_base}", *flags(poem_files), LONG,
                 "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.precision=32-true",
                 "--model.max_new_tokens=60", "--model.optimizer.init_args.lr=1e-3")  # fmt: skip
    account = metrics(folder)["scores"]
    written = read_poems(str(folder / "poems_test.txt"), "f")
    true = read_poems(str(poem_files["test"]), "f")
    assert [poem.number for poem in written] == [poem.number for poem in true]
    assert all(a.lines[:3] == b.lines[:3] for a, b in zip(written, true, strict=True))
    words = [scores.words("\n".join(poem.lines[3:])) for poem in written]
    assert account["test/distinct_2"] == pytest.approx(scores.distinct(words, 2))
    assert account["test/rhyme"] == pytest.approx(sum(rhyme_share(p.lines, 3) for p in written) / 3)
    texts = [  # by sacrebleu, of the files as they are
        [block.strip().splitlines() for block in re.split(r"(?m)^[0-9]+$", file.read_text())[1:]]
        for file in (folder / "poems_test.txt", poem_files["test"])
    ]
    for name, given in (("chrf", 3), ("chrf_whole_poem", 0)):
        completions, true_ones = (["\n".join(lines[given:]) for lines in poems] for poems in texts)
        expected = sacrebleu.corpus_chrf(completions, [true_ones]).score
        assert account[f"test/{name}"] == pytest.approx(expected, rel=1e-6)
    signature = f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}"
    assert metrics(folder)["score_signatures"] == {"test/chrf": signature, "test/chrf_whole_poem": signature}
    check_metrics(metrics(folder), "metrics.json")
    assert {"test/distinct_1", "test/seq_rep_4", "test/greedy_seq_rep_4"} <= set(account)
    of_rows = Run.read(folder).row_scores["test"].scores
    names = {
        "loss",
        "perplexity",
        "chrf",
        "chrf_whole_poem",
        "distinct_1",
        "distinct_2",
        "seq_rep_4",
        "lines",
        "rhyme",
        "greedy_seq_rep_4",
    }
    assert set(of_rows) == {f"test/{name}" for name in names}
    for name, of_row in of_rows.items():
        value = math.exp(of_row.value) if name == "test/perplexity" else of_row.value
        assert value == pytest.approx(account[name], rel=1e-5), name

    # perplexity is that of transformers on the same lines
    run("export", folder, "--format", "hf", "--out", tmp_path / "hf")
    check_card(tmp_path / "hf")
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    tokenizer, total, n = load_tokenizer(long_base), 0.0, 0
    for poem in true:
        given = tokenizer.encode(poem.opening(3)).ids
        ids = torch.tensor([[*given, *tokenizer.encode(poem.text[len(poem.opening(3)) :] + END_OF_TEXT).ids]])
        labels = ids.clone()
        labels[:, : len(given)] = -100
        with torch.no_grad():
            total += reference(ids, labels=labels).loss.item() * (ids.size(1) - len(given))
        n += ids.size(1) - len(given)
    assert account["test/perplexity"] == pytest.approx(math.exp(total / n), rel=1e-4)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    assert sum(tag.startswith("val/poem_") for tag in board.Tags()["tensors"]) == 2

    # generate, from openings and from lines, and as a GPU would record it: out of training
    in_training = []
    monkeypatch.setattr(
        "gpt2_pl.generation.supports_cuda_graph", lambda model, _: in_training.append(model.training) or False
    )
    openings = tmp_path / "openings.txt"
    openings.write_text("".join(f"{p.number}\n\n{p.opening(3)}\n" for p in true))
    command = ["generate", folder, "--poems", "--prompt_file", openings, "--max_new_tokens", "40", "--seed", "5"]
    run(*command, "--out", tmp_path / "a.txt", "--batch_size", "1")
    run(*command, "--out", tmp_path / "b.txt")
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b.txt").read_text()
    assert [p.lines[:3] for p in read_poems(str(tmp_path / "a.txt"), "f")] == [p.lines[:3] for p in true]
    for given, guide in (([], True), (["--no_line_length_bias"], False)):
        out = tmp_path / f"guide_{guide}.txt"
        run(*command, "--out", out, "--temperature", "0", *given)
        prompts = [tokenizer.encode(p.opening(3)).ids for p in true]
        expected = [[*prompt, *greedy(reference, tokenizer, prompt, 40, guide)] for prompt in prompts]
        texts = [split_lines(tokenizer.decode(ids, skip_special_tokens=False)) for ids in expected]
        assert [p.lines for p in read_poems(str(out), "f")] == texts
    assert (tmp_path / "guide_True.txt").read_text() != (tmp_path / "guide_False.txt").read_text()
    lines = tmp_path / "lines.txt"
    lines.write_text("the plot is\nthe camera\n")
    assert in_training
    assert not any(in_training)
    run("generate", folder, "--prompt_file", lines, "--out", tmp_path / "c.jsonl", "--temperature", "0",
        "--max_new_tokens", "5", "--as_is")  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the plot is", "the camera"]
    ids = reference.generate(torch.tensor([tokenizer.encode("the plot is").ids]), max_new_tokens=5, do_sample=False)
    assert rows[0]["text"] == tokenizer.decode(ids[0].tolist())

    capsys.readouterr()
    for args, words_of in (
        ([folder, "--prompt_file", "nowhere.txt", "--out", "x.txt"], ["prompt_file", "nowhere.txt"]),
        ([folder, "--prompt_file", lines, "--out", "x.csv"], ["out", "x.csv"]),
        ([folder, "--prompt_file", lines, "--out", lines], ["out", "exists"]),
        ([folder, "--prompt_file", lines, "--out", "x.txt", "--top_p", "7"], ["top_p", "7"]),
        ([folder, "--prompt_file", tmp_path / "c.jsonl", "--out", "x.txt", "--ckpt_path", "no.ckpt"], ["no.ckpt"]),
    ):
        line = refused(run, capsys, "generate", *args)
        assert all(word in line for word in words_of), line


@pytest.mark.parametrize("guide", [True, False])
def test_poem_generator_line_length_bias_equals_greedy_transformers(guide, long_base, poem_files, tmp_path):
    """The greedy continuations for the repetition score never use the line length bias."""
    model, tokenizer = GPT2.from_pretrained(long_base), load_tokenizer(long_base)
    for parameter in model.parameters():
        parameter.data.mul_(4.0)
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    data = Sonnets(test_file=str(poem_files["test"]), tokenizer=str(long_base), max_length=600)
    task = PoemGenerator(
        base=str(tmp_path), line_length_bias=guide, top_p=1e-6, max_new_tokens=60
    )  # so little is the likeliest
    tested, repeated = trainer(), []
    tested.test(task, data)
    for poem, written in zip(data.poems["test"], task.generated, strict=True):
        prompt = tokenizer.encode(poem.opening(3)).ids
        free, guided = (greedy(theirs, tokenizer, prompt, 60, kind) for kind in (False, True))
        texts = [split_lines(tokenizer.decode([*prompt, *new], skip_special_tokens=False)) for new in (free, guided)]
        assert texts[0] != texts[1]
        assert written.lines == texts[guide]
        grams = [tuple(free[i : i + 4]) for i in range(len(free) - 3)]
        repeated.append(1 - len(set(grams)) / len(grams))
    assert 0 < sum(repeated) < 2.5
    assert tested.callback_metrics["test/greedy_seq_rep_4"].item() == pytest.approx(sum(repeated) / 3)


def test_fit_sonnets_token_and_sequence_unlikelihood_are_trained(run, long_base, poem_files):
    sonnets = ["fit", "--config", CONFIG / "task/sonnets.yaml", f"--model.base={long_base}", *flags(poem_files), LONG,
               "--trainer.max_epochs=4", "--model.num_val_samples=0", "--model.optimizer.init_args.lr=1e-2",
               "--early_stopping_patience=null", "--model.max_new_tokens=8", "--trainer.accelerator=cpu"]  # fmt: skip
    strategy = ["--config", CONFIG / "strategy/unlikelihood.yaml"]
    little, much = (
        metrics(run(*sonnets, *strategy, f"--model.unlikelihood={alpha}"))["epochs"] for alpha in (1e-4, 5.0)
    )
    assert much[-1]["train/unlikelihood"] < 0.9 * little[-1]["train/unlikelihood"]
    assert little[-1]["train/loss"] < little[0]["train/loss"]
    both = metrics(run(*sonnets, "--trainer.max_epochs=2", "--config", CONFIG / "strategy/sequence_unlikelihood.yaml",
                       "--config", CONFIG / "strategy/prefix_tuning.yaml"))["epochs"]  # fmt: skip
    assert any("train/sequence_unlikelihood" in epoch for epoch in both)
    assert all(epoch["train/loss"] > 0 for epoch in both)


def test_poem_generator_several_samples_have_means_of_their_scores(long_base, poem_files, tmp_path):
    """The scores are those of single samples; the first sample is that of a run with one."""
    data = Sonnets(test_file=str(poem_files["test"]), tokenizer=str(long_base), max_length=600)
    task = PoemGenerator(base=str(long_base), num_test_samples=3, max_new_tokens=40)
    tested = trainer()
    found = tested.test(task, data, verbose=False)[0]
    poems = data.poems["test"]
    sets = [task.generate_poems(poems, sample) for sample in range(3)]
    assert task.generated == sets[0] == task.generate_poems(poems)
    assert sets[0] != sets[1] != sets[2]
    alone = [poem_scores(samples, poems, 3) for samples in sets]
    for name in ("seq_rep_4", "lines"):
        assert found[f"test/{name}"] == pytest.approx(np.mean([score[name] for score in alone]))
    texts = [["\n".join(poem.lines[3:]) for poem in of] for of in ([*sets[0], *sets[1], *sets[2]], poems * 3)]
    assert found["test/chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts[0], [texts[1]]).score, abs=1e-4)
    assert found["test/distinct_1"] == pytest.approx(np.mean([score["distinct_1"] for score in alone]), abs=0.02)
    with (tmp_path / "losses_test.csv").open("w", newline="") as file:
        table = task.row_table("test")
        csv.writer(file).writerows([table.columns, *table.rows])
    scores = read_row_table(tmp_path, "test", list(task.metric_info)).scores().scores
    for name in ("chrf", "chrf_whole_poem", "distinct_1", "distinct_2", "seq_rep_4", "lines", "greedy_seq_rep_4"):
        assert scores[f"test/{name}"].value == pytest.approx(found[f"test/{name}"], rel=1e-5), name
