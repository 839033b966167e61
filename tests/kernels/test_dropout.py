"""Dropout against its definition."""

import itertools
import math

import pytest
import torch

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.kernels.dropout import LEVELS, dropout, dropout_add

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
N = 1_000_003


def scale_of(p):
    return LEVELS / round((1 - p) * LEVELS)


def test_dropout_kept_share_matches_p_and_values_are_scaled_exactly():
    for case in itertools.product(DTYPES, [0.1, 0.5, 0.9]):
        dtype, p = case
        x = torch.randn(N, dtype=dtype).abs() + 0.5
        y = dropout(x, p, training=True)
        kept = y != 0
        assert y.dtype == dtype
        assert torch.equal(y[kept], (x * scale_of(p))[kept]), case
        assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / N) + 1 / LEVELS, case


def test_dropout_extreme_p_drops_and_keeps_some_values():
    for p in (1e-6, 1e-5, 1 - 1e-5, 1 - 1e-7):
        y = dropout(torch.ones(N), p, training=True)
        assert y.isfinite().all(), p
        assert 0 < y.count_nonzero() < N, p
        assert (p < 0.5) == (y.count_nonzero() > N // 2), p


def test_dropout_of_ones_keeps_their_mean():
    torch.manual_seed(1)
    for p in (0.1, 0.5, 0.9):
        mean = dropout(torch.ones(N, dtype=torch.float64), p, training=True).mean().item()
        assert abs(mean - 1) < 5 * math.sqrt(p / (1 - p) / N)


def test_dropout_of_nan_and_inf_gives_zero_where_dropped():
    y = dropout(torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(100), 0.5, training=True)
    assert 0 < (y == 0).sum() < 300
    assert not y[y != 0].isfinite().any()


def test_dropout_under_another_default_device_stays_on_the_input_device():
    x = torch.ones(8)
    with torch.device("meta"):
        assert dropout(x, 0.5, training=True).device == x.device
        assert dropout_add(x, x, 0.5, training=True).device == x.device


def test_dropout_and_dropout_add_gradients_equal_those_of_the_mask(subtests):
    for dtype, transposed in itertools.product(DTYPES, [False, True]):
        with subtests.test(dtype=dtype, transposed=transposed):
            check_gradients(dtype, transposed)


def check_gradients(dtype, transposed):
    torch.manual_seed(0)
    x, residual, grad = torch.randn(3, 5, 7, 11, dtype=dtype)
    if transposed:
        x, residual, grad = (t.transpose(0, 1) for t in (x, residual, grad))
    x, residual = x.requires_grad_(), residual.requires_grad_()
    y = dropout(x, 0.4, training=True)
    mask = y.detach() != 0
    (ours,) = torch.autograd.grad(y, x, grad)
    (theirs,) = torch.autograd.grad(x * mask * scale_of(0.4), x, grad)
    torch.testing.assert_close(ours, theirs)
    torch.manual_seed(3)
    mask = dropout(torch.ones_like(x), 0.4, training=True) != 0
    torch.manual_seed(3)
    y = dropout_add(x, residual, 0.4, training=True)
    expected = residual + x * mask * scale_of(0.4)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y, (residual, x), grad), torch.autograd.grad(expected, (residual, x), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_dropout_add_bfloat16_branch_keeps_float32_residual():
    torch.manual_seed(0)
    residual, x = torch.randn(40, 50), torch.randn(40, 50).bfloat16().requires_grad_()
    y = dropout_add(x, residual, 0.25, training=True)
    assert y.dtype == torch.float32
    mask = y.detach() != residual
    torch.testing.assert_close(y, residual + x.float() * mask * scale_of(0.25))
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, (mask * scale_of(0.25)).bfloat16())


def test_dropout_zero_p_or_evaluation_is_identity_without_random_draws():
    x, residual = torch.randn(2, 6, 7)
    state = torch.get_rng_state()
    for p, training in ((0.0, True), (0.5, False)):
        assert dropout(x, p, training) is x
        assert torch.equal(dropout_add(x, residual, p, training), residual + x)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_seed_or_generator_state_determines_the_mask():
    x = torch.ones(1001)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.5, True), first)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.5, True), first)
    torch.manual_seed(6)
    assert not torch.equal(dropout(x, 0.5, True), first)


def test_dropout_masks_are_uncorrelated_across_positions_and_calls():
    torch.manual_seed(2)
    p = 0.3
    first, second = ((dropout(torch.ones(1000, 1000), p, True) != 0).double() - (1 - p) for _ in range(2))
    flat = first.flatten()
    bound = 5 * p * (1 - p) / 1000  # five standard errors of a mean of 10^6 products
    for lag in (1, 2, 3, 4, 8, 64, 1000):
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < bound, lag
    assert abs((first * second).mean().item()) < bound
    for part in (first.mean(0), first.mean(1)):  # no place is special
        assert part.abs().max().item() < 5.5 * math.sqrt(p * (1 - p) / 1000)
    assert first.view(-1, 4).mean(0).abs().max().item() < 5 * math.sqrt(p * (1 - p) / 250_000)  # of one draw of 64 bits


def trained(dropout=0.3, n_layer=3, **options):
    """Return a GPT-2 and its gradients after one pass under autocast with seed 7."""
    torch.manual_seed(7)
    shape = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": n_layer, "n_head": 2}
    model = GPT2(GPT2Config(**shape, dropout=dropout)).train()
    if options.get("compiled"):
        for block in model.h:
            block.compile(dynamic=True, backend=options["compiled"])
    model.activation_checkpointing = options.get("checkpointing", False)
    ids = torch.randint(61, (3, 20))
    with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", True)):
        hidden = model(ids)
    hidden.pow(2).mean().backward()
    return model, {name: p.grad for name, p in model.named_parameters()}


def test_activation_checkpointing_recomputes_the_same_dropout_masks(monkeypatch):
    for case in itertools.product([(256, 128), (4, 8), (4, 128)], [False, True]):  # the latter two nest, of 20 tokens
        (short, rows), autocast = case
        monkeypatch.setattr("gpt2_pl.kernels.attention.MAX_MATH_KEYS", short)
        monkeypatch.setattr("gpt2_pl.kernels.attention.QUERY_BLOCK", rows)
        _, kept = trained(autocast=autocast)
        _, recomputed = trained(autocast=autocast, checkpointing=True)
        assert [name for name in kept if not torch.equal(kept[name], recomputed[name])] == [], case


@pytest.mark.slow
def test_compiled_blocks_aot_eager_gradients_equal_eager():
    _, plain = trained(dropout=0.0, n_layer=1, autocast=False)
    _, compiled = trained(dropout=0.0, n_layer=1, autocast=False, compiled="aot_eager")
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient)
    _, dropped = trained(n_layer=1, autocast=False, compiled="aot_eager")
    assert any(not torch.allclose(dropped[name], gradient) for name, gradient in plain.items())
    assert all(gradient.isfinite().all() for gradient in dropped.values())


@pytest.mark.slow
def test_compiled_blocks_inductor_gradients_are_finite():
    model, gradients = trained(compiled="inductor")
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert (model.eval()(torch.randint(61, (2, 9)))).isfinite().all()
