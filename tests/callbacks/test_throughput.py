"""Speed, memory and floating-point operations of training."""

from types import SimpleNamespace

import pytest
import torch
from helpers.trainers import trainer

from gpt2_pl.callbacks import GradualUnfreezing, Throughput
from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.model import GPT2Config
from gpt2_pl.tasks import SentimentClassifier

SHAPE = GPT2Config(vocab_size=400, n_positions=64, n_embd=16, n_layer=2, n_head=2, dropout=0.1)


def fit(callback, *others, max_epochs=1):
    task = SentimentClassifier(config=SHAPE, num_classes=3)
    fitting = trainer(max_epochs=max_epochs, callbacks=[callback, *others])
    fitting.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    return task, fitting


def test_throughput_counts_rows_tokens_and_operations_of_every_batch():
    throughput = Throughput()
    task, fitting = fit(throughput, max_epochs=2)
    rows = fitting.datamodule.encoded["train"]
    tokens = 2 * int(sum(rows.lengths))
    assert (throughput.examples, throughput.tokens) == (128, tokens)
    per_token = task.training_flops_per_token(tokens / 128)
    assert throughput.flops == pytest.approx(per_token * tokens)
    record = throughput.record(fitting)
    assert record["tokens_per_second"] == pytest.approx(tokens / throughput.training_seconds)
    assert record["mfu"] is None  # the peak of a CPU is not known
    assert 0 < throughput.training_seconds < throughput.seconds


def test_throughput_gradual_unfreezing_counts_fewer_operations():
    full, gradual = Throughput(), Throughput()
    fit(full, max_epochs=2)
    fit(gradual, GradualUnfreezing(), max_epochs=2)
    assert gradual.tokens == full.tokens
    assert 0.3 < gradual.flops / full.flops < 0.9


@pytest.mark.parametrize("fitting", [True, False])
def test_load_state_dict_only_training_continues_the_counts(fitting):
    first, second = Throughput(), Throughput()
    fit(first)
    second.setup(SimpleNamespace(), SimpleNamespace(), "fit" if fitting else "test")
    second.load_state_dict(first.state_dict())
    expected = first if fitting else Throughput()
    assert (second.tokens, second.flops, second.seconds) == (expected.tokens, expected.flops, expected.seconds)


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 80GB HBM3", 1979e12 / 2), ("NVIDIA H200", 989e12)])
def test_mfu_known_gpu_is_the_share_of_its_data_sheet(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    gpus = SimpleNamespace(strategy=strategy, precision="bf16-mixed", world_size=2)
    throughput = Throughput()
    throughput.flops, throughput.training_seconds = 4.0 * peak, 5.0
    assert throughput.mfu(gpus) == pytest.approx(0.4, rel=0.01)


def test_throughput_resumed_with_implausible_counts_counts_on():
    """Counts of a damaged checkpoint cannot ask for a longer row than the model reads."""
    for state in ({"tokens": 10**15, "examples": 3}, {"tokens": 500}):
        throughput = Throughput()
        throughput.setup(SimpleNamespace(), SimpleNamespace(), "fit")
        throughput.load_state_dict(state)
        fit(throughput)
        assert throughput.flops > 0


def test_training_flops_per_token_longer_than_the_context_are_those_of_the_context():
    task, _ = fit(Throughput())
    assert task.training_flops_per_token(1e6) == task.training_flops_per_token(64)
