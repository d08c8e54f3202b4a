"""The depthwise short filter of all three parts, and the first gate, in one pass over the projection.

Reads 3 planes a channel and writes 2, or 3 where the keys are wanted too; what lies between exists in registers
alone. Arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import autotune


@triton.jit
def _filtered(
    p_ptr, part, image, channel, channels, offset_ptr, weight_ptr, bias_ptr, at, inside, h, w,
    TAPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The short filter of one part's plane at some cells, in float32."""
    row = at // w
    column = at % w
    plane = ((image * 3 + part) * channels + channel) * h * w
    channel += part * channels
    y = tl.zeros(at.shape, tl.float32) + tl.load(bias_ptr + channel).to(tl.float32)
    offset = 0.0
    if OFFSET:
        offset = tl.load(offset_ptr + channel).to(tl.float32)
    for tap in tl.static_range(TAPS * TAPS):
        dy = tap // TAPS - TAPS // 2
        dx = tap % TAPS - TAPS // 2
        ok = inside & (row + dy >= 0) & (row + dy < h) & (column + dx >= 0) & (column + dx < w)
        value = tl.load(p_ptr + plane + at + dy * w + dx, mask=ok, other=0).to(tl.float32)
        if OFFSET:
            value = tl.where(ok, value + offset, 0)
        y += value * tl.load(weight_ptr + channel * TAPS * TAPS + tap).to(tl.float32)
    return y


@autotune(
    [{"BLOCK": 512, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 2048, "num_warps": 8}],
    key=["cells", "TAPS", "KEYS"],
)
@triton.jit
def _short_gate(
    p_ptr, offset_ptr, weight_ptr, bias_ptr, scale_ptr, u_ptr, q_ptr, k_ptr, channels, cells, h, w,
    TAPS: tl.constexpr, OFFSET: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < cells
    q = _filtered(p_ptr, 0, image, channel, channels, offset_ptr, weight_ptr, bias_ptr, at, inside, h, w, TAPS, OFFSET)
    k = _filtered(p_ptr, 1, image, channel, channels, offset_ptr, weight_ptr, bias_ptr, at, inside, h, w, TAPS, OFFSET)
    v = _filtered(p_ptr, 2, image, channel, channels, offset_ptr, weight_ptr, bias_ptr, at, inside, h, w, TAPS, OFFSET)
    u = (1 + tl.load(scale_ptr + channel).to(tl.float32) * k) * v
    out = (image * channels + channel) * cells + at
    tl.store(u_ptr + out, u.to(u_ptr.dtype.element_ty), mask=inside)
    tl.store(q_ptr + out, q.to(q_ptr.dtype.element_ty), mask=inside)
    if KEYS:
        tl.store(k_ptr + out, k.to(k_ptr.dtype.element_ty), mask=inside)


def short_gate(
    p: Tensor, offset: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor, size: tuple[int, int],
    u_dtype: torch.dtype, keys: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(u, q, k): the gated value ``(1 + scale k) v``, the query and, if ``keys``, the key, all after the short filter.

    p: (B, 3 C, h w), contiguous, parts q, k, v; offset: (3 C,), the projection's bias, or None; weight: (3 C, taps,
    taps); bias: (3 C,); scale: (C,). Returns u (B, C, h, w) in ``u_dtype``, q and k in p's. The twin is
    :func:`reference`.
    """
    (b, three, cells), (h, w) = p.shape, size
    c = three // 3
    u = torch.empty(b, c, h, w, dtype=u_dtype, device=p.device)
    q = torch.empty(b, c, h, w, dtype=p.dtype, device=p.device)
    k = torch.empty_like(q) if keys else None
    _short_gate[lambda meta: (triton.cdiv(cells, meta["BLOCK"]), c, b)](
        p, bias if offset is None else offset.contiguous(), weight.contiguous(), bias.contiguous(),
        scale.contiguous(), u, q, q if k is None else k, c, cells, h, w,
        TAPS=weight.shape[-1], OFFSET=offset is not None, KEYS=keys,
    )  # fmt: skip
    return u, q, k


def reference(
    p: Tensor, offset: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor, size: tuple[int, int],
    u_dtype: torch.dtype, keys: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """:func:`short_gate` by PyTorch."""
    taps = weight.shape[-1]
    if offset is not None:
        p = p + offset[:, None]
    filtered = torch.nn.functional.conv2d(
        p.unflatten(2, size), weight[:, None], bias, padding=taps // 2, groups=len(weight)
    )
    q, k, v = filtered.chunk(3, dim=1)
    u = (1 + scale[:, None, None] * k) * v
    return u.to(u_dtype), q, k if keys else None


@autotune([{"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 4096, "num_warps": 8}], key=["cells"])
@triton.jit
def _gate(y_ptr, q_ptr, scale_ptr, out_ptr, channels, cells, out_stride, BLOCK: tl.constexpr):
    plane = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < cells
    where = plane.to(tl.int64) * cells + at
    scale = tl.load(scale_ptr + plane % channels).to(tl.float32)
    q = tl.load(q_ptr + where, mask=inside, other=0).to(tl.float32)
    y = tl.load(y_ptr + where, mask=inside, other=0).to(tl.float32) * (1 + scale * q)
    out_ptr += (plane // channels).to(tl.int64) * out_stride + (plane % channels) * cells
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def gate(y: Tensor, q: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """``(1 + scale q) y``, into ``out``, whose planes of one image are contiguous, if it is given.

    y, q, out: (B, C, h, w), y and q contiguous; scale: (C,). Returns ``out``, or a new one in q's type.
    """
    b, c, h, w = q.shape
    out = torch.empty_like(q) if out is None else out
    _gate[lambda meta: (triton.cdiv(h * w, meta["BLOCK"]), b * c)](
        y, q, scale.contiguous(), out, c, h * w, out.stride(0)
    )
    return out
