"""Transform along columns, product with the kernel's spectrum, and back: one kernel, nothing of it in memory.

The maths is :func:`sd_hyena.ops.gemm_conv.columns`. :func:`all_columns` is what the flash kernel shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm_conv import Matrices
from .launch import TYPES, autotune, power_of_two


@triton.jit
def _times_spectrum(re, im, k_ptr, at, inside, size):
    """A complex tile times the coefficients at ``at`` (real parts, then imaginary ones ``size`` further on)."""
    k_re = tl.load(k_ptr + at, mask=inside, other=0).to(tl.float32)
    k_im = tl.load(k_ptr + size + at, mask=inside, other=0).to(tl.float32)
    return re * k_re - im * k_im, re * k_im + im * k_re


@triton.jit
def column_pass(
    even_re, even_im, odd_re, odd_im, cosines, sines, turn_re, turn_im, k_ptr, at, inside, size,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Even and odd rows of a tile of row frequencies, (T, F) each, convolved along columns by some frequencies.

    cosines, sines: (Q, T); turn: (Q, 1), e^{2 pi i p}; at, inside: (Q, F), where the spectrum has those
    frequencies; size: how far apart its parts lie. Returns the four tiles of the result, (T, F) float32.
    """
    # Forward: the products serve p and -p.
    c_re = tl.dot(cosines, even_re, input_precision=PRECISION)
    c_im = tl.dot(cosines, even_im, input_precision=PRECISION)
    s_re = tl.dot(sines, even_re, input_precision=PRECISION)
    s_im = tl.dot(sines, even_im, input_precision=PRECISION)
    even_p_re = c_re + s_im
    even_p_im = c_im - s_re
    even_m_re = c_re - s_im
    even_m_im = c_im + s_re
    c_re = tl.dot(cosines, odd_re, input_precision=PRECISION)
    c_im = tl.dot(cosines, odd_im, input_precision=PRECISION)
    s_re = tl.dot(sines, odd_re, input_precision=PRECISION)
    s_im = tl.dot(sines, odd_im, input_precision=PRECISION)
    re = c_re + s_im
    im = c_im - s_re
    odd_p_re = re * turn_re + im * turn_im
    odd_p_im = im * turn_re - re * turn_im
    re = c_re - s_im
    im = c_im + s_re
    odd_m_re = re * turn_re - im * turn_im
    odd_m_im = im * turn_re + re * turn_im
    # p, p + 1/2, -p and 1/2 - p
    f_re, f_im = _times_spectrum(even_p_re + odd_p_re, even_p_im + odd_p_im, k_ptr, at, inside, size)
    g_re, g_im = _times_spectrum(even_p_re - odd_p_re, even_p_im - odd_p_im, k_ptr + 2 * size, at, inside, size)
    plus_re = f_re + g_re
    plus_im = f_im + g_im
    less_re = (f_re - g_re) * turn_re - (f_im - g_im) * turn_im
    less_im = (f_im - g_im) * turn_re + (f_re - g_re) * turn_im
    f_re, f_im = _times_spectrum(even_m_re + odd_m_re, even_m_im + odd_m_im, k_ptr + 4 * size, at, inside, size)
    g_re, g_im = _times_spectrum(even_m_re - odd_m_re, even_m_im - odd_m_im, k_ptr + 6 * size, at, inside, size)
    back_re = f_re + g_re
    back_im = f_im + g_im
    down_re = (f_re - g_re) * turn_re + (f_im - g_im) * turn_im
    down_im = (f_im - g_im) * turn_re - (f_re - g_re) * turn_im
    # Back: sums and differences of p and -p against cosines and sines.
    cosines = tl.trans(cosines)
    sines = tl.trans(sines)
    y_even_re = tl.dot(cosines, (plus_re + back_re).to(DOT), input_precision=PRECISION)
    y_even_re = tl.dot(sines, (back_im - plus_im).to(DOT), y_even_re, input_precision=PRECISION)
    y_even_im = tl.dot(cosines, (plus_im + back_im).to(DOT), input_precision=PRECISION)
    y_even_im = tl.dot(sines, (plus_re - back_re).to(DOT), y_even_im, input_precision=PRECISION)
    y_odd_re = tl.dot(cosines, (less_re + down_re).to(DOT), input_precision=PRECISION)
    y_odd_re = tl.dot(sines, (down_im - less_im).to(DOT), y_odd_re, input_precision=PRECISION)
    y_odd_im = tl.dot(cosines, (less_im + down_im).to(DOT), input_precision=PRECISION)
    y_odd_im = tl.dot(sines, (less_re - down_re).to(DOT), y_odd_im, input_precision=PRECISION)
    return y_even_re, y_even_im, y_odd_re, y_odd_im


@triton.jit
def all_columns(
    even_re, even_im, odd_re, odd_im, cosine_ptr, sine_ptr, twiddle_ptr, k_ptr, t, f, rows, quarter, half,
    T: tl.constexpr, F: tl.constexpr, QB: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`column_pass` by all frequencies, QB of the quarter at a time: (T, F) tiles -> (T, F) float32."""
    y_even_re = tl.zeros((T, F), tl.float32)
    y_even_im = tl.zeros((T, F), tl.float32)
    y_odd_re = tl.zeros((T, F), tl.float32)
    y_odd_im = tl.zeros((T, F), tl.float32)
    for first in range(0, quarter, QB):
        j = first + tl.arange(0, QB)
        table = j[:, None] * rows + t[None, :]
        present = (j < quarter)[:, None] & (t < rows)[None, :]
        cosines = tl.load(cosine_ptr + table, mask=present, other=0)
        sines = tl.load(sine_ptr + table, mask=present, other=0)
        turn_re = tl.load(twiddle_ptr + j, mask=j < quarter, other=0)[:, None]
        turn_im = tl.load(twiddle_ptr + quarter + j, mask=j < quarter, other=0)[:, None]
        at = j[:, None] * half + f[None, :]
        inside = (j < quarter)[:, None] & (f < half)[None, :]
        a, b, c, d = column_pass(
            even_re, even_im, odd_re, odd_im, cosines, sines, turn_re, turn_im, k_ptr, at, inside, quarter * half,
            DOT, PRECISION,
        )  # fmt: skip
        y_even_re += a
        y_even_im += b
        y_odd_re += c
        y_odd_im += d
    return y_even_re, y_even_im, y_odd_re, y_odd_im


@autotune(
    [
        {"F": f, "QB": q, "num_warps": warps, "num_stages": stages}
        for f, q, warps, stages in (
            (16, 32, 8, 2), (16, 64, 8, 2), (16, 16, 8, 2), (32, 32, 8, 2), (32, 64, 8, 2), (16, 64, 4, 2),
        )
    ],
    key=["h", "half", "images"],
    in_place=["x_ptr"],
)  # fmt: skip
@triton.jit
def _columns(
    x_ptr, k_ptr, cosine_ptr, sine_ptr, twiddle_ptr, y_ptr,
    images, channels, h, rows, quarter: tl.constexpr, half, k_stride,
    T: tl.constexpr, F: tl.constexpr, QB: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Images follow one another, so that a channel's spectrum is read from memory once.
    image = tl.program_id(1) % images
    channel = tl.program_id(1) // images
    f = tl.program_id(0) * F + tl.arange(0, F)
    t = tl.arange(0, T)
    plane = (image * channels + channel).to(tl.int64) * h * 2 * half
    even_at = (2 * t)[:, None] * 2 * half + f[None, :]
    odd_at = even_at + 2 * half
    even_in = (2 * t < h)[:, None] & (f < half)[None, :]
    odd_in = (2 * t + 1 < h)[:, None] & (f < half)[None, :]
    x_ptr += plane
    even_re = tl.load(x_ptr + even_at, mask=even_in, other=0)
    even_im = tl.load(x_ptr + even_at + half, mask=even_in, other=0)
    odd_re = tl.load(x_ptr + odd_at, mask=odd_in, other=0)
    odd_im = tl.load(x_ptr + odd_at + half, mask=odd_in, other=0)
    k_ptr += channel.to(tl.int64) * k_stride
    even_re, even_im, odd_re, odd_im = all_columns(
        even_re, even_im, odd_re, odd_im, cosine_ptr, sine_ptr, twiddle_ptr, k_ptr, t, f, rows, quarter, half,
        T, F, QB, DOT, PRECISION,
    )  # fmt: skip
    scale = tl.exp2(tl.load(k_ptr + 8 * quarter * half).to(tl.float32))
    kind = y_ptr.dtype.element_ty
    y_ptr += plane
    tl.store(y_ptr + even_at, (even_re * scale).to(kind), mask=even_in)
    tl.store(y_ptr + even_at + half, (even_im * scale).to(kind), mask=even_in)
    tl.store(y_ptr + odd_at, (odd_re * scale).to(kind), mask=odd_in)
    tl.store(y_ptr + odd_at + half, (odd_im * scale).to(kind), mask=odd_in)


def columns(spectral: Tensor, spectrum: Tensor, constants: Matrices, h: int) -> Tensor:
    """As :func:`sd_hyena.ops.gemm_conv.columns`, its twin; written over ``spectral``.

    spectral: (B, D, h, 2 half), contiguous, float16 (float32 is multiplied as such, for tests); spectrum: (D,
    coefficients + TAIL).
    """
    b, d, _, width = spectral.shape
    quarter = constants.cosines.shape[0]
    _columns[lambda meta: (triton.cdiv(width // 2, meta["F"]), b * d)](
        spectral, spectrum, constants.cosines, constants.sines, constants.twiddle, spectral,
        b, d, h, -(-h // 2), quarter, width // 2, spectrum.stride(0),
        T=power_of_two(-(-h // 2)), DOT=TYPES[spectral.dtype],
        PRECISION="ieee" if spectral.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return spectral
