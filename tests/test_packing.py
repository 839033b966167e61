"""Packed weights: the same products as PyTorch's, for as long as they are wanted, and then the layers as they were."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt2_pl import GPT2, GPT2Config, generate
from gpt2_pl.packing import WORTH, PackedLinear, packed
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 24), (12, 1, 24), (3, 7, 24)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_layer_computes_what_the_layer_does(dtype, shape, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(37, 24, dtype=dtype)
    bias = torch.randn(37, dtype=dtype) if biased else None
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    with torch.no_grad():
        y = PackedLinear(weight, bias)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("surgery", [None, {}, {"dora": True}], ids=["plain", "lora", "dora"])
@torch.no_grad()
def test_a_packed_model_computes_what_the_model_does_and_is_as_before_afterwards(model, surgery):
    if surgery is not None:
        adapted(model, **surgery)
    ids = torch.randint(61, (3, 9))
    before, modules = model.logits(model(ids)), list(model.modules())
    with packed(model, WORTH) as head:
        assert any(isinstance(module, PackedLinear) for module in model.h.modules())
        torch.testing.assert_close(head(model(ids)), before, rtol=1e-4, atol=1e-4)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model.logits(model(ids)), before)


@torch.no_grad()
def test_layers_without_a_bias_are_packed_too(model):
    model.h[0].attn.c_proj = nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 32))
    ids = torch.randint(61, (3, 9))
    before = model(ids)
    with packed(model, WORTH):
        assert isinstance(model.h[0].attn.c_proj[0], PackedLinear)
        torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)


def test_the_layers_come_back_when_generation_fails(model):
    modules = list(model.modules())

    def fail(*_):
        raise KeyError("a processor's own")

    with pytest.raises(KeyError, match="own"):
        generate(model, torch.ones(1, 4, dtype=torch.long), max_new_tokens=WORTH, processors=[fail])
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@torch.no_grad()
def test_under_autocast_packed_weights_are_of_its_dtype(model):
    ids = torch.randint(61, (3, 9))
    with torch.autocast("cpu", torch.bfloat16):
        adapted(model)
        plain = model.logits(model(ids))
        with packed(model, WORTH) as head:
            assert {m.dtype for m in model.h.modules() if isinstance(m, PackedLinear)} == {torch.bfloat16}
            found = head(model(ids))
    assert found.dtype == plain.dtype == torch.bfloat16
    assert (found - plain).float().norm() < 0.02 * plain.float().norm()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


@pytest.mark.parametrize("why", ["few tokens", "a hook", "switched off", "another dtype", "another layer", "compiled"])
@torch.no_grad()
def test_where_it_cannot_be_the_model_stays_as_it_is(model, why):
    times = WORTH - 1 if why == "few tokens" else WORTH
    calls = []
    if why == "a hook":
        model.h[0].attn.c_proj.register_forward_hook(lambda *_: calls.append(1))
    if why == "another dtype":
        model.double()
    if why == "another layer":
        model.h[1].mlp.c_fc = Doubled(32, 128)
    if why == "compiled":
        model.h[0].compile(backend="eager")
    with torch.backends.mkldnn.flags(enabled=why != "switched off"), packed(model, times) as head:
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
        hidden = model(torch.randint(61, (2, 5)))[:, -1]
        torch.testing.assert_close(head(hidden), model.logits(hidden))
    assert bool(calls) == (why == "a hook")
