"""The two-dimensional long convolution by FFT, O(L log L), in float32 at least.

An operator of its own, because ``torch.compile`` has no code for complex numbers before PyTorch 2.14. A kernel keeps
its centre tap at (ry, rx) of its array; what wraps round lands on rows and columns outside the crop, so ``h + ry`` by
``w + rx`` is room enough. A few channels are transformed at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .fft import fast_length, transform_dtype

STEP = {"cpu": 2**20, "other": 2**26}  # padded cells transformed at once


@torch.library.custom_op("sd_hyena::long_conv2d", mutates_args=())
def long_conv2d(u: Tensor, k: Tensor) -> Tensor:
    """``K ** u``, zero outside the grid, differentiable once.

    u: (B, D, h, w); k: (D, 2 ry + 1, 2 rx + 1). Returns (B, D, h, w) in u's dtype. The reference is
    :func:`sd_hyena.ops.naive.conv2d`.
    """
    (h, w), (ry, rx), shape = _sizes(u, k)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    for some in _steps(u, shape):
        spectrum = _transform(u[:, some], shape).mul_(_transform(k[some], shape))
        y[:, some] = torch.fft.irfft2(spectrum, s=shape)[..., ry : ry + h, rx : rx + w]
    return y


@torch.library.custom_op("sd_hyena::long_conv2d_backward", mutates_args=())
def long_conv2d_backward(grad: Tensor, u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of u and k."""
    (h, w), (ry, rx), shape = _sizes(u, k)
    du, dk = torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(k)
    for some in _steps(u, shape):
        arriving = _transform(torch.nn.functional.pad(grad[:, some], (rx, 0, ry, 0)), shape)
        back = torch.fft.irfft2(arriving * _transform(k[some], shape).conj(), s=shape)
        du[:, some] = back[..., :h, :w]
        taps = torch.fft.irfft2((_transform(u[:, some], shape).conj() * arriving).sum(0), s=shape)
        dk[some] = taps[..., : 2 * ry + 1, : 2 * rx + 1]
    return du, dk


@long_conv2d.register_fake
def _(u: Tensor, k: Tensor) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


@long_conv2d_backward.register_fake
def _(grad: Tensor, u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(k)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return torch.ops.sd_hyena.long_conv2d_backward(grad, *ctx.saved_tensors)


long_conv2d.register_autograd(_backward, setup_context=_keep)


def _sizes(u: Tensor, k: Tensor) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(h, w), (ry, rx) and the transforms' lengths."""
    h, w, ry, rx = u.shape[-2], u.shape[-1], k.shape[-2] // 2, k.shape[-1] // 2
    return (h, w), (ry, rx), (fast_length(h + ry), fast_length(w + rx))


def _transform(t: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.fft.rfft2(t.to(transform_dtype(t)), s=shape)


def _steps(u: Tensor, shape: tuple[int, int]) -> Iterator[slice]:
    most = STEP["cpu" if u.device.type == "cpu" else "other"]
    step = max(1, most // (len(u) * shape[0] * shape[1]))
    return (slice(c, min(c + step, u.shape[1])) for c in range(0, u.shape[1], step))
