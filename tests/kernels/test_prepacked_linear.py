"""Linear layers with prepacked weights in training: gradients equal to PyTorch's, and weights that change."""

import copy
import io
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.prepacking import SHAPE, adapted, bfloat16, small_gpt2
from torch import nn

from gpt2_pl import kernels as kernels_package
from gpt2_pl.kernels import prepacked_linear as kernel
from gpt2_pl.kernels.prepacked_linear import Linear
from gpt2_pl.surgery import LoRA

pytestmark = bfloat16


@pytest.fixture
def model():
    return small_gpt2()


@pytest.fixture
def kernels(monkeypatch):
    """Record calls of ``prepack`` and ``prepacked_linear``; any number of rows is large enough."""
    calls = []
    for name in ("prepack", "prepacked_linear"):
        own = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    monkeypatch.setattr(kernel, "MIN_ROWS", 1)
    return calls


def gradients(layer, x, grad):
    for parameter in layer.parameters():
        parameter.grad = None
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(grad.to(y.dtype))
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("frozen", "biased"), [("nothing", True), ("nothing", False), ("weight", True), ("all", True), ("all", False)]
)
def test_linear_prepacked_training_step_equals_plain_linear(kernels, autocast, frozen, biased):
    torch.manual_seed(0)
    plain = nn.Linear(24, 37, bias=biased)
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16().float()
    layer = Linear(24, 37, bias=biased)
    layer.load_state_dict(plain.state_dict())
    x, grad = torch.randn(3, 7, 24).bfloat16().float(), torch.randn(3, 7, 37).bfloat16().float()
    exact = gradients(plain.double(), x.double(), grad.double())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen == "nothing" or (frozen == "weight" and name == "bias"))
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    for _ in range(2):  # packed already, the second time
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = gradients(layer, x, grad)
        assert [t is None for t in found[2:]] == [not p.requires_grad for p in layer.parameters()]
        assert [t.dtype for t in found[:2]] == [torch.bfloat16, x.dtype]
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in layer.parameters())
        for got, true in zip(found, exact, strict=True):
            if got is not None:
                assert (got - true).norm() < 0.004 * true.norm()
    expected = {"nothing": {"prepack": 2, "prepacked_linear": 2}}.get(frozen, {"prepack": 2, "prepacked_linear": 4})
    assert {name: kernels.count(name) for name in expected} == expected


@torch.no_grad()
def test_linear_changed_frozen_weight_is_prepacked_again(kernels):
    layer, x = Linear(8, 8).requires_grad_(False).bfloat16(), torch.randn(5, 8).bfloat16()

    def check(packings):
        kernels.clear()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=2**-7, atol=2**-7)
        assert kernels.count("prepack") == packings

    check(1)
    check(0)
    layer.weight.add_(1.0)
    check(1)
    layer.load_state_dict(Linear(8, 8).state_dict())
    check(1)
    layer.weight = nn.Parameter(torch.randn(8, 8).bfloat16(), requires_grad=False)
    check(1)
    layer.eval()
    assert layer._prepacked is None
    check(0)
    layer.train()
    layer.weight.data.add_(1.0)
    check(1)


def test_linear_replaced_weight_data_is_prepacked_again(kernels):
    layer, x = Linear(64, 64, bias=False).requires_grad_(False), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(20):
            layer.weight.data = torch.zeros(1)
            layer.weight.data = torch.full((64, 64), float(i))
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=2**-7, atol=2**-7)
            layer.double().weight.data.mul_(1.5)
            layer.float()
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=2**-7, atol=2**-7)
    layer.to("meta")
    assert layer._prepacked is None


def test_linear_frozen_weight_changed_before_backward_raises(kernels):
    for backward_before in (False, True):
        layer, x = Linear(8, 8).requires_grad_(False).bfloat16(), torch.randn(5, 8).bfloat16().requires_grad_()
        if backward_before:
            layer(x).sum().backward()
        y = layer(x)
        with torch.no_grad():
            layer.weight.add_(1.0)
        with pytest.raises(RuntimeError, match="changed in place"):
            y.sum().backward()


def test_linear_one_dimensional_input_has_correct_gradients(kernels):
    for frozen in (True, False):
        layer, x = Linear(8, 8).bfloat16(), torch.randn(8).bfloat16().requires_grad_()
        layer.weight.requires_grad_(not frozen)
        layer(x).sum().backward()
        assert layer.bias.grad.tolist() == [1.0] * 8
        torch.testing.assert_close(x.grad, layer.weight.sum(0), rtol=2**-6, atol=2**-6)
        if not frozen:
            torch.testing.assert_close(layer.weight.grad, x.detach().expand(8, 8))
    assert "prepacked_linear" in kernels


def test_linear_mismatched_dtypes_raise_runtime_error(kernels):
    for frozen in (True, False):
        with pytest.raises(RuntimeError, match="dtype"):
            Linear(8, 8).requires_grad_(not frozen)(torch.randn(5, 8).bfloat16())


def test_lora_merge_drops_prepacked_weights_of_adapters(model):
    adapted(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(61, (2, 5)))
    adapters = [module for module in model.modules() if hasattr(module, "lora_A") and isinstance(module, Linear)]
    assert all(adapter._prepacked is not None for adapter in adapters)
    LoRA.merge(model)
    assert all(adapter._prepacked is None for adapter in adapters)


def test_linear_unfrozen_weight_drops_prepacked_copy(kernels):
    layer, x = Linear(8, 8).requires_grad_(False).bfloat16(), torch.randn(5, 8).bfloat16()
    layer(x)
    assert layer._prepacked is not None
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer._prepacked is None
    assert layer.weight.grad is not None


def test_linear_with_prepacked_weight_can_be_copied_and_saved():
    layer, x = Linear(8, 8).requires_grad_(False).bfloat16(), torch.randn(5, 8).bfloat16()
    y = layer(x)
    assert layer._prepacked is not None
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert list(layer.state_dict()) == ["weight", "bias"]
    torch.save(layer.state_dict(), io.BytesIO())


def test_linear_trainable_weight_below_min_rows_is_not_prepacked(kernels, monkeypatch):
    monkeypatch.setattr(kernel, "MIN_ROWS", 11)
    layer = Linear(8, 8).bfloat16()
    layer(torch.randn(2, 5, 8).bfloat16())
    assert not kernels
    layer(torch.randn(2, 6, 8).bfloat16())
    assert kernels


def test_linear_unsupported_case_equals_plain_linear(kernels):
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    for why, frozen in itertools.product([*dtypes, "switched off", "evaluation"], [False, True]):
        dtype = dtypes.get(why, torch.bfloat16)
        layer = Linear(8, 8).to(dtype).requires_grad_(not frozen).train(why != "evaluation")
        x = torch.randn(5, 8, dtype=dtype)
        with torch.backends.mkldnn.flags(enabled=why != "switched off"):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)), why
        assert not kernels, why


@pytest.mark.parametrize("strategy", ["full", "dora", "checkpointed lora"])
def test_gpt2_prepacked_training_gradients_equal_plain(model, kernels, monkeypatch, strategy):
    if "full" not in strategy:
        adapted(model, use_dora=strategy == "dora")
    model.config = replace(SHAPE, dropout=0.0)
    for module in model.train().modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    model.activation_checkpointing = "checkpointed" in strategy
    ids = torch.randint(61, (3, 9))

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.logits(model(ids)).float().logsumexp(-1).mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    found = gradients()
    assert "prepacked_linear" in kernels
    monkeypatch.setattr(kernel, "supports_prepacking", lambda *_: False)
    expected = gradients()
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("adapt", [False, True])
def test_training_step_with_kernels_disabled_equals_enabled(model, monkeypatch, adapt):
    """Compare without dropout, whose masks differ between kernels and PyTorch."""
    if adapt:
        adapted(model)
    model.config = replace(SHAPE, dropout=0.0)
    for module in model.train().modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    monkeypatch.setattr(kernel, "MIN_ROWS", 1)
    ids = torch.randint(61, (3, 9))
    results = []
    for enabled in (True, False):
        monkeypatch.setattr(kernels_package, "_enabled", enabled)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.logits(model(ids)).float().logsumexp(-1).mean()
        loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert not torch.equal(*results)
    assert (results[0] - results[1]).norm() < 0.05 * results[1].norm()
