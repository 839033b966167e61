"""The 16-bit GELU kernel against PyTorch's GELU in 64 bits."""

import itertools

import torch
import torch.nn.functional as F

from gpt2_pl import kernels
from gpt2_pl.kernels.gelu import CHUNK_SIZE, gelu

SHAPES = [(0,), (7,), (3, CHUNK_SIZE // 2 + 1), (CHUNK_SIZE,)]


def test_gelu_16_bit_values_and_gradients_are_within_rounding_of_float64(subtests):
    for shape, (dtype, step) in itertools.product(SHAPES, [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)]):
        with subtests.test(shape=shape, dtype=dtype):
            check_rounding(shape, dtype, step)


def check_rounding(shape, dtype, step):
    x, grad = (torch.randn(2, *shape, dtype=torch.float32) * 3).to(dtype).unbind()
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    ours, theirs = gelu(x, approximate="tanh"), F.gelu(exact, approximate="tanh")
    torch.testing.assert_close(ours.double(), theirs, rtol=1.01 * step, atol=2e-6)
    (ours,), (theirs,) = torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, exact, grad.double())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=2.1 * step, atol=1e-4 * step * 2**8)  # rounded twice


def test_gelu_large_values_and_transposed_input_equal_pytorch():
    x = torch.tensor([[-1e4, -50.0, -8.0, -1.0], [-1e-3, 0.0, 1e-3, 1.0], [8.0, 50.0, 1e4, 1e9]]).bfloat16().T
    leaf, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    assert not leaf.is_contiguous()
    y, theirs = gelu(leaf, approximate="tanh"), F.gelu(exact, approximate="tanh")
    torch.testing.assert_close(y, F.gelu(x, approximate="tanh"), atol=1e-6, rtol=2**-7)
    grad = torch.arange(1.0, 13.0).view(4, 3).bfloat16()  # another one at every place
    (ours,), (theirs,) = torch.autograd.grad(y, leaf, grad), torch.autograd.grad(theirs, exact, grad.double())
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=2**-7)


def test_gelu_gradient_does_not_depend_on_default_dtype():
    x = torch.linspace(-4, 4, 1001).bfloat16().requires_grad_()
    expected = torch.autograd.grad(gelu(x, approximate="tanh").sum(), x)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does under bf16-true
    try:
        found = torch.autograd.grad(gelu(x, approximate="tanh").sum(), x)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(found[0], expected[0])


def test_gelu_without_gradients_or_in_float32_equals_pytorch():
    for dtype, requires_grad in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
        x = torch.randn(5, 7).to(dtype).requires_grad_(requires_grad)
        assert torch.equal(gelu(x, approximate="tanh"), F.gelu(x, approximate="tanh")), dtype


def test_gelu_with_kernels_disabled_equals_pytorch(monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", False)
    x = torch.randn(5, 7).bfloat16().requires_grad_()
    for approximate in ("none", "tanh"):
        ours, theirs = gelu(x, approximate=approximate), F.gelu(x, approximate=approximate)
        assert torch.equal(ours, theirs), approximate
        assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(theirs.sum(), x)[0]), approximate
