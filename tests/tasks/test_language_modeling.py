"""LanguageModel and TextCorpus against torch, loops and transformers."""

import csv
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, metrics
from helpers.refusals import names
from transformers import GPT2LMHeadModel

from gpt2_pl.datamodules import TextCorpus
from gpt2_pl.datamodules.batching import PackedTokenDataset, TokenDataset
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.rows import read_row_table
from gpt2_pl.losses import cross_entropy
from gpt2_pl.surgery import LoRA
from gpt2_pl.tasks import LanguageModel
from gpt2_pl.text.tokenizer import END_OF_TEXT, load_tokenizer


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_cross_entropy_chunked_equals_torch(chunk):
    hidden = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(30, (3, 7))
    targets[0, 4:] = targets[2, 1] = -100
    total, count = cross_entropy(hidden, weight, targets, chunk)
    (total * 0.3).backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    (expected * 0.3).backward()
    assert count == 17
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(ours, (hidden.grad, weight.grad))


@pytest.mark.parametrize(("multiple", "compiled"), [(1, False), (64, False), (64, True)])  # a vocabulary of 50
def test_cross_entropy_under_autocast_is_close_to_torch(multiple, compiled, monkeypatch):
    monkeypatch.setattr("gpt2_pl.losses.VOCAB_PAD_MULTIPLE", {"cpu": multiple})
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (2, 9))
    targets[1, 7:] = -100
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = cross_entropy(hidden, weight, targets, 4, compiled)
    total.backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-3)
    for mine, other in zip(ours, (hidden.grad, weight.grad), strict=True):
        assert (mine - other).norm() < 0.02 * other.norm()


def test_cross_entropy_bfloat16_mean_gradient_is_rounded_once():
    """1 / 7 is not exact in binary: bfloat16 would round it before it scales the gradients."""
    hidden, weight = torch.randn(1, 7, 4).bfloat16(), torch.randn(11, 4).bfloat16()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(11, (1, 7))
    total, count = cross_entropy(hidden, weight, targets)
    assert total.dtype == torch.float32
    of_sum = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    of_mean = torch.autograd.grad(total / count, (hidden, weight))
    for mean, whole in zip(of_mean, of_sum, strict=True):
        assert mean.dtype == torch.bfloat16
        assert torch.equal(mean, (whole.float() * (torch.tensor(1.0) / 7)).bfloat16())


def test_cross_entropy_without_targets_is_zero():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    total, count = cross_entropy(hidden, torch.randn(5, 4), torch.full((1, 3), -100))
    total.backward()
    assert (total.item(), count.item(), hidden.grad.abs().sum().item()) == (0.0, 0, 0.0)


def test_packed_token_dataset_rows_predict_every_token_once():
    for n in (2, 8, 9, 10, 31):
        rows = PackedTokenDataset(np.arange(n, dtype=np.uint16), 8)
        batch = rows.batch(np.arange(len(rows)))
        inputs, targets = [], []
        for ids, mask, target in zip(batch["input_ids"], batch["attention_mask"], batch["targets"], strict=True):
            inputs += ids[mask.bool()].tolist()
            targets += target[target != -100].tolist()
            assert (target != -100).sum() == mask.sum(), n
        assert inputs == list(range(n - 1)), n
        assert targets == list(range(1, n)), n
        assert all(length == 8 for length in rows.lengths[:-1]), n


def test_packed_token_dataset_with_stride_predicts_every_token_once(subtests):
    for n, context, stride in ((40, 8, 3), (41, 8, 8), (10, 8, 1), (9, 8, 5), (5, 8, 2), (34, 8, 8)):
        with subtests.test(n=n, context=context, stride=stride):
            check_strided_rows(n, context, stride)


def check_strided_rows(n, context, stride):
    tokens = np.arange(100, 100 + n, dtype=np.uint16)
    rows = PackedTokenDataset(tokens, context, stride)
    batch = rows.batch(np.arange(len(rows)))
    predicted = []
    for i, (ids, mask, targets) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"], batch["targets"], strict=True)
    ):
        length = int(mask.sum())
        assert ids[:length].tolist() == list(range(100 + i * stride, 100 + i * stride + length))
        for place, target in enumerate(targets.tolist()):
            if target != -100:
                assert target == ids[place] + 1
                assert i == 0 or place + 1 >= context - stride + 1
                predicted.append(target)
    assert predicted == list(range(101, 100 + n))
    assert rows.n_targets.sum() == n - 1
    if stride == context:
        apart = PackedTokenDataset(tokens, context)
        expected = apart.batch(np.arange(len(apart)))
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


@pytest.mark.parametrize("stride", [None, 5])
def test_validate_perplexity_equals_sliding_window_of_transformers(stride, run, base, story, tmp_path):
    """Use the loop of "Perplexity of fixed-length models", whose windows include the last target."""
    context, file = 32, tmp_path / "val.txt"
    file.write_text(story.read_text()[:700])
    flags = [] if stride is None else [f"--data.stride={stride}"]
    folder = run("validate", "--config", ROOT / "configs/task/text.yaml", "--model.base", base, *flags,
                 f"--data.val_file={file}", f"--data.max_length={context}", "--trainer.precision=32-true")  # fmt: skip
    tokenizer, model = load_tokenizer(base), GPT2LMHeadModel.from_pretrained(base).eval()
    ids = torch.tensor([[*tokenizer.encode(file.read_text()).ids, tokenizer.token_to_id(END_OF_TEXT)]])
    max_length, total, count, previous_end, of_rows = context + 1, 0.0, 0, 0, []
    for begin in range(0, ids.size(1), stride or context):
        end = min(begin + max_length, ids.size(1))
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : previous_end - begin] = -100
        with torch.no_grad():
            loss = model(window, labels=labels).loss
        n = int((labels[:, 1:] != -100).sum())
        total, count, previous_end = total + loss.item() * n, count + n, end
        of_rows.append([n, loss.item() * n, tokenizer.decode(labels[labels != -100].tolist()[-n:])])
        if end == ids.size(1):
            break
    assert count == ids.size(1) - 1
    account = metrics(folder)
    assert account["scores"]["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert account["data"]["tokens"]["val"] == count
    assert (account["data"]["context"], account["data"]["stride"]) == (context, stride or context)
    with (folder / "losses_val.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["row"] for row in rows] == [str(i) for i in range(1, len(of_rows) + 1)]
    assert [int(row["n_tokens"]) for row in rows] == [n for n, _, _ in of_rows]
    assert [float(row["loss"]) for row in rows] == pytest.approx([loss for _, loss, _ in of_rows], rel=1e-4)
    assert [row["text"].removesuffix(END_OF_TEXT) for row in rows] == [text for _, _, text in of_rows]
    scores = read_row_table(folder, "val", ("loss", "perplexity")).scores().scores
    assert scores["val/loss"].value == pytest.approx(account["scores"]["val/loss"], rel=1e-5)
    assert len(scores["val/perplexity"].contributions) == len(rows)  # one text has no clusters


def test_text_corpus_stride_out_of_range_is_refused(base, files):
    for stride in (0, -1, 33):
        options = {"column": "sentence", "tokenizer": str(base), "stride": stride}
        with pytest.raises(InputError, match=rf"got {stride}") as caught:
            TextCorpus(train_file=str(files["train"]), max_length=32, **options).setup()
        assert names(caught.value, "data.stride")
    data = TextCorpus(train_file=str(files["train"]), **options)
    data._max_length = lambda: 32  # what the model has room for
    with pytest.raises(InputError, match="got 33") as caught:
        data.setup()
    assert names(caught.value, "data.stride")


@pytest.mark.parametrize("stride", [None, 3])
def test_text_corpus_cluster_is_the_text_with_most_tokens_of_a_context(stride, base, tmp_path):
    generator = np.random.default_rng(0)
    texts = ["a good film . " * n for n in generator.choice([1, 2, 40], 30)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = TextCorpus(test_file=str(file), tokenizer=str(base), max_length=16, stride=stride)
    data.setup()
    rows, clusters = data.encoded["test"], data.clusters("test")
    is_end = rows.values == data.tokenizer.token_to_id(END_OF_TEXT)
    text_of = [int(is_end[:i].sum()) for i in range(len(is_end))]  # index of the text of every token
    assert len(clusters) == len(rows)
    majorities = 0
    for cluster, end, n in zip(clusters, rows.ends, rows.n_targets, strict=True):
        (most, count), *_ = Counter(text_of[end - n + 1 : end + 1]).most_common(1)
        if 2 * count > n:
            assert cluster == most
            majorities += 1
    assert majorities > len(rows) / 2
    assert 1 < len(set(clusters)) < len(rows)


def test_text_corpus_of_one_text_or_other_rows_has_no_clusters(base, story):
    data = TextCorpus(test_file=str(story), tokenizer=str(base), max_length=16)
    data.setup()
    assert data.clusters("test") is None
    data.encoded["test"] = TokenDataset(np.arange(9), np.array([0, 4, 9]))
    assert data.clusters("test") is None


def test_text_corpus_stride_applies_to_validation_only(base, files):
    data = [TextCorpus(train_file=str(files["train"]), column="sentence", tokenizer=str(base), max_length=32, **options)
            for options in ({}, {"stride": 4})]  # fmt: skip
    for corpus in data:
        corpus.setup()
    apart, overlapping = ({split: rows.lengths for split, rows in corpus.encoded.items()} for corpus in data)
    assert np.array_equal(apart["train"], overlapping["train"])
    assert len(apart["val"]) < len(overlapping["val"])


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    lines = [
        f"The film number {i} is fine.\n\n\n  And {i * i} people saw it,\nall of them twice.\n" for i in range(300)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_text_corpus_rows_of_a_table_are_separate_texts(files, base):
    data = TextCorpus(train_file=str(files["train"]), column="sentence", tokenizer=str(base), max_length=32)
    data.setup()
    tokenizer = load_tokenizer(base)
    rows = [line.split("\t")[0].strip() for line in files["train"].read_text().splitlines()[1:]]
    expected = [i for row in rows for i in [*tokenizer.encode(row).ids, tokenizer.token_to_id(END_OF_TEXT)]]
    n_train = round(len(expected) * 0.95)
    assert data.encoded["train"].values.tolist() == expected[:n_train]
    assert data.encoded["val"].values.tolist() == expected[n_train:]


def test_fit_language_model_perplexity_equals_transformers(run, base, files, capsys):
    folder = run(
        "fit", "--config", ROOT / "configs/task/text.yaml", "--model.base", base, "--data.column=sentence",
        *(f"--data.{split}_file={path}" for split, path in files.items()), "--data.max_length=32",
        "--trainer.max_epochs=2", "--model.optimizer.init_args.lr=3e-3", "--trainer.precision=32-true",
    )  # fmt: skip
    account = metrics(folder)
    losses = [epoch["val/loss"] for epoch in account["epochs"]]
    assert losses[1] < losses[0] < math.log(400)
    assert account["scores"]["test/perplexity"] == pytest.approx(math.exp(account["scores"]["test/loss"]), rel=1e-5)
    assert account["monitor"] == "val/loss"
    out = " ".join(capsys.readouterr().out.split())
    assert "val perplexity" in out
    assert "stride 32" in out

    run("export", folder, "--format=hf", "--out", folder / "hf")
    theirs = GPT2LMHeadModel.from_pretrained(folder / "hf").eval()
    data = TextCorpus(test_file=str(files["test"]), column="sentence", tokenizer=str(base), max_length=32)
    data.setup("test")
    total = count = 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            logits = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            total += F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum").item()
            count += int((batch["targets"] != -100).sum())
    assert account["scores"]["test/loss"] == pytest.approx(total / count, abs=1e-4)


def test_text_corpus_unusable_file_is_refused(files, base, tmp_path, subtests):
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("a")
    latin.write_bytes(b"caf\xe9\n")
    for file, words in (
        ("/nowhere.txt", "/nowhere.txt"), (files["train"], "'text'"), (short, "2 tokens"), (latin, "UTF-8"),
        (None, "data.train_file"),
    ):  # fmt: skip
        with subtests.test(words), pytest.raises(InputError, match=words):
            TextCorpus(train_file=file and str(file), tokenizer=str(base), max_length=16).setup("fit")


def test_fit_from_scratch_trains_a_tokenizer_and_records_flops(run, files, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("\n".join(line.split("\t")[0] for line in files["train"].read_text().splitlines()[1:]) * 3)
    shape = "{vocab_size: 300, n_positions: 32, n_embd: 32, n_layer: 2, n_head: 2, dropout: 0.0}"
    folder = run("fit", "--config", ROOT / "configs/task/text.yaml", "--model.base=null", "--model.config", shape,
                 f"--data.train_file={text}", "--data.vocab_size=300", "--data.max_length=32", "--trainer.max_epochs=2",
                 "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=2",
                 "--model.optimizer.init_args.lr=3e-3")  # fmt: skip
    account = metrics(folder)
    assert account["scores"]["val/perplexity"] < 150 < 300
    assert account["mfu"] is None  # of a CPU
    per_token = 6 * (12 * 2 * 32**2 + 300 * 32) + 12 * 2 * 32 * 32
    tokens = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["Throughput"]["tokens"]
    assert account["training_flops"] == pytest.approx(per_token * tokens, rel=0.02)
    assert load_tokenizer(folder).get_vocab_size() == 300

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    assert {"train/tokens_per_second"} <= set(board.Tags()["scalars"])


def test_text_corpus_tokenizer_and_vocab_size_together_are_refused(base, files):
    with pytest.raises(InputError, match=r"data\.vocab_size.*data\.tokenizer"):
        TextCorpus(train_file=str(files["train"]), tokenizer=str(base), vocab_size=300)


def flops_per_token(model, ids):
    """Return the operations per token of a training step of a Hugging Face model with eager attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("surgery", [[], [LoRA(rank=4)]], ids=["full", "lora"])
def test_training_flops_per_token_equals_count_of_transformers_and_peft(surgery, base):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    task = LanguageModel(base=str(base), surgery=surgery)
    task.configure_model()
    state = torch.random.get_rng_state()
    ours = task.training_flops_per_token(48.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    theirs = GPT2LMHeadModel.from_pretrained(base, attn_implementation="eager")
    if surgery:
        theirs = get_peft_model(theirs, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    expected = flops_per_token(theirs, torch.zeros(1, 48, dtype=torch.long))
    assert ours == pytest.approx(expected, rel=0.01)


def test_training_flops_per_token_frozen_layers_cost_less(base):
    task = LanguageModel(base=str(base))
    task.configure_model()
    everything = task.training_flops_per_token(32.0)
    assert everything == pytest.approx(6 * (12 * 2 * 32**2 + 400 * 32) + 12 * 2 * 32 * 32, rel=0.01)  # PaLM, appendix B
    task.gpt2.requires_grad_(False)
    assert task.training_flops_per_token(32.0) == pytest.approx(everything / 3, rel=0.01)


def test_unlikelihood_ignores_unknown_token_is_refused(base, files):
    from lightning.pytorch import Trainer

    task = LanguageModel(base=str(base), unlikelihood=1.0, unlikelihood_ignores=["no such token"])
    data = TextCorpus(train_file=str(files["train"]), column="sentence", tokenizer=str(base), max_length=32)
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_checkpointing": False}
    with pytest.raises(InputError, match="'no such token'"):
        Trainer(max_steps=1, use_distributed_sampler=False, **quiet).fit(task, data)
