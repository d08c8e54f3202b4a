"""Long convolutions by FFT, O(L log L). Transforms run in float32 (float64 for float64 input)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4096)
def fast_length(n: int) -> int:
    """The smallest even length >= ``n`` whose prime factors are 2, 3 and 5 (sizes FFT libraries like)."""
    m = max(2, n + n % 2)
    while True:
        rest = m
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return m
        m += 2


def _fft_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def causal_conv1d(u: Tensor, k: Tensor) -> Tensor:
    """Causal convolution along the last axis, zero-padded so that nothing wraps round.

    u: (..., D, L); k: (D, K), taps beyond L are not used. Returns (..., D, L) in u's dtype.
    The reference is :func:`sd_hyena.ops.naive.causal_conv1d`.
    """
    length, dtype = u.shape[-1], _fft_dtype(u)
    k = k[..., :length]
    n = fast_length(length + k.shape[-1] - 1)
    spectrum = torch.fft.rfft(u.to(dtype), n=n) * torch.fft.rfft(k.to(dtype), n=n)
    return torch.fft.irfft(spectrum, n=n)[..., :length].to(u.dtype)


def kernel_shape(grid: tuple[int, int], radius: tuple[int, int]) -> tuple[int, int]:
    """FFT lengths for a kernel of ``radius`` on ``grid``: ``h + ry`` per axis is enough, because what
    wraps round lands outside the crop."""
    return fast_length(grid[0] + radius[0]), fast_length(grid[1] + radius[1])


def kernel_spectrum(k: Tensor, grid: tuple[int, int]) -> Tensor:
    """The spectrum :func:`conv2d` multiplies with.

    k: (D, 2 ry + 1, 2 rx + 1), centre tap at offset (0, 0); grid: (h, w) it will be applied to.
    Returns complex (D, m, n // 2 + 1).
    """
    ry, rx = k.shape[-2] // 2, k.shape[-1] // 2
    m, n = kernel_shape(grid, (ry, rx))
    padded = torch.nn.functional.pad(k.to(_fft_dtype(k)), (0, n - k.shape[-1], 0, m - k.shape[-2]))
    return torch.fft.rfft2(padded.roll((-ry, -rx), (-2, -1)))


def conv2d(u: Tensor, spectrum: Tensor, radius: tuple[int, int]) -> Tensor:
    """2-D convolution over the latent grid with a kernel given by its spectrum.

    u: (B, D, h, w); spectrum: (D, m, n // 2 + 1) from :func:`kernel_spectrum` for the same grid.
    Returns (B, D, h, w) in u's dtype. The reference is :func:`sd_hyena.ops.naive.conv2d`.
    """
    h, w = u.shape[-2:]
    m, n = kernel_shape((h, w), radius)
    product = torch.fft.rfft2(u.to(_fft_dtype(u)), s=(m, n)) * spectrum
    return torch.fft.irfft2(product, s=(m, n))[..., :h, :w].to(u.dtype)
