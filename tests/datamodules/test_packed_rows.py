"""Prepacked weights: results equal to PyTorch's, and layers restored afterwards."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt2_pl import GPT2, GPT2Config, generate
from gpt2_pl import kernels as kernels_package
from gpt2_pl.kernels import prepacked_linear as kernel
from gpt2_pl.kernels.prepacked_linear import MIN_CALLS, Linear, PrepackedLinear, prepacked_weights
from gpt2_pl.surgery import LoRA

SHAPE = GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, dropout=0.1)

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2(SHAPE)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model.eval()


def adapted(model, **settings):
    LoRA(rank=3, targets=["c_attn", "c_fc", "wte"] if not settings else ["q", "v", "mlp.c_proj"], **settings).apply(
        model
    )
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def prepacked(model, num_calls):
    return prepacked_weights(model.h, lambda: model.head_weight, num_calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 24), (12, 1, 24), (3, 7, 24)])
@pytest.mark.parametrize("biased", [True, False])
def test_prepacked_linear_any_shape_and_dtype_equals_linear(dtype, shape, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(37, 24, dtype=dtype)
    bias = torch.randn(37, dtype=dtype) if biased else None
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    with torch.no_grad():
        y = PrepackedLinear(weight, bias)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("surgery", [None, {}, {"use_dora": True}], ids=["plain", "lora", "dora"])
@torch.no_grad()
def test_prepacked_weights_any_surgery_equals_plain_and_restores_layers(model, surgery):
    if surgery is not None:
        adapted(model, **surgery)
    ids = torch.randint(61, (3, 9))
    before, modules = model.logits(model(ids)), list(model.modules())
    with prepacked(model, MIN_CALLS) as head:
        assert any(isinstance(module, PrepackedLinear) for module in model.h.modules())
        torch.testing.assert_close(head(model(ids)), before, rtol=1e-4, atol=1e-4)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model.logits(model(ids)), before)


@torch.no_grad()
def test_prepacked_weights_layer_without_bias_is_prepacked(model):
    model.h[0].attn.c_proj = nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 32))
    ids = torch.randint(61, (3, 9))
    before = model(ids)
    with prepacked(model, MIN_CALLS):
        assert isinstance(model.h[0].attn.c_proj[0], PrepackedLinear)
        torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)


class Scaled(nn.Module):
    """An adapter without ``merged`` that reads the weight of the layer it has replaced."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2.0 * F.linear(x, self.layer.weight, self.layer.bias)


@torch.no_grad()
def test_prepacked_weights_module_of_another_package_is_unchanged(model):
    model.h[0].mlp.c_fc = Scaled(model.h[0].mlp.c_fc)
    ids = torch.randint(61, (3, 9))
    before = model(ids)
    with prepacked(model, MIN_CALLS):
        assert isinstance(model.h[0].mlp.c_proj, PrepackedLinear)
        torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)
    assert generate(model, ids, max_new_tokens=MIN_CALLS, temperature=0).shape == (3, 9 + MIN_CALLS)


def test_generate_failing_logits_processor_restores_layers(model):
    modules = list(model.modules())

    def fail(*_):
        raise KeyError("a processor's own")

    with pytest.raises(KeyError, match="own"):
        generate(model, torch.ones(1, 4, dtype=torch.long), max_new_tokens=MIN_CALLS, logits_processors=[fail])
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@torch.no_grad()
def test_prepacked_weights_under_autocast_have_autocast_dtype(model):
    ids = torch.randint(61, (3, 9))
    with torch.autocast("cpu", torch.bfloat16):
        adapted(model)
        plain = model.logits(model(ids))
        with prepacked(model, MIN_CALLS) as head:
            assert {m.dtype for m in model.h.modules() if isinstance(m, PrepackedLinear)} == {torch.bfloat16}
            found = head(model(ids))
    assert found.dtype == plain.dtype == torch.bfloat16
    assert (found - plain).float().norm() < 0.02 * plain.float().norm()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


@pytest.mark.parametrize("why", ["few tokens", "a hook", "switched off", "another dtype", "another layer", "compiled"])
@torch.no_grad()
def test_prepacked_weights_unsupported_case_leaves_model_unchanged(model, why):
    times = MIN_CALLS - 1 if why == "few tokens" else MIN_CALLS
    calls = []
    if why == "a hook":
        model.h[0].attn.c_proj.register_forward_hook(lambda *_: calls.append(1))
    if why == "another dtype":
        model.double()
    if why == "another layer":
        model.h[1].mlp.c_fc = Doubled(32, 128)
    if why == "compiled":
        model.h[0].compile(backend="eager")
    with torch.backends.mkldnn.flags(enabled=why != "switched off"), prepacked(model, times) as head:
        assert not any(isinstance(module, PrepackedLinear) for module in model.modules())
        hidden = model(torch.randint(61, (2, 5)))[:, -1]
        torch.testing.assert_close(head(hidden), model.logits(hidden))
    assert bool(calls) == (why == "a hook")


# In training

bfloat16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bfloat16 on this machine",
)


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


@bfloat16
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "weight", "all"])
@pytest.mark.parametrize("biased", [True, False])
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


@bfloat16
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


@bfloat16
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


@bfloat16
@pytest.mark.parametrize("backward_before", [False, True])
def test_linear_frozen_weight_changed_before_backward_raises(kernels, backward_before):
    layer, x = Linear(8, 8).requires_grad_(False).bfloat16(), torch.randn(5, 8).bfloat16().requires_grad_()
    if backward_before:
        layer(x).sum().backward()
    y = layer(x)
    with torch.no_grad():
        layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


@bfloat16
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


@bfloat16
def test_linear_mismatched_dtypes_raise_runtime_error(kernels):
    for frozen in (True, False):
        with pytest.raises(RuntimeError, match="dtype"):
            Linear(8, 8).requires_grad_(not frozen)(torch.randn(5, 8).bfloat16())


@bfloat16
def test_lora_merge_drops_prepacked_weights_of_adapters(model):
    adapted(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(61, (2, 5)))
    adapters = [module for module in model.modules() if hasattr(module, "lora_A") and isinstance(module, Linear)]
    assert all(adapter._prepacked is not None for adapter in adapters)
    LoRA.merge(model)
    assert all(adapter._prepacked is None for adapter in adapters)


@bfloat16
def test_linear_unfrozen_weight_drops_prepacked_copy(kernels):
    layer, x = Linear(8, 8).requires_grad_(False).bfloat16(), torch.randn(5, 8).bfloat16()
    layer(x)
    assert layer._prepacked is not None
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer._prepacked is None
    assert layer.weight.grad is not None


@bfloat16
def test_linear_with_prepacked_weight_can_be_copied_and_saved():
    layer, x = Linear(8, 8).requires_grad_(False).bfloat16(), torch.randn(5, 8).bfloat16()
    y = layer(x)
    assert layer._prepacked is not None
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert list(layer.state_dict()) == ["weight", "bias"]
    torch.save(layer.state_dict(), io.BytesIO())


@bfloat16
def test_linear_trainable_weight_below_min_rows_is_not_prepacked(kernels, monkeypatch):
    monkeypatch.setattr(kernel, "MIN_ROWS", 11)
    layer = Linear(8, 8).bfloat16()
    layer(torch.randn(2, 5, 8).bfloat16())
    assert not kernels
    layer(torch.randn(2, 6, 8).bfloat16())
    assert kernels


@bfloat16
@pytest.mark.parametrize("why", ["float32", "switched off", "evaluation", "float16"])
def test_linear_unsupported_case_equals_plain_linear(kernels, why):
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(why, torch.bfloat16)
    for frozen in (False, True):
        layer = Linear(8, 8).to(dtype).requires_grad_(not frozen).train(why != "evaluation")
        x = torch.randn(5, 8, dtype=dtype)
        with torch.backends.mkldnn.flags(enabled=why != "switched off"):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not kernels


@bfloat16
@pytest.mark.parametrize("strategy", ["full", "lora", "dora", "checkpointed full", "checkpointed lora"])
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


class ScaledOutput(nn.Module):
    """A third-party adapter that scales the output of a linear layer."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.scale = layer, nn.Parameter(torch.linspace(0.5, 2.0, layer.out_features))

    def forward(self, x):
        return self.base(x) * self.scale

    def merged(self):
        return self.base.weight * self.scale.unsqueeze(1), self.base.bias * self.scale


@torch.no_grad()
def test_prepacked_weights_with_scaled_outputs_use_merged_weight_and_bias(model):
    model.h[0].mlp.c_fc = ScaledOutput(model.h[0].mlp.c_fc)
    model.h[0].mlp.c_fc.base.bias.normal_()
    ids = torch.randint(61, (3, 9))
    before = model(ids)
    with prepacked(model, MIN_CALLS):
        assert isinstance(model.h[0].mlp.c_fc, PrepackedLinear)
        torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)
    assert isinstance(model.h[0].mlp.c_fc.base, Linear)


@bfloat16
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


def test_generate_with_kernels_disabled_equals_enabled(model, monkeypatch):
    ids = torch.randint(61, (2, 5))
    texts = []
    for enabled in (True, False):
        monkeypatch.setattr(kernels_package, "_enabled", enabled)
        texts.append(generate(model, ids, max_new_tokens=MIN_CALLS, temperature=0.0))
    assert torch.equal(*texts)
