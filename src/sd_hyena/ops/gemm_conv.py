"""The two-dimensional long convolution as matrix products: discrete Fourier transforms in GEMM form.

What tensor cores are fast at, for any grid, and the plain twin of the Triton kernels in :mod:`.kernels`. All
frequencies lie half a step off the integers, so there is no constant and no Nyquist term to treat apart; what
wraps round then changes its sign, but lands outside the crop as before.

- Along x the signal is real: n frequencies (f + 1/2) / 2n, f = 0 .. n - 1, say all of it. One product with
  ``rows``, (w, 2n), gives real and imaginary parts side by side; its transpose is the way back.
- Along y it is complex. The frequencies come in fours: p, p + 1/2, -p and 1/2 - p with p = (j + 1/2) / 4q.
  One set of real products with cosines and sines of p, (q, h / 2), on even and on odd rows gives all four by
  additions: a quarter of the multiplications of the plain product (a radix-2 step, and cosines shared by p and -p).

Both directions are scaled to be orthogonal, and a kernel's spectrum is stored over a power of two near its
largest magnitude: float16 holds what lies between, with sums in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .fft import transform_dtype
from .long_conv import BAND, STEP, Rows, at_once

TAIL = 16  # numbers after a channel's coefficients, which keep loads aligned; the first is the exponent of its scale


class Lengths(NamedTuple):
    """Transform lengths: 4 ``quarter`` along y, 2 ``half`` along x."""

    quarter: int
    half: int

    @property
    def coefficients(self) -> int:
        """Real numbers in one channel's spectrum."""
        return 8 * self.quarter * self.half


class Matrices(NamedTuple):
    """rows: (w, 2 half); cosines, sines: (quarter, ceil(h / 2)); twiddle: (2, quarter) float, cosine and sine."""

    rows: Tensor
    cosines: Tensor
    sines: Tensor
    twiddle: Tensor


def lengths(grid: tuple[int, int], radius: tuple[int, int]) -> Lengths:
    """For a kernel of ``radius`` on ``grid``. Room along x is taken in sixteens, which tensor cores ask for."""
    (h, w), (ry, rx) = grid, radius
    return Lengths(-(-(h + ry) // 4), -(-(w + rx) // 32) * 16)


@lru_cache(maxsize=64)
def matrices(grid: tuple[int, int], size: Lengths, dtype: torch.dtype, device: torch.device) -> Matrices:
    """The transforms' constants, computed in float64."""
    with torch.inference_mode(False):  # or they could not be used outside of it
        (h, w), (q, n) = grid, size

        def count(to: int) -> Tensor:
            return torch.arange(to, dtype=torch.float64)

        angle = torch.outer(count(w), (count(n) + 0.5) * (math.pi / n))
        rows = torch.cat([angle.cos(), -angle.sin()], dim=1) * n**-0.5
        base = (count(q) + 0.5) * (math.pi / (2 * q))
        angle = torch.outer(2 * base, count(-(-h // 2)))
        scale = (4 * q) ** -0.5
        own = torch.float64 if dtype == torch.float64 else torch.float32
        twiddle = torch.stack([base.cos(), base.sin()]).to(device, own)
        rows, cosines, sines = (
            t.to(device, dtype).contiguous() for t in (rows, angle.cos() * scale, angle.sin() * scale)
        )
        return Matrices(rows, cosines, sines, twiddle)


def spectrum_shape(grid: tuple[int, int], radius: tuple[int, int]) -> tuple[int]:
    """(coefficients + TAIL,) numbers for one channel."""
    return (lengths(grid, radius).coefficients + TAIL,)


def kernel_spectrum(
    k: Tensor | Rows,
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    out: Tensor | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What :func:`convolve` multiplies with.

    k, shape, grid, bias, gain, out, device: as for :func:`sd_hyena.ops.long_conv.kernel_spectrum`; a gain needs a
    kernel that reaches over the whole grid; dtype: of the result, that of the transform (float32 or float64)
    unless given. Returns real (D, coefficients + TAIL): for p, p + 1/2, -p and 1/2 - p, real then imaginary parts
    (quarter, half); then the exponent of the power of two they are over.
    """
    d, height, width = shape
    ry, rx = height // 2, width // 2
    if gain is not None and (ry, rx) != (grid[0] - 1, grid[1] - 1):
        raise ValueError(f"a kernel of radius {ry}, {rx} does not reach over a grid of {grid[0]} x {grid[1]}: no mean")
    q, n = size = lengths(grid, (ry, rx))
    rows: Rows = (lambda band: k[:, band]) if isinstance(k, Tensor) else k
    device = k.device if isinstance(k, Tensor) else device
    step = max(1, at_once(BAND, device) // (d * width))
    half = None
    for top in range(0, height, step):
        band = rows(slice(top, min(top + step, height))).detach()
        band = band.to(transform_dtype(band))
        if gain is not None:  # the mean is a kernel, too
            band = band + gain.detach().to(band.dtype)[:, None, None] / (grid[0] * grid[1])
        if bias is not None and top <= ry < top + band.shape[1]:
            band = band.clone()
            band[:, ry - top, rx] += bias.detach().to(band.dtype)
        part = _shifted_fft(band, 2 * n, rx)[..., :n].transpose(1, 2)
        if half is None:
            half = part.new_empty(d, n, height)
        half[..., top : top + band.shape[1]] = part
    assert half is not None
    if out is None:
        out = torch.empty(d, size.coefficients + TAIL, device=half.device, dtype=dtype or half.real.dtype)
    j = torch.arange(q, device=half.device)
    order = torch.cat([j, j + 2 * q, 4 * q - 1 - j, 2 * q - 1 - j])
    at_a_time = max(1, at_once(STEP, half.device) // (4 * q * n))
    for first in range(0, d, at_a_time):
        some = slice(first, min(first + at_a_time, d))
        full = _shifted_fft(half[some], 4 * q, ry)[..., order]  # (C, n, 4 q)
        full = torch.view_as_real(full).permute(0, 2, 3, 1).unflatten(1, (4, q)).transpose(2, 3)
        peak = full.abs().amax((1, 2, 3, 4))
        exponent = torch.where(peak > 0, peak, 1).log2().ceil().clamp(-120, 120)
        out[some, : size.coefficients] = (full / exponent.exp2()[:, None, None, None, None]).flatten(1).to(out.dtype)
        out[some, size.coefficients :] = exponent[:, None].to(out.dtype)
    return out


def _shifted_fft(x: Tensor, length: int, centre: int) -> Tensor:
    """Transforms the last axis at (k + 1/2) / length, with offset 0 at index ``centre``."""
    real = x.real.dtype if x.is_complex() else x.dtype
    shift = torch.arange(x.shape[-1], device=x.device, dtype=torch.float64) * (-math.pi / length)
    whole = torch.arange(length, device=x.device, dtype=torch.float64) + 0.5
    back = whole * (2 * math.pi * centre / length)
    kind = torch.complex128 if real == torch.float64 else torch.complex64
    one = torch.ones((), device=x.device, dtype=torch.float64)
    return torch.fft.fft(x * torch.polar(one, shift).to(kind), n=length) * torch.polar(one, back).to(kind)


def convolve(
    u: Tensor,
    spectrum: Tensor,
    radius: tuple[int, int],
    dtype: torch.dtype | None = None,
    along_columns: Callable[[Tensor, Tensor, Matrices, int], Tensor] | None = None,
) -> Tensor:
    """``K ** u`` for a given spectrum, without gradients.

    u: (B, D, h, w); spectrum: from :func:`kernel_spectrum` for the same grid; dtype: of what is multiplied, u's
    unless given (sums between products are float32, or float64); along_columns: something that does as
    :func:`columns`. Returns (B, D, h, w) in u's dtype. The reference is :func:`sd_hyena.ops.naive.long_conv2d`.
    """
    b, d, h, w = u.shape
    size = lengths((h, w), radius)
    dtype = dtype or u.dtype
    constants = matrices((h, w), size, dtype, u.device)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    channels = max(1, min(d, at_once(STEP, u.device) // (4 * size.quarter * size.half * b)))
    for some in (slice(c, min(c + channels, d)) for c in range(0, d, channels)):
        spectral = to_columns(u[:, some], constants)
        spectral = (along_columns or columns)(spectral, spectrum[some], constants, h)
        y[:, some] = from_columns(spectral, constants).to(u.dtype)
    return y


def to_columns(u: Tensor, constants: Matrices) -> Tensor:
    """Rows transformed: (B, D, h, w) -> (B, D, h, 2 half), real parts then imaginary ones."""
    return u.detach().to(constants.rows.dtype) @ constants.rows


def from_columns(spectral: Tensor, constants: Matrices) -> Tensor:
    """The way back: (B, D, h, 2 half) -> (B, D, h, w)."""
    return spectral @ constants.rows.T


def columns(spectral: Tensor, spectrum: Tensor, constants: Matrices, h: int) -> Tensor:
    """Columns transformed, multiplied by the kernel's spectrum, and transformed back: (B, D, h, 2 half)."""
    d, width = spectral.shape[1], spectral.shape[-1]
    dtype, q = spectral.dtype, len(constants.cosines)
    wide = constants.twiddle.dtype
    both = torch.cat([constants.cosines, constants.sines])  # (2 q, t)
    turn = torch.complex(constants.twiddle[0], -constants.twiddle[1])[:, None]  # e^{-2 pi i p}
    parts = []  # (p, -p) of even and of odd rows
    for parity in (0, 1):
        rows = spectral[:, :, parity::2]
        cosine, sine = (both[:, : rows.shape[2]] @ rows).to(wide).unflatten(-2, (2, q)).unbind(-3)
        (cr, ci), (sr, si) = cosine.split(width // 2, -1), sine.split(width // 2, -1)
        parts.append((torch.complex(cr + si, ci - sr), torch.complex(cr - si, ci + sr)))
    (even, even_back), (odd, odd_back) = parts
    odd, odd_back = odd * turn, odd_back * turn.conj()
    coefficients = spectrum[:, :-TAIL].to(wide).view(d, 4, 2, q, width // 2)
    scale = spectrum[:, -TAIL].to(wide).exp2()[:, None, None]
    k = torch.complex(*coefficients.unbind(2)).unbind(1)
    plus, shifted = (even + odd) * k[0], (even - odd) * k[1]
    back, shifted_back = (even_back + odd_back) * k[2], (even_back - odd_back) * k[3]
    y = torch.empty_like(spectral)
    for parity in (0, 1):
        if parity:
            f, g = (plus - shifted) * turn.conj(), (back - shifted_back) * turn
        else:
            f, g = plus + shifted, back + shifted_back
        p, m = f + g, f - g
        count = len(range(parity, h, 2))
        upper = torch.cat([p.real, p.imag], -1).to(dtype)
        lower = torch.cat([-m.imag, m.real], -1).to(dtype)
        z = both[:, :count].T @ torch.cat([upper, lower], -2)
        y[:, :, parity::2] = (z.to(wide) * scale).to(dtype)
    return y
