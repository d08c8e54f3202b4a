"""The convolution as matrix products against its O(L^2) definition."""

import pytest
import torch
from conftest import DEVICE, assert_close

from sd_hyena.ops import gemm_conv, naive

GRIDS = [(1, 1), (1, 7), (5, 3), (7, 7), (8, 8), (13, 4), (17, 11), (9, 23), (32, 20)]


def problem(grid, reach, dtype=torch.float32):
    torch.manual_seed(0)
    ry, rx = min(reach, grid[0] - 1), min(reach, grid[1] - 1)
    u, k = torch.randn(2, 3, *grid), torch.randn(3, 2 * ry + 1, 2 * rx + 1)
    bias, gain = torch.randn(3), torch.randn(3)
    return u, k, bias, gain, (ry, rx)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("reach", [0, 2, 1000])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_equals_definition(grid, reach, dtype, ratio):
    u, k, bias, gain, radius = problem(grid, reach)
    gain = gain if radius == (grid[0] - 1, grid[1] - 1) else None
    u, k, bias = u.to(DEVICE, dtype), k.to(DEVICE), bias.to(DEVICE)
    gain = None if gain is None else gain.to(DEVICE)
    wide = torch.promote_types(dtype, torch.float32)
    spectrum = gemm_conv.kernel_spectrum(k.to(wide), k.shape, grid, bias, gain, dtype=dtype)
    got = gemm_conv.convolve(u, spectrum, radius)
    zero = torch.zeros(3, device=DEVICE).double()
    expected = naive.long_conv2d(u.double(), k.double(), bias.double(), zero if gain is None else gain.double())
    assert got.dtype == dtype
    assert_close(f"{grid} {reach} {dtype}", expected, got.double(), ratio)


def test_a_spectrum_can_be_made_piece_by_piece(monkeypatch):
    u, k, bias, _, radius = problem((9, 7), 4)
    whole = gemm_conv.kernel_spectrum(k, k.shape, (9, 7), bias)
    for limits in (gemm_conv.BAND, gemm_conv.STEP):
        monkeypatch.setitem(limits, "cpu", 1)
    out = torch.full_like(whole, float("nan"))
    made = gemm_conv.kernel_spectrum(lambda band: k[:, band], k.shape, (9, 7), bias, out=out, device=k.device)
    assert made is out
    assert_close("spectrum", whole, made, 1e-6)
    expected = naive.conv2d(u.double(), k.double()) + bias[:, None, None] * u
    assert_close("convolution", expected, gemm_conv.convolve(u, made, radius), 2e-6)


@pytest.mark.parametrize("size", [1e-4, 1e2])
def test_kernels_of_any_size_fit_into_half_precision(size):
    u, k, _, _, radius = problem((12, 10), 1000)
    spectrum = gemm_conv.kernel_spectrum(k * size, k.shape, (12, 10), dtype=torch.float16)
    got = gemm_conv.convolve(u, spectrum, radius, torch.float16)
    assert_close("scaled", naive.conv2d(u.double(), k.double() * size), got.double(), 2e-3)
    nothing = gemm_conv.kernel_spectrum(k * 0, k.shape, (12, 10), dtype=torch.float16)
    assert not gemm_conv.convolve(u, nothing, radius, torch.float16).any()


def test_large_signals_do_not_overflow_half_precision():
    """A constant adds up coherently: nothing does so more."""
    u = torch.full((1, 1, 64, 64), 500.0)
    k = torch.full((1, 127, 127), 1 / 64**2)
    spectrum = gemm_conv.kernel_spectrum(k, k.shape, (64, 64), dtype=torch.float16)
    got = gemm_conv.convolve(u, spectrum, (63, 63), torch.float16)
    assert_close("constant", torch.full_like(u, 500.0), got, 2e-3)


def test_a_mean_needs_a_kernel_that_reaches_over_the_grid():
    _, k, bias, gain, _ = problem((9, 7), 2)
    with pytest.raises(ValueError, match="does not reach over a grid of 9 x 7"):
        gemm_conv.kernel_spectrum(k, k.shape, (9, 7), bias, gain)
