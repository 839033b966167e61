"""DPO: losses, log-probabilities, pairs, gradients and resumed runs, against formulas on transformers' logits."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, metrics
from helpers.refusals import refusal, refused
from helpers.stops import state
from helpers.trainers import trainer
from lightning.pytorch import Callback
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2, GPT2Config, pretrained
from gpt2_pl.datamodules import Sonnets, TextCorpus
from gpt2_pl.datamodules.pairs import PairDataset
from gpt2_pl.surgery import LoRA, PeftAdapter, PrefixTuning, PromptTuning, peft_format
from gpt2_pl.tasks import DPO, LanguageModel, PoemGenerator
from gpt2_pl.tasks.dpo import corrupt, sequence_log_probs
from gpt2_pl.tasks.preferences import reference_model
from gpt2_pl.text.tokenizer import END_OF_TEXT

CONFIG = ROOT / "configs"
PAIRS = [
    {"prompt": "the plot", "chosen": " is wonderful and quiet", "rejected": " is is is"},
    {"prompt": "an actor", "chosen": " of note\n", "rejected": " of a boring film, not at all wonderful"},
    {"prompt": "not", "chosen": " boring", "rejected": " wonderful at all"},
]


@pytest.fixture
def pairs_file(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


class Record(Callback):
    """Keeps the gradient of every step, the pairs' log-probabilities under the reference, and the logged losses."""

    def __init__(self):
        self.gradients, self.losses = [], []

    def on_train_start(self, trainer, pl_module):
        self.pairs = trainer.datamodule.pairs["train"]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append({name: grad.clone() for name, grad in grads.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        assert not pl_module.backbone.training
        self.losses.append(float(outputs["loss"]))


def fit(base, data, task=LanguageModel, accumulate=1, steps=1, **options):
    """Fit for some steps with SGD of rate 0; return the record, the task and the trainer."""
    record = Record()
    made = task(base=str(base), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), **options)
    runner = trainer(max_steps=steps, accumulate_grad_batches=accumulate, callbacks=[record])
    runner.fit(made, datamodule=data)
    return record, made, runner


@pytest.fixture
def corpus(base, files):
    def corpus(max_length=24, **settings):
        texts = {f"{split}_file": str(files[split]) for split in ("train", "val")}
        return TextCorpus(**texts, column="sentence", tokenizer=str(base), max_length=max_length, **settings)

    return corpus


def answers_log_probs(model, tokenizer, rows, end):
    """Return log p (N, 2) of both answers by transformers' logits, a text at a time."""
    found = []
    for row in rows:
        for answer in (row["chosen"], row["rejected"]):
            prompt, rest = (tokenizer.encode(text, add_special_tokens=False).ids for text in (row["prompt"], answer))
            ids = torch.tensor([[*prompt, *rest, end]])
            log_p = model(ids).logits[0].log_softmax(-1)
            found.append(sum(log_p[t - 1, ids[0, t]] for t in range(len(prompt), ids.size(1))))
    return torch.stack(found).view(-1, 2)


# Losses


def test_dpo_loss_smoothing_and_ipo_equal_values_by_hand():
    log_probs, reference = torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -10.0]])
    m = (-10.0 + 11.0) - (-12.0 + 10.0)  # 3
    right, wrong = (-math.log(1 / (1 + math.exp(-sign * 0.2 * m))) for sign in (1, -1))
    for settings, expected in (
        ({}, right),
        ({"label_smoothing": 0.1}, 0.9 * right + 0.1 * wrong),
        ({"loss": "ipo"}, (m - 2.5) ** 2),
    ):
        losses, rewards = DPO(beta=0.2, **settings)(log_probs, reference)
        assert losses.tolist() == pytest.approx([expected])
        assert rewards[0].tolist() == pytest.approx([0.2, -0.4])


def test_dpo_loss_at_the_reference_is_log_2():
    log_probs = torch.randn(5, 2)
    assert DPO()(log_probs, log_probs)[0].tolist() == pytest.approx([math.log(2)] * 5)


def test_dpo_loss_gradient_equals_finite_differences():
    torch.manual_seed(2)
    hidden = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (4, 6))
    targets[0, :3], targets[1, 4:], targets[3, 1] = -100, -100, -100
    reference = torch.randn(2, 2, dtype=torch.float64)
    for settings in ({"label_smoothing": 0.2}, {"loss": "ipo"}):
        for average in (False, True):

            def loss(hidden, weight, settings=settings, average=average):
                log_probs = sequence_log_probs(hidden, weight, targets, average, chunk=5)
                return DPO(beta=0.3, **settings)(log_probs.view(2, 2), reference)[0]

            assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_sequence_log_probs_equal_log_softmax():
    hidden, weight, targets = torch.randn(3, 7, 5), torch.randn(9, 5), torch.randint(9, (3, 7))
    targets[0, :4], targets[2] = -100, -100
    log_p = (hidden @ weight.T).log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = log_p.masked_fill(targets == -100, 0.0).sum(1)
    torch.testing.assert_close(sequence_log_probs(hidden, weight, targets, chunk=4), expected)
    counts = (targets != -100).sum(1)
    averages = sequence_log_probs(hidden, weight, targets, average=True)
    torch.testing.assert_close(averages[:2], expected[:2] / counts[:2])
    assert averages[2] == 0.0


def test_dpo_settings_out_of_range_are_refused():
    for settings, key in (
        ({"beta": 0.0}, "beta"), ({"label_smoothing": 0.5}, "label_smoothing"), ({"loss": "hinge"}, "loss"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"), ({"rejected": "worse"}, "rejected"),
        ({"val_pairs_file": "f"}, "pairs_file"), ({"reference": "mine"}, "reference"), ({"top_p": 0.0}, "top_p"),
        ({"prompt_tokens": 0}, "prompt_tokens"), ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
    ):  # fmt: skip
        error = refusal(lambda settings=settings: DPO(**settings), case=key)
        assert str(error).startswith(f"model.dpo.{key} must be "), error


# Steps


def test_dpo_step_on_a_file_equals_the_formula_on_transformers_logits(base, corpus, pairs_file):
    """The reference has other weights than the model, so that the margins are not 0."""
    data = corpus(max_length=64, batch_size=3)
    end = data.tokenizer.token_to_id(END_OF_TEXT)
    model = GPT2LMHeadModel.from_pretrained(base).eval()
    other = GPT2LMHeadModel.from_pretrained(base).eval()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
        reference = answers_log_probs(other, data.tokenizer, PAIRS, end)

    class Other(LanguageModel):
        def on_train_start(self):
            super().on_train_start()
            self.datamodule.pairs["train"].reference[:] = reference

    settings = DPO(beta=0.5, label_smoothing=0.1, pairs_file=str(pairs_file))
    record, task, runner = fit(base, data, Other, dpo=settings)
    ratios = answers_log_probs(model, data.tokenizer, PAIRS, end) - reference
    m = 0.5 * (ratios[:, 0] - ratios[:, 1])
    loss = (-0.9 * m.sigmoid().log() - 0.1 * (-m).sigmoid().log()).mean()
    loss.backward()
    logged = runner.callback_metrics
    assert float(logged["train/dpo_loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(logged["train/reward_margin"]) == pytest.approx(m.mean().item(), abs=1e-5)
    assert float(logged["train/reward_accuracy"]) == pytest.approx((m > 0).float().mean().item())
    scores = runner.validate(task, data, verbose=False)[0]
    assert "val/perplexity" in scores
    assert "val/dpo_loss" not in scores
    gradient = record.gradients[0]
    for name, expected in model.transformer.named_parameters():
        expected = expected.grad.T if "c_" in name and name.endswith("weight") else expected.grad
        torch.testing.assert_close(gradient[f"gpt2.{name}"], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), [("samples", {}), ("repeated", {"loss": "ipo", "beta": 0.5})])
def test_dpo_accumulated_step_equals_one_batch(kind, options, base, corpus):
    settings = {"dpo": DPO(rejected=kind, prompt_tokens=6, max_new_tokens=9, **options), "dropout": 0.0}
    whole, task, _ = fit(base, corpus(batch_size=200), **settings)
    parts, _, _ = fit(base, corpus(batch_size=5), accumulate=1000, **settings)
    assert len(whole.gradients) == len(parts.gradients) == 1
    assert len(parts.losses) > 3
    for name, expected in whole.gradients[0].items():
        torch.testing.assert_close(parts.gradients[0][name], expected, rtol=1e-4, atol=1e-6)
    if kind == "samples":
        assert whole.losses[0] == pytest.approx(math.log(2), abs=1e-5)
        assert task.monitor == "val/dpo_loss"


def test_dpo_reference_with_adapters_off_equals_a_frozen_copy(base, corpus, tmp_path, subtests):
    copy = pretrained.load(base).eval()
    torch.manual_seed(3)
    trained = LoRA(rank=2, dropout=0.0).apply(pretrained.load(base))
    with torch.no_grad():
        trained.h[0].attn.c_attn.lora_B.normal_(std=0.3)
    peft_format.save(trained, tmp_path / "adapter", str(base))
    for surgery, reference, equal in (
        ([LoRA(rank=2, dropout=0.5)], None, "base"),
        ([PrefixTuning(length=3)], None, "base"),
        ([PromptTuning(length=3)], None, "base"),
        ([PromptTuning(length=3)], "start", None),
        ([PeftAdapter(str(tmp_path / "adapter"))], None, "adapter"),
        ([PeftAdapter(str(tmp_path / "adapter"))], "base", "base"),
        (None, None, "base"),
    ):
        with subtests.test(surgery=surgery, reference=reference):
            dpo = DPO(rejected="shuffled", prompt_tokens=6, max_new_tokens=9, reference=reference)
            record, task, _ = fit(base, corpus(batch_size=20), surgery=surgery, dpo=dpo)
            rows = np.arange(7)
            batch = record.pairs.batch(rows)
            model = {"base": copy, "adapter": trained.eval(), None: task.backbone}[equal]
            with torch.no_grad():
                hidden = model(batch["input_ids"])
                expected = sequence_log_probs(hidden, model.head_weight, batch["targets"]).view(-1, 2)
            torch.testing.assert_close(torch.from_numpy(record.pairs.reference[rows]), expected, rtol=1e-5, atol=1e-4)
            is_start = reference_model(task) is task.backbone
            assert is_start == (surgery is None or equal in ("adapter", None))


# Pairs


def test_corrupt_lines_and_parts_are_repeated_or_shuffled():
    end = 99
    lines, ends = [1, 2, 3, 4, 5, 6, 7, end], [False, True, False, True, True, False, False, True]
    assert corrupt(lines, ends, "repeated", "s", end) == [1, 2, 1, 2, 5, 5, end]
    shuffled = corrupt(lines, ends, "shuffled", "s", end)
    assert shuffled != lines
    assert sorted(shuffled) == sorted(lines)
    assert shuffled[-1] == end
    assert "1, 2" in str(shuffled)
    assert shuffled == corrupt(lines, ends, "shuffled", "s", end)
    prose = list(range(20))
    assert corrupt(prose, [False] * 20, "repeated", "s", end) == [*range(8), *range(8), *range(16, 20)]
    assert corrupt([1, end], [False, True], "shuffled", "s", end) == [1, end]


def test_pair_dataset_targets_are_those_of_the_answers():
    batch = PairDataset([([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11])]).batch(np.array([1, 0]))
    assert batch["row"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [[7, 0, 0, 0], [7, 9, 10, 0], [1, 2, 3, 4], [1, 2, 3, 0]]
    n = -100
    assert batch["targets"].tolist() == [[8, n, n, n], [9, 10, 11, n], [n, n, 4, 5], [n, n, 6, n]]


def test_dpo_samples_of_poems_end_as_generated_poems_do(poem_files, tmp_path, base):
    torch.manual_seed(0)
    folder = tmp_path / "long"
    GPT2(GPT2Config(vocab_size=400, n_positions=640, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    flags = {f"{split}_file": str(file) for split, file in poem_files.items()}
    data = Sonnets(**flags, prompt_lines=1, tokenizer=str(folder), batch_size=4)
    dpo = DPO(max_new_tokens=30, temperature=0.7)
    record, task, runner = fit(folder, data, PoemGenerator, dpo=dpo, num_val_samples=1, max_new_tokens=5)
    pairs, tokenizer = record.pairs, data.tokenizer
    end = tokenizer.token_to_id(END_OF_TEXT)
    decode = lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False)  # noqa: E731
    assert len(pairs) == 9
    for n in range(9):
        chosen, rejected = (pairs.sides.row(i) for i in (2 * n, 2 * n + 1))
        assert decode(chosen) == data.poems["train"][n].text
        assert pairs.sides.targets[pairs.sides.offsets[2 * n + 1] - 1] == end
        opening = data.poems["train"][n].opening(1)
        assert decode(rejected).startswith(opening)
        assert int(pairs.sides.n_targets[2 * n + 1]) <= 30
    scores = runner.validate(task, data, verbose=False)[0]
    assert {"val/dpo_loss", "val/reward_accuracy", "val/reward_margin", "val/perplexity"} <= scores.keys()
    assert scores["val/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert data.description()["pairs"]["train"]["rows"] == 9
    again, _, _ = fit(folder, Sonnets(**flags, prompt_lines=1, tokenizer=str(folder)), PoemGenerator, dpo=dpo)
    assert again.pairs.digest == pairs.digest


def test_dpo_invalid_pairs_are_refused_with_file_and_row(base, corpus, tmp_path, subtests):
    long = "the plot " * 60
    for rows, words in (
        ([{**PAIRS[0], "chosen": ""}], "row 1: 'chosen' must be a non-empty string"),
        ([PAIRS[0], {"prompt": "a", "rejected": "b"}], "row 2: 'chosen' must be a non-empty string, got None"),
        ([PAIRS[0], {**PAIRS[1], "rejected": PAIRS[1]["chosen"]}], "row 2: chosen and rejected must differ"),
        ([{**PAIRS[0], "prompt": long}], "row 1: prompt must have 1 to 24 tokens, got"),
        ([{"prompt": "a", "chosen": "b"}], "has no column 'rejected'"),
        ([], "is empty"),
    ):
        file = write(tmp_path / "bad.jsonl", rows)
        with subtests.test(words):
            error = refusal(lambda file=file: fit(base, corpus(), dpo=DPO(pairs_file=str(file))), case=words)
            assert words in str(error)
            assert str(file) in str(error)
    with subtests.test("settings"):
        error = refusal(lambda: fit(base, corpus(), dpo=DPO(prompt_tokens=30)))
        assert "model.dpo.prompt_tokens must be less than" in str(error)
        error = refusal(lambda: fit(base, corpus(), dpo=DPO(), unlikelihood=1.0))
        assert str(error) == "model.unlikelihood must be 0 with model.dpo, got 1.0"


# Commands


@pytest.fixture
def dpo_flags(base, poem_files):
    flags = [f"--data.{split}_file={poem_files['train']}" for split in ("train", "test")]
    return [
        "fit", f"--config={CONFIG}/task/sonnets.yaml", f"--config={CONFIG}/strategy/dpo.yaml", *flags,
        f"--model.base={base}", "--data.prompt_lines=1", "--data.max_length=40", "--data.batch_size=2",
        "--model.dpo.max_new_tokens=20", "--model.max_new_tokens=20", "--trainer.max_epochs=2",
        "--model.optimizer.lr=1e-3", "--model.num_val_samples=0",
    ]  # fmt: skip


def test_dpo_resumed_run_is_bitwise_equal(run, capsys, dpo_flags):
    """The prefix is drawn at random, and in a resumed run the samples must come from the prefix as it was drawn."""
    settings = [flag for flag in dpo_flags if "test_file" not in flag]
    settings += ["--model.schedule={class_path: gpt2_pl.optim.ConstantWithWarmup, init_args: {warmup: 0}}"]
    settings += [f"--config={CONFIG}/strategy/prefix_tuning.yaml", "--model.dpo.reference=start"]
    settings += ["--model.surgery=[{class_path: gpt2_pl.surgery.PrefixTuning, init_args: {length: 3, hidden: 4}}]"]
    whole = state(run(*settings, "--name=whole"))
    stopped = run(*settings, "--trainer.max_steps=3", "--name=stopped")
    for file in Path(datasets.config.HF_DATASETS_CACHE).rglob("samples-*.json"):
        file.unlink()  # the samples are drawn again
    checkpoint = f"--ckpt_path={stopped}/checkpoints/last.ckpt"
    for flag, key in (
        ("--model.dpo.temperature=0.5", "model.dpo.temperature must be 1.0, as in the resumed run"),
        ("--model.dpo.beta=0.2", "model.dpo.beta must be 0.1"),
        ("--model.dpo=null", "model.dpo must be"),
    ):
        assert key in refused(run, capsys, *settings, flag, checkpoint)
    renamed = refused(run, capsys, *settings, "--model.dpo.temperature=0.5", checkpoint, "--name=new", "--version=9")
    assert "the pairs of model.dpo must be those of the checkpoint" in renamed
    resumed = state(run(*settings, checkpoint))
    assert resumed["pairs"] == whole["pairs"]
    assert resumed["hyper_parameters"]["dpo"]["beta"] == 0.1
    assert resumed["global_step"] == whole["global_step"] > 3
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


def test_dpo_after_lora_starts_from_the_trained_model(run, dpo_flags, tmp_path):
    """From an exported model and from an exported adapter, which is trained further: the first loss is log 2."""
    lora = ["fit", f"--config={CONFIG}/task/sonnets.yaml", f"--config={CONFIG}/strategy/lora.yaml", *dpo_flags[3:8]]
    first = run(*lora, "--trainer.max_epochs=1", "--model.max_new_tokens=5", "--name=lora")
    for form in ("hf", "peft"):
        run("export", first, f"--format={form}", f"--out={tmp_path / form}")
    peft = f"[{{class_path: gpt2_pl.surgery.PeftAdapter, init_args: {{folder: {tmp_path}/peft}}}}]"
    once = ["--trainer.max_epochs=1", "--model.optimizer.lr=1e-9"]
    losses = []
    for start in ([f"--model.base={tmp_path}/hf"], [f"--model.surgery={peft}"]):
        account = metrics(run(*dpo_flags, *start, *once))
        losses.append(account["scores"]["val/loss"])
        assert account["scores"]["val/dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert account["monitor"] == "val/dpo_loss"
        assert {"test/chrf", "test/perplexity", "val/reward_accuracy", "val/reward_margin"} <= account["scores"].keys()
        assert account["epochs"][0]["train/dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(metrics(first)["scores"]["val/loss"], rel=1e-4)
    dpo = run(*dpo_flags, f"--model.surgery={peft}", "--name=after")
    (tmp_path / "openings.txt").write_text("1\n\nthe plot\n")
    run("generate", dpo, "--poems", f"--prompt_file={tmp_path}/openings.txt", f"--out={tmp_path}/poems.txt",
        "--max_new_tokens=10")  # fmt: skip
    assert (tmp_path / "poems.txt").read_text().startswith("1\n")
    run("compare", dpo, first, f"--out={tmp_path}/report")
    report = (tmp_path / "report" / "report.md").read_text()
    assert "dpo" in report
    assert "left out" not in report
