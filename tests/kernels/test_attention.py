"""Attention against the formula and PyTorch's function, and the memory that it saves for the backward pass."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import gpt2_pl.kernels.attention
from gpt2_pl.kernels.attention import QUERY_BLOCK, scaled_dot_product_attention
from gpt2_pl.kernels.dropout import dropout


def attention(q, k, v, mask, p=0.0):
    """Apply attention: causal without a mask, where a single query is the last one."""
    return scaled_dot_product_attention(q, k, v, mask, p, is_causal=mask is None and q.size(2) > 1)


def weights_of(q, k, mask):
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.size(-1))
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


@pytest.mark.parametrize(("masked", "T"), [(False, 1), (True, 17), (False, 300), (True, 300)])
def test_attention_with_dropout_equals_the_formula_and_its_gradients(masked, T):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, T, 8, requires_grad=True)
    grad = torch.randn(2, 3, T, 8)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    mask = (causal & (torch.rand(2, 1, 1, T) < 0.7)) | torch.eye(T, dtype=torch.bool) if masked else None
    torch.manual_seed(4)
    ours = attention(q, k, v, mask, 0.25)
    torch.manual_seed(4)
    weights = weights_of(q, k, causal if mask is None else mask)
    # masks are drawn for `QUERY_BLOCK` queries at a time, causal ones for the keys before them
    rows = [(weights[:, :, a : a + QUERY_BLOCK], T if masked else a + QUERY_BLOCK) for a in range(0, T, QUERY_BLOCK)]
    theirs = torch.cat([dropout(part[..., :n], 0.25, training=True) @ v[:, :, :n] for part, n in rows], dim=2)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_attention_in_bfloat16_is_close_to_float64_formula():
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    for case in itertools.product([1, 2, 4], [None, causal]):
        size, mask = case
        q, k, v = torch.randn(3, 4, 3, 64, 64).bfloat16()
        q, k = ((t * size).requires_grad_() for t in (q, k))
        ours = attention(q, k, v, mask)
        exact = weights_of(q.double(), k.double(), causal) @ v.double()
        off = (ours.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
        assert off < 0.0025, case
        grad = torch.randn_like(exact)
        found = torch.autograd.grad(ours, (q, k), grad.bfloat16())
        for a, b in zip(found, torch.autograd.grad(exact, (q, k), grad), strict=True):
            assert (a.double() - b.double()).pow(2).mean().sqrt() < 0.008 * b.double().pow(2).mean().sqrt(), case


def qkv(T, dtype=torch.float64):
    return [torch.randn(2, 3, T, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(gpt2_pl.kernels.attention, "QUERY_BLOCK", 16)
    monkeypatch.setattr(gpt2_pl.kernels.attention, "MIN_RECOMPUTE_KEYS", 32)


def test_attention_without_dropout_equals_pytorch(monkeypatch, few_rows, subtests):
    monkeypatch.setattr(gpt2_pl.kernels.attention, "dropout", lambda x, p=0.0, training=True: x)
    for T, masked in itertools.product([5, 16, 32, 33, 100], [False, True]):
        with subtests.test(T=T, masked=masked):
            compare_with_pytorch(T, masked)


def compare_with_pytorch(T, masked):
    given = qkv(T)
    mask = None
    if masked:
        text = torch.rand(2, 1, 1, T) < 0.7
        mask = torch.ones(T, T, dtype=torch.bool).tril() & (text | torch.eye(T, dtype=torch.bool))
    weight = torch.randn(2, 3, T, 8, dtype=torch.float64)
    ours = attention(*given, mask, 0.1)
    theirs = F.scaled_dot_product_attention(*given, attn_mask=mask, is_causal=mask is None)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad((y * weight).sum(), given) for y in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("T", [30, 100])  # the scores are kept, and recomputed
def test_attention_backward_uses_the_forward_dropout_mask(few_rows, T):
    q, k, v = qkv(T)

    def run(values):
        torch.manual_seed(3)
        return attention(q, k, values, None, 0.5)

    weight, step = torch.randn(2, 3, T, 8, dtype=torch.float64), torch.randn_like(v)
    (grad,) = torch.autograd.grad((run(v) * weight).sum(), v)
    change = ((run(v + step) - run(v)) * weight).sum()  # it is linear in the values
    torch.testing.assert_close((grad * step).sum(), change)
    assert not torch.equal(run(v), attention(q, k, v, None))


def test_attention_saved_memory_is_linear_in_length():
    def kept(T):
        storages = {}
        given = qkv(T, torch.float32)

        def keep(t):
            storages[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            attention(*given, None, 0.1)
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    assert 0 < kept(2048) <= 2.2 * kept(1024)


def test_attention_float32_cache_with_bfloat16_query_is_not_rounded():
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 3, 1, 8).bfloat16(), torch.randn(2, 2, 3, 9, 8)
    mask = torch.rand(2, 1, 1, 9) < 0.7
    mask[..., 0] = True
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = attention(q, k, v, mask)
            last = attention(q, k, v, None)  # one query is the last: it sees all keys
        for ours, seen in ((found, mask), (last, torch.tensor(True))):
            expected = weights_of(q.double(), k.double(), seen) @ v.double()
            assert torch.equal(ours, expected.float().bfloat16()), autocast
