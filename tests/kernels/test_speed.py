"""Speed of the kernels against the PyTorch functions that they replace."""

import time

import pytest
import torch

from gpt2_pl import GPT2, GPT2Config, kernels
from gpt2_pl.kernels.prepacked_linear import supports_prepacking
from gpt2_pl.losses import cross_entropy

HAS_BFLOAT16 = supports_prepacking(torch.device("cpu"), torch.bfloat16)


def step_seconds(model, ids, enabled):
    """Return the CPU seconds of a forward and a backward pass in training."""
    previous = kernels.set_enabled(enabled)
    try:
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            total, n_targets = cross_entropy(model(ids[:, :-1]), model.head_weight, ids[:, 1:])
        (total / n_targets).backward()
        return time.process_time() - start
    finally:
        kernels.set_enabled(previous)
        model.zero_grad(set_to_none=True)


@pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN has no bfloat16 on this CPU")
def test_training_step_with_kernels_is_faster_than_without():
    config = GPT2Config(vocab_size=2000, n_positions=128, n_embd=256, n_layer=2, n_head=4, dropout=0.1)
    model, ids = GPT2(config).train(), torch.randint(0, 2000, (16, 97))
    rounds = [[step_seconds(model, ids, enabled) for enabled in (True, False)] for _ in range(4)]
    fastest = [min(seconds) for seconds in zip(*rounds, strict=True)]
    assert fastest[1] / fastest[0] >= 1.1, fastest
