"""What a training step does besides the model: waits for the device, optimizer calls, logging and seeding."""

import json
import statistics
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest
import torch
from helpers.trainers import trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_pl import kernels
from gpt2_pl.callbacks import NonFiniteLossGuard, Reproducibility, RunProgressBar
from gpt2_pl.callbacks.reproducibility import _seed
from gpt2_pl.datamodules import SST5, QuoraPairs, Sonnets, TextCorpus, TextRegression, ToySentiment, WebNLG
from gpt2_pl.model import GPT2Config
from gpt2_pl.surgery import LoRA
from gpt2_pl.tasks import (
    DPO,
    DataToText,
    LanguageModel,
    ParaphraseDetector,
    PoemGenerator,
    SentimentClassifier,
    TextRegressor,
)
from gpt2_pl.tasks.optimization import joined_groups

CONFIG = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, dropout=0.1)
READS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique")  # wait for a GPU
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # wait for a GPU if an index is boolean


class CountReads(TorchDispatchMode, Callback):
    """Count the operations of each training step that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_start(self, *args):
        self.steps.append(Counter())

    def on_validation_start(self, *args):
        self.steps.append(Counter())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.steps and (name in READS or (name in INDEXING and _has_mask(args[1]))):
            self.steps[-1][name] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(indices):
    """Return whether an index is boolean, so that its ``nonzero`` is computed within the operation."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def reads_of_steps(task, data, monkeypatch, batches=6):
    """Return the waits of the steps between the first, which draws the bar, and the last, which ends the epoch."""
    monkeypatch.setattr("gpt2_pl.callbacks.progress.MIN_UPDATE_INTERVAL", 60.0)
    count = CountReads()
    callbacks = [count, NonFiniteLossGuard(), Reproducibility(), RunProgressBar()]
    settings = {"gradient_clip_val": 1.0, "enable_progress_bar": True, "limit_val_batches": 0}
    enabled = kernels.set_enabled(False)  # kernels for CPUs read numbers, which are on the CPU
    try:
        with count:
            trainer(max_steps=batches, callbacks=callbacks, **settings).fit(task, data)
    finally:
        kernels.set_enabled(enabled)
    assert len(count.steps) == batches
    return count.steps[1:-1]


def sentiment(base, files, **options):
    files = {f"{split}_file": str(files[split]) for split in ("train", "val")}
    settings = {"labels": [str(i) for i in range(5)], "tokenizer": str(base), "max_length": 32, "batch_size": 8}
    return SentimentClassifier(base=str(base), num_classes=5, **options), SST5(**files, **settings)


def paraphrase(base, pair_files, **options):
    files = {f"{split}_file": str(pair_files[split]) for split in ("train", "val")}
    return ParaphraseDetector(base=str(base), num_classes=2, **options), QuoraPairs(
        **files, tokenizer=str(base), max_length=64, batch_size=8
    )


def corpus(base, files, **options):
    settings = {"column": "sentence", "tokenizer": str(base), "max_length": 16, "batch_size": 4, "stride": 8}
    return LanguageModel(base=str(base), **options), TextCorpus(train_file=str(files["train"]), **settings)


def regression(base, files):
    data = TextRegression(
        train_file=str(files["train"]), val_file=str(files["val"]), label_column="sentiment",
        tokenizer=str(base), max_length=32, batch_size=8,
    )  # fmt: skip
    return TextRegressor(base=str(base)), data


def poems(base, poem_files, **options):
    data = Sonnets(train_file=str(poem_files["train"]), tokenizer=str(base), max_length=64, batch_size=1)
    return PoemGenerator(base=str(base), **options), data


def data_to_text(base, tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [{"source": f"film {i}", "target": "a good film " * (1 + i % 3)} for i in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataToText(base=str(base)), WebNLG(train_file=str(file), tokenizer=str(base), batch_size=2, max_length=32)


TASKS = {
    "sentiment": lambda get: sentiment(get("base"), get("files")),
    "mean_pooling": lambda get: sentiment(get("base"), get("files"), pooling="concat", num_dropout_samples=3),
    "verbalizer": lambda get: sentiment(
        get("base"), get("files"), head="verbalizer", label_words=list("abcde"), label_token_ids=[1, 2, 3, 4, 5]
    ),
    "lora": lambda get: sentiment(get("base"), get("files"), surgery=[LoRA(rank=2)]),
    "paraphrase": lambda get: paraphrase(get("base"), get("pair_files")),
    "regression": lambda get: regression(get("base"), get("files")),
    "language_model": lambda get: corpus(get("base"), get("files")),
    "unlikelihood": lambda get: corpus(get("base"), get("files"), unlikelihood=0.5),
    "dpo": lambda get: corpus(get("base"), get("files"), dpo=DPO(rejected="shuffled", prompt_tokens=4)),
    "poems": lambda get: poems(get("base"), get("poem_files")),
    "data_to_text": lambda get: data_to_text(get("base"), get("tmp_path")),
}


@pytest.mark.parametrize("name", TASKS)
def test_training_step_of_every_task_reads_one_value_from_the_device(name, request, monkeypatch):
    """Only the guard reads the loss; the losses, the metrics, the progress bar and the loggers read nothing."""
    steps = reads_of_steps(*TASKS[name](request.getfixturevalue), monkeypatch)
    assert steps == [Counter({"_local_scalar_dense": 1})] * len(steps)


def test_sequence_unlikelihood_step_reads_no_value_for_each_decoded_token(request, monkeypatch):
    options = {"sequence_unlikelihood": 1.0, "sequence_prefix": 4, "sequence_length": 40}
    steps = reads_of_steps(*corpus(*map(request.getfixturevalue, ("base", "files")), **options), monkeypatch, 3)
    assert max(step.total() for step in steps) <= 5


@pytest.mark.parametrize("make", [
    lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=[0.9, 0.99], fused=False, foreach=False),
    lambda groups: torch.optim.Adam(groups, lr=1e-2),
    lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
])  # fmt: skip
def test_joined_groups_step_is_bitwise_equal_and_restores_the_groups(make):
    steps = {}
    for joins in (True, False):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(6)]
        decays, rates = (0.0, 0.1, 0.1, 0.0, 0.1, 0.1), (1e-2, 1e-2, 1e-2, 1e-2, 1e-3, 1e-2)
        groups = zip(weights, decays, rates, strict=True)
        optimizer = make(
            [{"params": [w], "weight_decay": d, "lr": r, "name": str(i)} for i, (w, d, r) in enumerate(groups)]
        )
        before = optimizer.param_groups
        for _ in range(5):
            for weight in weights:
                weight.grad = torch.randn(3, 4)
            if joins:
                with joined_groups(optimizer):
                    expected = 6 if isinstance(optimizer, torch.optim.SGD) else 3
                    assert len(optimizer.param_groups) == expected
                    optimizer.step()
            else:
                optimizer.step()
        assert optimizer.param_groups is before
        assert [group["params"][0] is weight for group, weight in zip(before, weights, strict=True)] == [True] * 6
        steps[joins] = weights
    assert all(torch.equal(one, two) for one, two in zip(*steps.values(), strict=True))


class Groups(Callback):
    """The number of parameter groups that callbacks see."""

    def __init__(self):
        self.sizes = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.sizes.append(len(optimizer.param_groups))


def test_fit_steps_of_adamw_join_groups_only_in_the_update(tmp_path):
    sizes, groups = [], Groups()

    def adamw(groups):
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        optimizer.register_step_post_hook(lambda opt, *_: sizes.append(len(opt.param_groups)))
        return optimizer

    data = ToySentiment(n_train=64, vocab_size=300, batch_size=16)
    run = trainer(max_epochs=1, limit_val_batches=0, gradient_clip_val=1.0, callbacks=[groups])
    run.fit(SentimentClassifier(config=CONFIG, num_classes=3, optimizer=adamw), data)
    assert sizes == [2] * 4  # with and without weight decay
    run.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {len(state["param_groups"]), *groups.sizes} == {len(run.optimizers[0].param_groups)}
    assert len(state["param_groups"]) > 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_loss_is_logged_every_n_steps(accumulate):
    logged = []

    class Logger(DummyLogger):
        def log_metrics(self, metrics, step):
            logged.extend([(step, metrics["train/loss_step"])] if "train/loss_step" in metrics else [])

    losses = {}

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (batch_idx + 1) % accumulate == 0:
                losses[trainer.global_step - 1] = pl_module.last_loss.item()

    data = ToySentiment(n_train=96, vocab_size=300, batch_size=16 // accumulate)
    settings = {"max_epochs": 1, "log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    trainer(**settings, callbacks=[Losses()], logger=Logger()).fit(
        SentimentClassifier(config=CONFIG, num_classes=3), data
    )
    assert logged == [(step, pytest.approx(losses[step])) for step in (1, 3, 5)]


def test_seed_draws_the_numbers_of_manual_seed():
    torch.manual_seed(2**62 + 5)
    expected = torch.rand(5)
    _seed(2**62 + 5, "cpu")
    assert torch.equal(torch.rand(5), expected)


class StepCosts(Callback):
    """Calls of Python functions, milliseconds of CPU time, and the batch of every step."""

    def __init__(self):
        self.calls, self.marks, self.batches = 0, [], []

    def count(self, frame, event, argument):
        self.calls += event == "call"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.marks.append((self.calls, 1000 * time.process_time()))
        self.batches.append(batch)

    def of_steps(self, kind):
        """Return a cost of every step after those that register metrics."""
        return [after[kind] - before[kind] for before, after in pairwise(self.marks[10:])]


def costs_of_steps(counts_calls):
    """Return the costs of steps of a model of one small layer, and its task."""
    shape = GPT2Config(vocab_size=300, n_positions=64, n_embd=8, n_layer=1, n_head=1, dropout=0.0)
    costs, task = StepCosts(), SentimentClassifier(config=shape, num_classes=3)
    callbacks = [NonFiniteLossGuard(), Reproducibility(), RunProgressBar(), costs]
    settings = {"gradient_clip_val": 1.0, "enable_progress_bar": True, "limit_val_batches": 0}
    data = ToySentiment(n_train=400, vocab_size=300, batch_size=8)
    run = trainer(max_epochs=1, callbacks=callbacks, **settings)
    sys.setprofile(costs.count if counts_calls else None)
    try:
        run.fit(task, data)
    finally:
        sys.setprofile(None)
    return costs, task


def test_training_step_calls_few_python_functions():
    """2,095 with PyTorch 2.13 and Lightning 2.6; 3,745 with torchmetrics in every step."""
    costs, _ = costs_of_steps(counts_calls=True)
    assert 1000 < statistics.median(costs.of_steps(0)) < 2400


def test_training_step_takes_few_times_the_cpu_time_of_a_bare_loop():
    """The fastest steps are compared, because other processes slow down the rest; measured 1.4 to 2.3."""
    costs, task = costs_of_steps(counts_calls=False)
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-5, fused=True)
    bare = []
    for batch in costs.batches:
        since = time.process_time()
        torch.nn.functional.cross_entropy(task(batch)[0], batch["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bare.append(1000 * (time.process_time() - since))
    assert min(costs.of_steps(1)) < 4 * min(bare)
