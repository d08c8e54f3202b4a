"""The two-dimensional long convolution of ``Hyena2D`` by FFT, O(L log L), with its own gradient.

``y = K ** u + bias * u + gain * mean(u)``, all three per channel: bias and mean are terms of the kernel's
spectrum and cost nothing. Three things make it fast where memory is slow:

- Few planes at a time (``STEP``), so that padded transforms live in cache and never exist for all channels.
- Pruned: rows that are only padding are not transformed, and rows that will be cropped are not inverted.
- The half-transformed plane is stored transposed, (columns, rows), so that both passes run along memory.

The kernel keeps its centre tap at (ry, rx) of its array; the output is cropped from there. Its far side
wraps round onto rows and columns outside the crop, so ``h + ry`` by ``w + rx`` is room enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fft import fast_length, transform_dtype

Rows = Callable[[slice], Tensor]

# What is done at once; on a CPU, what its caches hold.
BAND = {"cpu": 2**18, "other": 2**26}  # kernel taps made and transformed
STEP = {"cpu": 2**18, "other": 2**25}  # padded cells transformed


def transform_shape(grid: tuple[int, int], radius: tuple[int, int]) -> tuple[int, int]:
    """(m, n): FFT lengths for a kernel of ``radius`` on ``grid``."""
    return fast_length(grid[0] + radius[0]), fast_length(grid[1] + radius[1])


def spectrum_shape(grid: tuple[int, int], radius: tuple[int, int]) -> tuple[int, int]:
    """(n // 2 + 1, m): the transposed half plane that one channel's spectrum is stored as."""
    m, n = transform_shape(grid, radius)
    return n // 2 + 1, m


def kernel_spectrum(
    k: Tensor | Rows,
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    out: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """What :func:`convolve` multiplies with.

    k: kernels of ``shape`` (D, 2 ry + 1, 2 rx + 1), centre tap at offset (0, 0), or a function that makes a
    slice of their rows on ``device``, so that they need never exist whole; grid: (h, w) they will be applied
    to; bias, gain: (D,), zero unless given; out: where to put the result. Returns complex (D, n // 2 + 1, m).
    """
    (d, height, width), (h, w) = shape, grid
    ry, rx = height // 2, width // 2
    m, n = transform_shape(grid, (ry, rx))
    rows: Rows = (lambda band: k[:, band]) if isinstance(k, Tensor) else k
    step = max(1, at_once(BAND, k.device if isinstance(k, Tensor) else device) // (d * width))
    spectrum = out
    for top in range(0, height, step):
        band = rows(slice(top, min(top + step, height))).detach()
        band = band.to(transform_dtype(band))
        columns = torch.fft.rfft(band, n=n)
        if bias is not None and top <= ry < top + step:  # one more tap at the centre
            impulse = torch.zeros(n, dtype=band.dtype, device=band.device)
            impulse[rx] = 1
            columns[:, ry - top] += bias.detach().to(band.dtype)[:, None] * torch.fft.rfft(impulse)
        if spectrum is None:
            spectrum = columns.new_empty(d, n // 2 + 1, m)
        spectrum[..., top : top + band.shape[1]] = columns.transpose(1, 2)
    assert spectrum is not None
    spectrum[..., height:] = 0
    for _, channels in _steps(1, d, m * n, spectrum.device):
        spectrum[channels] = torch.fft.fft(spectrum[channels])
    if gain is not None:  # the mean over the grid, everywhere
        spectrum[:, 0, 0] += gain.detach().to(spectrum.real.dtype) * (m * n / (h * w))
    return spectrum


def convolve(u: Tensor, spectrum: Tensor, radius: tuple[int, int]) -> Tensor:
    """The convolution for a given spectrum, without gradients.

    u: (B, D, h, w); spectrum: complex (D, n // 2 + 1, m) from :func:`kernel_spectrum` for the same grid.
    Returns (B, D, h, w) in u's dtype. The reference is :func:`sd_hyena.ops.naive.long_conv2d`.
    """
    (b, d, h, w), (ry, rx) = u.shape, radius
    shape = transform_shape((h, w), radius)
    planes = u.detach().to(transform_dtype(u)).contiguous()
    y = _planes(u)
    buffer = None
    for images, channels in _steps(b, d, shape[0] * shape[1], u.device):
        product, buffer = _transform(planes[images, channels], shape, (0, 0), buffer)
        product *= spectrum[channels]
        y[images, channels] = _inverse(product, shape, slice(ry, ry + h), slice(rx, rx + w))
    return y


def long_conv2d(u: Tensor, k: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """``K ** u + bias * u + gain * mean(u)``, differentiable once; keeps its arguments and nothing else.

    u: (B, D, h, w), in any memory layout; k: (D, 2 ry + 1, 2 rx + 1); bias, gain: (D,). Returns
    (B, D, h, w) in u's dtype. The reference is :func:`sd_hyena.ops.naive.long_conv2d`.
    """
    return _LongConv2d.apply(u, k, bias, gain)


class _LongConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(u, k, bias, gain)
        radius = k.shape[-2] // 2, k.shape[-1] // 2
        return convolve(u, kernel_spectrum(k, k.shape, (u.shape[-2], u.shape[-1]), bias, gain), radius)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, k, bias, gain = ctx.saved_tensors
        return gradients(grad, u, k, bias, gain, ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:]))


def gradients(
    grad: Tensor, u: Tensor, k: Tensor, bias: Tensor, gain: Tensor, wants_u: bool = True, wants_kernel: bool = True
) -> tuple[Tensor | None, ...]:
    """Those of u, k, bias and gain for one of :func:`long_conv2d`'s result; None for what is not wanted."""
    (b, d, h, w), (ry, rx) = u.shape, (k.shape[-2] // 2, k.shape[-1] // 2)
    m, n = transform_shape((h, w), (ry, rx))
    dtype = transform_dtype(u)
    signal, arriving = u.to(dtype).contiguous(), grad.to(dtype).contiguous()
    du, dk, dgain = _planes(u), torch.empty_like(k, dtype=dtype), gain.new_empty(d, dtype=dtype)
    adjoint = kernel_spectrum(k, k.shape, (h, w), bias, gain).conj() if wants_u else None
    correlation = None
    at_output = at_input = None  # two buffers: their padding lies at different offsets
    for images, channels in _steps(b, d, m * n, u.device):
        g, at_output = _transform(arriving[images, channels], (m, n), (ry, rx), at_output)
        if wants_kernel:
            f, at_input = _transform(signal[images, channels], (m, n), (0, 0), at_input)
            part = (f.conj() * g).sum(0)
            correlation = part if images.start == 0 else correlation + part
            if images.stop >= b:
                dk[channels] = _inverse(correlation, (m, n), slice(2 * ry + 1), slice(2 * rx + 1))
                dgain[channels] = correlation[:, 0, 0].real / (h * w)
        if adjoint is not None:
            du[images, channels] = _inverse(g * adjoint[channels], (m, n), slice(h), slice(w))
    if not wants_kernel:
        return du, None, None, None
    return du if wants_u else None, dk.to(k.dtype), dk[:, ry, rx].to(bias.dtype), dgain.to(gain.dtype)


def _transform(u: Tensor, shape: tuple[int, int], at: tuple[int, int], buffer: Tensor | None) -> tuple[Tensor, Tensor]:
    """The transposed half spectrum (B, D, n // 2 + 1, m) of planes (B, D, h, w) placed at offset ``at``.

    ``buffer`` holds the rows' transforms and zeros; it is made at the first step and reused, whole or in part.
    """
    (m, n), (top, left) = shape, at
    if left:
        u = torch.nn.functional.pad(u, (left, 0))
    columns = torch.fft.rfft(u, n=n)
    if buffer is None:
        buffer = columns.new_zeros(*u.shape[:2], n // 2 + 1, m)
    padded = buffer[: u.shape[0], : u.shape[1]]
    padded[..., top : top + u.shape[2]] = columns.transpose(-2, -1)
    return torch.fft.fft(padded), buffer


def _inverse(spectrum: Tensor, shape: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """The wanted rows and columns of the planes whose transposed half spectra are (..., n // 2 + 1, m)."""
    kept = torch.fft.ifft(spectrum)[..., rows].transpose(-2, -1)
    return torch.fft.irfft(kept, n=shape[1])[..., columns]


def _steps(b: int, d: int, cells: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """(images, channels) to transform together; all images of some channels before the next channels."""
    planes = max(1, at_once(STEP, device) // cells)
    channels, images = min(planes, d), max(1, min(b, planes // d))
    for c in range(0, d, channels):
        for i in range(0, b, images):
            yield slice(i, min(i + images, b)), slice(c, min(c + channels, d))


def at_once(limits: dict[str, int], device: torch.device | None) -> int:
    return limits["cpu" if device is None or device.type == "cpu" else "other"]


def _planes(u: Tensor) -> Tensor:
    """Empty planes shaped like ``u``, (B, D, h, w). On a CPU a gap after each keeps planes whose size is a power of
    two from falling on the same cache lines when channels are read side by side."""
    b, d, h, w = u.shape
    if u.device.type != "cpu":
        return u.new_empty(b, d, h, w)
    return u.new_empty(b, d, h * w + 16)[..., : h * w].unflatten(-1, (h, w))
