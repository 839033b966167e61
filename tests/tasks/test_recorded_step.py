"""Recorded training steps, called without recording on a CPU, against ordinary steps."""

import math
from functools import partial

import pytest
import torch
from helpers.trainers import trainer
from lightning.pytorch import Callback
from lightning.pytorch.profilers import SimpleProfiler

from gpt2_pl.callbacks import DiscriminativeLR, GradualUnfreezing, NonFiniteLossGuard, Reproducibility
from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.errors import RunError
from gpt2_pl.model import GPT2Config
from gpt2_pl.optim import ConstantWithWarmup
from gpt2_pl.surgery import LoRA
from gpt2_pl.tasks import SentimentClassifier, recorded_step
from gpt2_pl.tasks.recorded_step import reason_not_to_record

CONFIG = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, dropout=0.1)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, fused=True)


class Record(Callback):
    """Keep the state of a run after each step, and the gradients that callbacks see."""

    def __init__(self, nan_at=()):
        self.losses, self.gradients, self.nan_at, self.recorded = [], [], nan_at, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.recorded = pl_module.recorded_step is not None
        weight = pl_module.head.linear.bias
        if trainer.global_step in self.nan_at:
            self.saved = weight.detach().clone()
            weight.data.fill_(math.nan)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append([None if grad is None else grad.clone() for grad in grads])
        if trainer.global_step in self.nan_at:
            pl_module.head.linear.bias.data.copy_(self.saved)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def toy_data(n_train):
    return ToySentiment(n_train=n_train, vocab_size=300, batch_size=16)  # the last batch is smaller


def fit(monkeypatch, records, callbacks=(), settings=None, task_settings=None, nan_at=(), data=None):
    if records:
        monkeypatch.setattr("gpt2_pl.tasks.pooled.reason_not_to_record", lambda task: None)
    else:
        monkeypatch.undo()
    torch.manual_seed(3)
    record = Record(nan_at)
    arguments = {"config": CONFIG, "num_classes": 3, "optimizer": adamw, "schedule": ConstantWithWarmup(warmup=2)}
    task = SentimentClassifier(**arguments | (task_settings or {}))
    data = data or toy_data(n_train=110)
    made = [make() for make in callbacks]
    run = trainer(
        callbacks=[Reproducibility(), record, *made], **{"max_epochs": 2, "limit_val_batches": 1} | (settings or {})
    )
    run.fit(task, data)
    assert record.recorded == records
    return record, task, run


def assert_equal_runs(one, two):
    (first, task, run), (second, other, again) = one, two
    assert first.losses == second.losses
    for left, right in zip(first.gradients, second.gradients, strict=True):
        for a, b in zip(left, right, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    parameters = dict(other.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in task.named_parameters())
    states = [optimizer.state_dict()["state"] for optimizer in (run.optimizers[0], again.optimizers[0])]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert all(torch.equal(value, states[1][index][name]) for name, value in state.items())


@pytest.mark.parametrize(("callbacks", "settings", "task_settings"), [
    pytest.param((), {"gradient_clip_val": 0.5}, {}, marks=pytest.mark.slow),
    pytest.param(
        (), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"pooling": "mean"}, marks=pytest.mark.slow
    ),
    ((), {"precision": "bf16-mixed"}, {"num_dropout_samples": 3, "pooling": "concat"}),
    ((), {}, {"surgery": [LoRA(rank=2, dropout=0.1)], "train_base": False, "frozen_base_dropout": True}),
    pytest.param((lambda: DiscriminativeLR(decay=0.5),), {"gradient_clip_val": 1.0}, {}, marks=pytest.mark.slow),
    ((GradualUnfreezing,), {"gradient_clip_val": 1.0}, {}),
], ids=["full", "clip by value", "bf16", "lora", "llrd", "unfreezing"])  # fmt: skip
def test_recorded_steps_equal_ordinary_steps(callbacks, settings, task_settings, monkeypatch, base):
    if "surgery" in task_settings:
        task_settings = {**task_settings, "config": None, "base": str(base)}
    runs = [
        fit(monkeypatch, records, callbacks, settings, task_settings, data=toy_data(n_train=150))
        for records in (True, False)
    ]
    assert len(runs[0][0].losses) == 20
    assert_equal_runs(*runs)


def test_recorded_step_with_non_finite_loss_names_the_step_and_changes_nothing(monkeypatch):
    reference = fit(monkeypatch, True, settings={"max_steps": 6})
    with pytest.raises(RunError, match=r"the loss is nan at epoch 1, step 7, rows \d+") as error:
        fit(monkeypatch, True, [NonFiniteLossGuard], {"max_steps": 12}, nan_at=(6,))
    assert len(error.value.args[0].split("rows ")[1].split(";")[0].split(",")) in (14, 16)
    guard = NonFiniteLossGuard("skip")
    _, task, run = fit(monkeypatch, True, [lambda: guard], {"max_steps": 7}, nan_at=(6,))
    assert guard.skipped == 1
    expected = dict(reference[1].named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in task.named_parameters())
    steps = {float(state["step"]) for state in run.optimizers[0].state_dict()["state"].values()}
    assert steps == {6.0}


def test_recorded_steps_with_a_skipped_step_equal_ordinary_steps(monkeypatch):
    runs = []
    for records in (True, False):
        guard = NonFiniteLossGuard("skip")
        _, task, _ = fit(monkeypatch, records, [partial(lambda guard: guard, guard)], {"max_steps": 12}, nan_at=(6, 9))
        assert guard.skipped == 2
        runs.append(task)
    expected = dict(runs[1].named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in runs[0].named_parameters())


def test_checkpoint_after_a_step_with_non_finite_loss_is_refused(monkeypatch, tmp_path):
    """A checkpoint is not written before the losses of all its steps are read."""

    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "bad.ckpt")

    with pytest.raises(RunError, match="step 7"):
        fit(monkeypatch, True, [NonFiniteLossGuard, Save], {"max_steps": 12}, nan_at=(6,))
    assert not (tmp_path / "bad.ckpt").exists()


class Reason(Callback):
    def on_train_batch_start(self, trainer, pl_module, *args):
        pl_module._total_steps = 100
        self.reason = reason_not_to_record(pl_module)


@pytest.mark.parametrize(("settings", "task_settings", "reason"), [
    ({}, {}, None),
    ({}, {"cuda_graphs": False}, "model.cuda_graphs is false"),
    ({}, {"activation_checkpointing": True}, "activations are checkpointed"),
    ({"accumulate_grad_batches": 2}, {}, "gradients are accumulated"),
    ({"profiler": SimpleProfiler()}, {}, "a profiler is used"),
    ({"detect_anomaly": True}, {}, "anomalies are detected"),
    ({}, {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1)}, "the optimizer is not torch.optim.AdamW"),
    ({}, {"optimizer": lambda groups: torch.optim.AdamW(groups)}, "the optimizer is not torch.optim.AdamW"),
    ({"strategy": "ddp"}, {}, "several processes train"),
], ids=["none", "option", "checkpointing", "batches", "profiler", "anomalies", "SGD", "not fused", "ddp"])  # fmt: skip
def test_reason_not_to_record_names_what_prevents_it(settings, task_settings, reason, monkeypatch):
    monkeypatch.setattr(recorded_step, "_is_on_gpu", lambda task: True)
    watch = Reason()
    run = trainer(max_steps=1, limit_val_batches=0, callbacks=[watch], **settings)
    run.fit(
        SentimentClassifier(config=CONFIG, num_classes=3, **{"optimizer": adamw} | task_settings),
        ToySentiment(n_train=64, vocab_size=300, batch_size=16),
    )
    assert watch.reason == reason or watch.reason.startswith(reason)


def test_reason_not_to_record_on_a_cpu_is_the_device(monkeypatch):
    watch = Reason()
    trainer(max_steps=1, limit_val_batches=0, callbacks=[watch]).fit(
        SentimentClassifier(config=CONFIG, num_classes=3, optimizer=adamw), ToySentiment(n_train=64, vocab_size=300)
    )
    assert watch.reason == "there is no CUDA device"


def test_recorded_step_pads_to_multiples_without_changing_losses(monkeypatch):
    """Hidden states at text do not depend on padding behind it."""
    found = {}
    for multiple in (1, 8):
        monkeypatch.setitem(recorded_step.LENGTH_MULTIPLE, "cpu", multiple)
        monkeypatch.setattr("gpt2_pl.tasks.pooled.reason_not_to_record", lambda task: None)
        torch.manual_seed(3)
        record = Record()
        task = SentimentClassifier(config=CONFIG, dropout=0.0, num_classes=3, optimizer=adamw)
        data = ToySentiment(n_train=96, vocab_size=300, batch_size=16)
        trainer(max_steps=5, limit_val_batches=0, callbacks=[record]).fit(task, data)
        found[multiple] = record.losses
    assert found[8] == pytest.approx(found[1], rel=1e-5)
