"""The FFT convolutions against their O(L^2) definitions, gradients included."""

import pytest
import torch
from conftest import assert_close

from sd_hyena.nn.operator import project
from sd_hyena.ops import fft, long_conv, naive

GRIDS = [(1, 1), (1, 7), (5, 3), (7, 7), (8, 8), (13, 4), (17, 11), (9, 23)]


def conv2d(u, k):
    """The definition at all cells, as planes."""
    tokens = torch.arange(u.shape[-2] * u.shape[-1])
    return naive.conv2d(u, k, tokens).transpose(1, 2).unflatten(2, u.shape[-2:])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("reach", [0, 2, 1000])
@pytest.mark.parametrize("step", [1, 3000, 2**18])
def test_long_conv2d_equals_definition(grid, reach, step, monkeypatch):
    """However many channels are transformed together."""
    monkeypatch.setitem(long_conv.STEP, "cpu", step)
    torch.manual_seed(0)
    ry, rx = min(reach, grid[0] - 1), min(reach, grid[1] - 1)
    inputs = torch.randn(3, 5, *grid), torch.randn(5, 2 * ry + 1, 2 * rx + 1)
    weight = torch.randn(3, 5, *grid)

    def outcome(conv, dtype, layout):
        leaves = [
            t.to(dtype).contiguous(memory_format=layout if t.dim() == 4 else torch.contiguous_format) for t in inputs
        ]
        leaves = [t.requires_grad_() for t in leaves]
        y = conv(*leaves)
        return y.detach(), *torch.autograd.grad((y * weight.to(dtype)).sum(), leaves)

    expected = outcome(conv2d, torch.float64, torch.contiguous_format)
    for dtype, ratio in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        for layout in (torch.contiguous_format, torch.channels_last):
            got = outcome(long_conv.long_conv2d, dtype, layout)
            for name, a, b in zip(("y", "du", "dk"), expected, got, strict=True):
                assert_close(f"{name} {dtype} {grid}", a, b, ratio)


@pytest.mark.parametrize("wanted", [0, 1])
def test_long_conv2d_where_one_gradient_is_wanted(wanted):
    leaves = [torch.randn(2, 3, 4, 5), torch.randn(3, 7, 9)]
    leaves[wanted].requires_grad_()
    fast, slow = (
        torch.autograd.grad(f(*leaves).square().sum(), leaves[wanted])[0] for f in (long_conv.long_conv2d, conv2d)
    )
    assert_close("gradient", slow, fast, 1e-4)


def test_conv2d_definition_by_hand():
    """One impulse in, the kernel around it out, cut at the border."""
    u = torch.zeros(1, 1, 3, 3)
    u[..., 0, 1] = 2
    k = torch.arange(9.0).view(1, 3, 3)
    expected = torch.tensor([[3.0, 4, 5], [6, 7, 8], [0, 0, 0]]) * 2
    assert torch.equal(conv2d(u, k)[0, 0], expected)
    assert torch.equal(naive.conv2d(u, k, torch.tensor([4, 0]))[0, :, 0], expected.flatten()[[4, 0]])


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


def test_half_precision_inputs_are_transformed_in_float32():
    torch.manual_seed(0)
    u, k = torch.randn(1, 4, 12, 12), torch.randn(4, 23, 23)
    exact = conv2d(u.bfloat16().double(), k.double())
    got = long_conv.long_conv2d(u.bfloat16(), k)
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


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 4, 33), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_project_is_a_linear_layer(shape, dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in (shape, (6, shape[-1]), (6,)))
    for b in (bias, None):
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        got = project(x, weight, b)
        assert got.dtype == dtype
        assert got.shape == expected.shape
        if x.numel():
            assert_close("project", expected, got.double(), 1e-2 if dtype == torch.bfloat16 else 1e-6)
