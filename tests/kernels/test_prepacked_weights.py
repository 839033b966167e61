"""Prepacked weights for generation: results equal to PyTorch's, and layers restored afterwards."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.prepacking import adapted, onednn, small_gpt2
from torch import nn

from gpt2_pl import generate
from gpt2_pl import kernels as kernels_package
from gpt2_pl.kernels.prepacked_linear import (
    MIN_CALLS,
    Linear,
    PrepackedLinear,
    prepacked_weights,
    supports_prepacking,
)

pytestmark = onednn
HAS_BFLOAT16 = supports_prepacking(torch.device("cpu"), torch.bfloat16)


@pytest.fixture
def model():
    return small_gpt2()


def prepacked(model, num_calls):
    return prepacked_weights(model.h, lambda: model.head_weight, num_calls)


@torch.no_grad()
def test_prepacked_linear_any_shape_and_dtype_equals_linear():
    tolerances = {torch.float32: 1e-5} | ({torch.bfloat16: 2**-7} if HAS_BFLOAT16 else {})
    for dtype, tolerance in tolerances.items():
        weight, bias = torch.randn(37, 24, dtype=dtype), torch.randn(37, dtype=dtype)
        for shape, b in itertools.product([(1, 24), (12, 1, 24), (3, 7, 24)], [bias, None]):
            x = torch.randn(shape, dtype=dtype)
            y = PrepackedLinear(weight, b)(x)
            assert y.dtype == dtype
            torch.testing.assert_close(y, F.linear(x, weight, b), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_prepacked_weights_any_surgery_equals_plain_and_restores_layers(subtests):
    plain, lora, dora = small_gpt2(), adapted(small_gpt2()), adapted(small_gpt2(), use_dora=True)
    for name, model in (("plain", plain), ("lora", lora), ("dora", dora)):
        with subtests.test(name):
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


@pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN has no bfloat16 on this CPU")
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


UNSUPPORTED = ("few tokens", "a hook", "switched off", "another dtype", "another layer", "compiled")


@torch.no_grad()
def test_prepacked_weights_unsupported_case_leaves_model_unchanged(subtests):
    for why in UNSUPPORTED:
        with subtests.test(why):
            check_unsupported(small_gpt2(), why)


def check_unsupported(model, why):
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


def test_generate_with_kernels_disabled_equals_enabled(model, monkeypatch):
    ids = torch.randint(61, (2, 5))
    texts = []
    for enabled in (True, False):
        monkeypatch.setattr(kernels_package, "_enabled", enabled)
        texts.append(generate(model, ids, max_new_tokens=MIN_CALLS, temperature=0.0))
    assert torch.equal(*texts)
