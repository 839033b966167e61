"""Sampling of tokens against numpy, exact distributions and single rows."""

import itertools

import numpy as np
import pytest
import torch

from gpt2_pl.generation import _sample_tokens, _sort_descending, _uniform, top_k_top_p_filter


def test_top_k_top_p_filter_equals_a_numpy_sort():
    for (V, scale), top_k, top_p in itertools.product(
        ((40, 2.0), (3000, 0.1), (3000, 3.0)), (None, 30, 700), (0.1, 0.5, 0.9, 0.999, 1.0)
    ):
        case = (V, scale, top_k, top_p)
        logits = torch.randn(6, V, generator=torch.Generator().manual_seed(V)) * scale
        probability, tokens = top_k_top_p_filter(logits, top_k, top_p)
        for row, p, token in zip(logits.double().numpy(), probability, tokens, strict=True):
            order = np.argsort(-row, kind="stable")[:top_k]
            expected = np.exp(row[order] - row[order].max())
            expected /= expected.sum()
            n = int(np.searchsorted(np.cumsum(expected), top_p - 1e-6)) + 1 if top_p < 1.0 else len(order)
            found = token[p > 0].tolist()
            # float32 sums at the far end
            assert abs(len(found) - n) <= (0 if top_p < 0.99 else len(order) // 50 + 1), case
            assert set(found[: min(n, len(found))]) == set(order[: min(n, len(found))].tolist()), case
            np.testing.assert_allclose(p[p > 0][:n], expected[: len(found)][:n], rtol=1e-4)


def test_top_k_top_p_filter_tiny_top_p_keeps_one_token():
    probability, tokens = top_k_top_p_filter(torch.tensor([[0.0, 9.0, 1.0]]), top_p=1e-9)
    assert tokens[probability > 0].tolist() == [1]


def test_sample_tokens_with_ties_does_not_depend_on_other_rows():
    generator = torch.Generator().manual_seed(0)
    row = (torch.randn(1, 5000, generator=generator) * 6).bfloat16().float()  # many equal logits
    for limits in ((None, 0.9), (300, 0.95), (None, None)):
        for u in torch.rand(100, 1, generator=generator):
            alone, beside = (
                _sample_tokens(rows, u.expand(len(rows)), *limits)
                for rows in (row, torch.cat([row, torch.zeros_like(row)]))
            )
            assert alone[0] == beside[0], limits


def nucleus(logits, top_k, top_p):
    """Return the distribution (V,) of one row's logits after top-k and top-p, token by token in float64."""
    weight = np.exp(logits.double().numpy() - float(logits.max()))
    order = sorted(range(len(weight)), key=lambda token: (-weight[token], token))[:top_k]
    whole, found, expected = sum(weight[token] for token in order), 0.0, np.zeros(len(weight))
    for token in order:
        expected[token] = weight[token]
        found += weight[token] / whole
        if found >= top_p:
            break
    return expected / expected.sum()


@pytest.fixture(scope="module")
def uniform():
    """Uniform random numbers of 10,000 rows."""
    return _uniform(range(10_000), 10_000, 1, torch.device("cpu"))[:, 0]


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("two", "equal")), "random", "ties"]
)
def test_sample_tokens_frequencies_pass_chi_square_of_exact_distribution(kind, uniform):
    n, V, generator = len(uniform), 59, torch.Generator().manual_seed(1)
    logits = torch.randn(V, generator=generator) * 1.5
    if kind == "two":  # the two likeliest tokens have 0.06 and 0.05
        logits = torch.full((V,), 0.89 / (V - 2)).log()
        logits[0], logits[1] = np.log(0.06), np.log(0.05)
    elif kind == "ties":
        logits = logits.bfloat16().float()
        logits[7] = logits[9] = logits.max()
    elif kind == "equal":
        logits = torch.zeros(V)
    for top_k, top_p in itertools.product((None, 13), (0.05, 0.1, 0.5, 0.9, 1.0)):
        count = torch.bincount(_sample_tokens(logits.expand(n, -1), uniform, top_k, top_p), minlength=V).numpy()
        expected = nucleus(logits, top_k, top_p)
        assert not count[expected == 0].any(), (top_k, top_p)
        count, expected = count[expected > 0], n * expected[expected > 0]
        if len(count) > 1:
            statistic = torch.tensor(((count - expected) ** 2 / expected).sum())
            freedom = torch.tensor(len(count) - 1.0)
            p = torch.special.gammaincc(freedom.double() / 2, statistic / 2)
            assert p > 1e-4, (top_k, top_p)


def test_sort_descending_with_ties_equals_stable_sort():
    for V in (3, 1000, 50257):  # PyTorch sorts short rows by another algorithm than long ones
        generator = torch.Generator().manual_seed(V)
        probability = (torch.randn(3, V, generator=generator) * 8).bfloat16().float().softmax(-1)
        probability[1] = 1 / V
        probability[2, V // 2 :] = 0.0
        expected = probability.sort(dim=-1, descending=True, stable=True)
        for found, value in zip(_sort_descending(probability), expected, strict=True):
            assert torch.equal(found, value), V


def test_sample_tokens_on_meta_device_has_fixed_shape():
    logits, uniform = torch.empty(3, 50, device="meta"), torch.empty(3, device="meta")  # as in a CUDA graph
    for top_k, top_p in itertools.product((None, 5), (None, 0.9)):
        assert _sample_tokens(logits, uniform, top_k, top_p).shape == (3,)
