"""AdamW against torch's, schedules against closed forms, parameter groups against the model's parameters."""

import itertools
import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from gpt2_pl import GPT2, AdamW, GPT2Config
from gpt2_pl.optim import (
    ConstantWithWarmup,
    CosineWithWarmup,
    LinearWithWarmup,
    SlantedTriangular,
    decays,
    parameter_groups,
)


def parameters(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (3,), (2, 3, 4), ())]


def train(ours, theirs, steps, a, b):
    for step in range(steps):
        torch.manual_seed(step + 1)
        for i, (p, q) in enumerate(zip(a, b, strict=True)):
            p.grad = None if i == 1 and 50 <= step < 80 else torch.randn_like(p) + p.detach()  # frozen for a while
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step(), theirs.step()


def test_adamw_300_steps_equal_torch():
    for weight_decay in (0.0, 0.1):
        a, b = parameters(), parameters()
        settings = {"lr": 1e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": weight_decay}
        train(AdamW(a, **settings), torch.optim.AdamW(b, **settings), 300, a, b)
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours"])
def test_adamw_state_is_exchanged_with_torch_in_both_directions(direction):
    a, b = parameters(), parameters()
    ours, theirs = AdamW(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2)
    train(ours, theirs, 20, a, b)
    if direction == "ours to torch":
        state = deepcopy(ours.state_dict())
        theirs = torch.optim.AdamW(b, lr=1e-2)
        theirs.load_state_dict({**state, "param_groups": theirs.state_dict()["param_groups"]})
    else:
        state = deepcopy(theirs.state_dict())
        ours = AdamW(a, lr=1e-2)
        ours.load_state_dict(state)
    train(ours, theirs, 20, a, b)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_adamw_settings_out_of_range_are_refused():
    for settings in ({"lr": -1.0}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            AdamW(parameters(), **settings)


def test_slanted_triangular_factor_equals_closed_form():
    schedule = SlantedTriangular(cut_frac=0.1, ratio=32)
    for total in (*range(1, 24), 105, 1000):
        cut = total // 10
        for t in range(total):
            p = t / cut if t < cut else 1 - (t - cut) / (total - cut)
            assert schedule.factor(t, total) == pytest.approx((1 + p * 31) / 32), (t, total)
            assert 1 / 32 <= schedule.factor(t, total) <= 1
        assert schedule.factor(cut, total) == 1
        assert schedule.factor(total, total) == pytest.approx(1 / 32)


def test_warmup_schedules_factor_equals_closed_form():
    total = 20
    for (warmup, steps), t in itertools.product(((0, 0), (3, 3), (0.2, 4)), range(total)):
        rise = (t + 1) / (steps + 1)
        share = (t - steps) / (total - steps)
        assert LinearWithWarmup(warmup).factor(t, total) == pytest.approx(rise if t < steps else 1 - share)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
        assert CosineWithWarmup(warmup, floor=0.1).factor(t, total) == pytest.approx(rise if t < steps else cosine)
        assert ConstantWithWarmup(warmup).factor(t, total) == pytest.approx(min(rise, 1))


def test_decays_gpt2_parameters_selects_weight_matrices_only():
    model = GPT2(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    decayed = {
        name.removeprefix("h.0.").removeprefix("h.1.") for name, p in model.named_parameters() if decays(name, p)
    }
    assert decayed == {"wte.weight", "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}


def test_parameter_groups_contain_every_trainable_parameter_once():
    model = GPT2(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    model.wpe.requires_grad_(False)
    layers = {name: list(module.named_parameters(prefix=name)) for name, module in model.named_children()}
    layers["head"] = [("head.weight", model.wte.weight)]  # tied
    groups = parameter_groups(layers)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [g["name"] for g in groups] == ["wte", "h", "h/no_decay", "ln_f/no_decay"]
    assert all(g["weight_decay"] == 0 for g in groups if g["name"].endswith("no_decay"))
