"""callbacks.Environment: process-wide switches are set for a run and set back after it."""

import pytest
import torch

from gpt2_pl.callbacks import Environment, environment
from gpt2_pl.tasks import LanguageModel, SentimentClassifier

SHAPE = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}


@pytest.fixture
def kept(monkeypatch):
    calls = []
    monkeypatch.setattr(environment, "disable_malloc_trim", lambda: calls.append(1))
    return calls


def test_environment_with_batches_of_many_lengths_disables_cudnn_until_the_end(kept):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    callback, task = Environment(), SentimentClassifier(config=SHAPE, num_classes=2)
    callback.setup(None, task, "fit")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    callback.setup(None, task, "test")  # fit tests its best checkpoint
    callback.teardown(None, task, "test")
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert kept == [1, 1]


def test_environment_with_batches_of_one_length_leaves_cudnn(kept):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    callback = Environment()
    callback.setup(None, LanguageModel(config=SHAPE), "fit")
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert kept == [1]


def test_task_setup_leaves_cudnn_and_malloc_unchanged(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr("gpt2_pl.kernels.malloc.ctypes.CDLL", lambda *_: pytest.fail("a task called mallopt"))
    SentimentClassifier(config=SHAPE, num_classes=2).setup("fit")
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
