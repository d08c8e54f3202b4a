"""The whole convolution of a plane in one kernel: rows, columns, spectrum, back, and the last gate.

One program a plane. The transform is taken a tile of row frequencies at a time: each tile goes through the
columns and back on its own and is added to the result, so no spectrum of the signal ever reaches memory. The
maths is :func:`sd_hyena.ops.gemm_conv.convolve`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm_conv import lengths, matrices
from .columns import all_columns
from .launch import TYPES, autotune, power_of_two


@autotune(
    [
        {"F": f, "QB": q, "num_warps": warps, "num_stages": stages}
        for f, q, warps, stages in ((16, 32, 8, 1), (16, 16, 4, 1), (32, 32, 8, 1), (16, 32, 4, 2))
    ],
    key=["h", "w", "GATE", "images"],
)
@triton.jit
def _flash(
    u_ptr, k_ptr, q_ptr, scale_ptr, y_ptr, rows_ptr, cosine_ptr, sine_ptr, twiddle_ptr,
    images, channels, h, w, rows, quarter: tl.constexpr, half: tl.constexpr, k_stride, y_stride,
    T: tl.constexpr, W: tl.constexpr, GATE: tl.constexpr, F: tl.constexpr, QB: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Images follow one another, so that a channel's spectrum is read from memory once.
    image = tl.program_id(0) % images
    channel = tl.program_id(0) // images
    plane = (image * channels + channel).to(tl.int64) * h * w
    t = tl.arange(0, T)
    x = tl.arange(0, W)
    even_at = (2 * t)[:, None] * w + x[None, :]
    odd_at = even_at + w
    even_in = (2 * t < h)[:, None] & (x < w)[None, :]
    odd_in = (2 * t + 1 < h)[:, None] & (x < w)[None, :]
    even = tl.load(u_ptr + plane + even_at, mask=even_in, other=0).to(DOT)
    odd = tl.load(u_ptr + plane + odd_at, mask=odd_in, other=0).to(DOT)
    k_ptr += channel.to(tl.int64) * k_stride
    scale = tl.exp2(tl.load(k_ptr + 8 * quarter * half).to(tl.float32))
    y_even = tl.zeros((T, W), tl.float32)
    y_odd = tl.zeros((T, W), tl.float32)
    for first in range(0, half, F):
        f = first + tl.arange(0, F)
        at = x[:, None] * 2 * half + f[None, :]
        inside = (x < w)[:, None] & (f < half)[None, :]
        rows_re = tl.load(rows_ptr + at, mask=inside, other=0)
        rows_im = tl.load(rows_ptr + at + half, mask=inside, other=0)
        even_re = tl.dot(even, rows_re, input_precision=PRECISION).to(DOT)
        even_im = tl.dot(even, rows_im, input_precision=PRECISION).to(DOT)
        odd_re = tl.dot(odd, rows_re, input_precision=PRECISION).to(DOT)
        odd_im = tl.dot(odd, rows_im, input_precision=PRECISION).to(DOT)
        even_re, even_im, odd_re, odd_im = all_columns(
            even_re, even_im, odd_re, odd_im, cosine_ptr, sine_ptr, twiddle_ptr, k_ptr, t, f, rows, quarter, half,
            T, F, QB, DOT, PRECISION,
        )  # fmt: skip
        rows_re = tl.trans(rows_re)
        rows_im = tl.trans(rows_im)
        y_even = tl.dot((even_re * scale).to(DOT), rows_re, y_even, input_precision=PRECISION)
        y_even = tl.dot((even_im * scale).to(DOT), rows_im, y_even, input_precision=PRECISION)
        y_odd = tl.dot((odd_re * scale).to(DOT), rows_re, y_odd, input_precision=PRECISION)
        y_odd = tl.dot((odd_im * scale).to(DOT), rows_im, y_odd, input_precision=PRECISION)
    if GATE:
        factor = tl.load(scale_ptr + channel).to(tl.float32)
        y_even *= 1 + factor * tl.load(q_ptr + plane + even_at, mask=even_in, other=0).to(tl.float32)
        y_odd *= 1 + factor * tl.load(q_ptr + plane + odd_at, mask=odd_in, other=0).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    y_ptr += image.to(tl.int64) * y_stride + channel * h * w
    tl.store(y_ptr + even_at, y_even.to(kind), mask=even_in)
    tl.store(y_ptr + odd_at, y_odd.to(kind), mask=odd_in)


def convolve(
    u: Tensor,
    spectrum: Tensor,
    radius: tuple[int, int],
    gate: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``K ** u``, times ``1 + scale q`` if ``gate`` = (q, scale) is given.

    u: (B, D, h, w), contiguous, h, w <= 128 (what a multiprocessor holds); spectrum: from
    :func:`sd_hyena.ops.gemm_conv.kernel_spectrum` in float16; q: like u; scale: (D,); out: where the result goes, (B,
    D, h, w) of any type, its planes of one image contiguous. Multiplies in the spectrum's type. Returns ``out``, or a
    new one in u's type. The twin is :func:`sd_hyena.ops.gemm_conv.convolve`.
    """
    b, d, h, w = u.shape
    size = lengths((h, w), radius)
    constants = matrices((h, w), size, spectrum.dtype, u.device)
    y = torch.empty_like(u) if out is None else out
    q, scale = (u, u) if gate is None else gate
    _flash[(b * d,)](
        u, spectrum, q, scale, y, constants.rows, constants.cosines, constants.sines, constants.twiddle,
        b, d, h, w, -(-h // 2), size.quarter, size.half, spectrum.stride(0), y.stride(0),
        T=power_of_two(-(-h // 2)), W=power_of_two(w), GATE=gate is not None,
        DOT=TYPES[spectrum.dtype], PRECISION="ieee" if spectrum.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return y
