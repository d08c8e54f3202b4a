"""The causal long convolution by FFT, O(L log L). Transforms run in float32 (float64 for float64 input)."""

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


def transform_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def causal_conv1d(u: Tensor, k: Tensor) -> Tensor:
    """Causal convolution along the last axis, zero-padded so that nothing wraps round.

    u: (..., D, L); k: (D, K), taps beyond L are not used. Returns (..., D, L) in u's dtype.
    The reference is :func:`sd_hyena.ops.naive.causal_conv1d`.
    """
    length, dtype = u.shape[-1], transform_dtype(u)
    k = k[..., :length]
    n = fast_length(length + k.shape[-1] - 1)
    spectrum = torch.fft.rfft(u.to(dtype), n=n) * torch.fft.rfft(k.to(dtype), n=n)
    return torch.fft.irfft(spectrum, n=n)[..., :length].to(u.dtype)
