"""The FFT convolutions against their O(L^2) definitions, gradients included."""

import pytest
import torch
from conftest import assert_close

from sd_hyena.ops import fft, linear, naive

GRIDS = [(1, 1), (1, 7), (5, 3), (7, 7), (8, 8), (13, 4), (17, 11), (9, 23)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("reach", [0, 2, 1000])
def test_conv2d_equals_definition(grid, reach):
    torch.manual_seed(0)
    ry, rx = min(reach, grid[0] - 1), min(reach, grid[1] - 1)
    inputs = torch.randn(2, 3, *grid), torch.randn(3, 2 * ry + 1, 2 * rx + 1), torch.randn(2, 3, *grid)

    def outcome(conv, dtype):
        u, k, weight = (t.to(dtype) for t in inputs)
        u.requires_grad_(), k.requires_grad_()
        y = conv(u, k)
        return y.detach(), *torch.autograd.grad((y * weight).sum(), (u, k))

    def fast(u, k):
        return fft.conv2d(u, fft.kernel_spectrum(k, grid), (ry, rx))

    expected = outcome(naive.conv2d, torch.float64)
    for dtype, ratio in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for name, a, b in zip(("y", "du", "dk"), expected, outcome(fast, dtype), strict=True):
            assert_close(f"{name} {dtype} {grid}", a, b, ratio)


def test_conv2d_definition_by_hand():
    """One impulse in, the kernel around it out, cut at the border."""
    u = torch.zeros(1, 1, 3, 3)
    u[..., 0, 1] = 2
    k = torch.arange(9.0).view(1, 3, 3)
    expected = torch.tensor([[3.0, 4, 5], [6, 7, 8], [0, 0, 0]]) * 2
    assert torch.equal(naive.conv2d(u, k)[0, 0], expected)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 31, 100])
def test_causal_conv1d_equals_definition(length):
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, length), torch.randn(3, length + 2)
    for dtype, ratio in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        u, k = (t.to(dtype).requires_grad_() for t in inputs)
        fast, slow = fft.causal_conv1d(u, k), naive.causal_conv1d(u, k[:, :length])
        assert_close("y", slow, fast, ratio)
        for name, a, b in zip(
            ("du", "dk"),
            torch.autograd.grad(slow.square().sum(), (u, k)),
            torch.autograd.grad(fast.square().sum(), (u, k)),
            strict=True,
        ):
            assert_close(name, a, b, ratio * 5)


def test_causal_conv1d_never_looks_ahead():
    u, k = torch.randn(1, 2, 20), torch.randn(2, 20)
    later = u.clone()
    later[..., 11:] += 5
    assert_close("past", fft.causal_conv1d(u, k)[..., :11], fft.causal_conv1d(later, k)[..., :11], 1e-5)


@pytest.mark.parametrize("length", [1, 5, 64, 101])
def test_linear_attention_equals_definition(length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 4, length).requires_grad_() for _ in range(3))
    fast, slow = linear.linear_attention(q, k, v), naive.linear_attention(q, k, v)
    assert_close("y", slow, fast, 1e-5)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (slow, fast)), strict=True)
    for name, (a, b) in zip(("dq", "dk", "dv"), pairs, strict=True):
        # One token attends to itself alone: its q and k have no gradient, and both sides return noise.
        if length > 1 or name == "dv":
            assert_close(name, a, b, 1e-4)


def test_half_precision_inputs_are_transformed_in_float32():
    torch.manual_seed(0)
    u, k = torch.randn(1, 4, 12, 12), torch.randn(4, 23, 23)
    exact = naive.conv2d(u.bfloat16().double(), k.double())
    got = fft.conv2d(u.bfloat16(), fft.kernel_spectrum(k, (12, 12)), (11, 11))
    assert got.dtype == torch.bfloat16
    assert_close("bf16", exact, got.double(), 4e-3)


@pytest.mark.parametrize("n", range(1, 200))
def test_fast_length(n):
    m = fft.fast_length(n)
    assert n <= m <= 2 * n + 1
    assert m % 2 == 0
    for p in (2, 3, 5):
        while m % p == 0:
            m //= p
    assert m == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_attention_keeps_its_sums_in_float32_under_autocast(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 4096) + 0.5 for _ in range(3))
    expected = linear.linear_attention(q, k, v)
    with torch.autocast("cpu", dtype):
        got = linear.linear_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    assert_close("autocast", expected, got.float(), 2e-2)
