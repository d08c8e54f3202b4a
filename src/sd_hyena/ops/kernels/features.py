"""Linear attention with exponential features, and the gate after it: three kernels, no feature in memory.

The maths is :func:`sd_hyena.ops.linear.linear_attention`. Features of the keys are made tile by tile, summed with
the values they weigh (against a running maximum, as in online softmax), then made of the queries and put to use in
the same kernel that adds the convolution and gates. A feature's logarithm is one sum of products in more than
float16's precision where the weights have more: they are split into two float16 numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear import linear_attention
from .launch import TYPES, autotune, power_of_two

MOST_SPLITS = 64  # shares of the tokens whose sums are taken side by side
PROGRAMS = 528  # fill a large GPU
SOME = 16  # channels of a head that one program joins


@triton.jit
def _logarithms(
    weight_ptr, bias_ptr, x, e, d, features, width,
    FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(E, tokens): a head's feature directions times x (D, tokens), float32."""
    inside = (e < features)[:, None] & (d < width)[None, :]
    weight = tl.load(weight_ptr + e[:, None] * width + d[None, :], mask=inside, other=0)
    coarse = weight.to(DOT)
    y = tl.dot(coarse, x, input_precision=PRECISION)
    if FINE:
        fine = (weight.to(tl.float32) - coarse.to(tl.float32)).to(DOT)
        y = tl.dot(fine, x, y, input_precision=PRECISION)
    return y + tl.load(bias_ptr + e, mask=e < features, other=0).to(tl.float32)[:, None]


@autotune(
    [{"TOKENS": 64, "num_warps": 4}, {"TOKENS": 32, "num_warps": 4}, {"TOKENS": 128, "num_warps": 8}],
    key=["cells", "width", "features"],
)
@triton.jit
def _sums(
    k_ptr, u_ptr, weight_ptr, bias_ptr, best_ptr, total_ptr, state_ptr, channels, cells, per, width, features,
    D: tl.constexpr, E: tl.constexpr, FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One share of one head's tokens: each feature's largest logarithm, its sum, and the values it weighs."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    e = tl.arange(0, E)
    d = tl.arange(0, D)
    plane = (image * channels + head * width) * cells
    best = tl.full((E,), float("-inf"), tl.float32)
    total = tl.zeros((E,), tl.float32)
    state = tl.zeros((E, D), tl.float32)
    weight_ptr += head * features * width
    bias_ptr += head * features
    start = split * per
    for tile in range(per // TOKENS):
        at = start + tile * TOKENS + tl.arange(0, TOKENS)
        inside = (d < width)[:, None] & (at < cells)[None, :]
        where = plane + d[:, None].to(tl.int64) * cells + at[None, :]
        k = tl.load(k_ptr + where, mask=inside, other=0).to(DOT)
        u = tl.load(u_ptr + where, mask=inside, other=0).to(DOT)
        x = _logarithms(weight_ptr, bias_ptr, k, e, d, features, width, FINE, DOT, PRECISION)
        x = tl.where((at < cells)[None, :], x, float("-inf"))
        new = tl.maximum(best, tl.max(x, 1))
        shrink = tl.exp(best - new)
        x = tl.exp(x - new[:, None])
        total = total * shrink + tl.sum(x, 1)
        state = tl.dot(x.to(DOT), tl.trans(u), state * shrink[:, None], input_precision=PRECISION)
        best = new
    share = ((image * tl.num_programs(1) + head) * tl.num_programs(0) + split) * E
    tl.store(best_ptr + share + e, best)
    tl.store(total_ptr + share + e, total)
    tl.store(state_ptr + share * D + e[:, None] * D + d[None, :], state)


@triton.jit
def _join(
    best_ptr, total_ptr, state_ptr, logs_ptr, mean_ptr,
    SPLITS: tl.constexpr, E: tl.constexpr, D: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """All shares of one head: each feature's logarithm of its sum, and the mean of SOME of the values it weighs."""
    head = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    at = e[:, None] * D + (tl.program_id(1) * SOME + tl.arange(0, SOME))[None, :]
    share = head * SPLITS * E
    best = tl.load(best_ptr + share + e)
    for split in range(1, SPLITS):
        best = tl.maximum(best, tl.load(best_ptr + share + split * E + e))
    total = tl.zeros((E,), tl.float32)
    state = tl.zeros((E, SOME), tl.float32)
    for split in range(SPLITS):
        shrink = tl.exp(tl.load(best_ptr + share + split * E + e) - best)
        total += shrink * tl.load(total_ptr + share + split * E + e)
        state += shrink[:, None] * tl.load(state_ptr + (share + split * E) * D + at)
    tl.store(logs_ptr + head * E + e, best + tl.log(total))
    tl.store(mean_ptr + head * E * D + at, state / total[:, None])


@autotune(
    [{"TOKENS": 64, "num_warps": 4}, {"TOKENS": 32, "num_warps": 4}, {"TOKENS": 128, "num_warps": 8}],
    key=["cells", "width", "features"],
)
@triton.jit
def _apply(
    q_ptr, y_ptr, weight_ptr, bias_ptr, logs_ptr, mean_ptr, gain_ptr, scale_ptr, out_ptr,
    channels, cells, width, features, out_stride,
    D: tl.constexpr, E: tl.constexpr, FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """``(1 + scale q) (y + gain attention(q))`` for a tile of one head's tokens."""
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    e = tl.arange(0, E)
    d = tl.arange(0, D)
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (d < width)[:, None] & (at < cells)[None, :]
    where = (image * channels + head * width) * cells + d[:, None].to(tl.int64) * cells + at[None, :]
    q = tl.load(q_ptr + where, mask=inside, other=0)
    x = _logarithms(
        weight_ptr + head * features * width,
        bias_ptr + head * features,
        q.to(DOT),
        e,
        d,
        features,
        width,
        FINE,
        DOT,
        PRECISION,
    )
    row = image * tl.num_programs(1) + head
    x += tl.load(logs_ptr + row * E + e)[:, None]
    x = tl.where((e < features)[:, None], x, float("-inf"))
    x = tl.exp(x - tl.max(x, 0)[None, :])
    x = x / tl.sum(x, 0)[None, :]
    mean = tl.load(mean_ptr + row * E * D + e[:, None] * D + d[None, :])
    attended = tl.dot(tl.trans(mean.to(DOT)), x.to(DOT), input_precision=PRECISION)
    channel = head * width + d
    gain = tl.load(gain_ptr + channel, mask=d < width, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + channel, mask=d < width, other=0).to(tl.float32)
    y = tl.load(y_ptr + where, mask=inside, other=0).to(tl.float32) + gain[:, None] * attended
    y *= 1 + scale[:, None] * q.to(tl.float32)
    where = image * out_stride + channel[:, None].to(tl.int64) * cells + at[None, :]
    tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=inside)


def attend_and_gate(
    q: Tensor, k: Tensor, u: Tensor, y: Tensor, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor],
    gain: Tensor, scale: Tensor, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``(1 + scale q) (y + gain attention(q, k, u))``, into ``out``, whose planes of one image are contiguous, if it
    is given.

    q, k, u, y, out: (B, C, h, w), all but ``out`` contiguous, of C / width whole heads; query, key: weights (heads,
    features, width) and biases (heads, features, 1) of the feature maps; gain, scale: (C,). Multiplies in u's type.
    Returns ``out``, or a new one in q's type. The twin is :func:`reference`.
    """
    (b, c, h, w), (heads, features, width) = q.shape, query[0].shape
    cells, device = h * w, q.device
    dot = TYPES[u.dtype]
    precision = "ieee" if u.dtype == torch.float32 else "tf32"
    sizes = {"D": power_of_two(width), "E": power_of_two(features)}
    splits = max(1, min(MOST_SPLITS, cells // 256, -(-PROGRAMS // (b * heads))))
    per = -(-cells // splits // 128) * 128  # a whole number of tiles of any size
    splits = -(-cells // per)
    best, total = (torch.empty(b, heads, splits, sizes["E"], device=device) for _ in range(2))
    state = torch.empty(b, heads, splits, sizes["E"], sizes["D"], device=device)
    (wq, bq), (wk, bk) = ((t.contiguous() for t in pair) for pair in (query, key))
    fine = dot != tl.float32 and query[0].dtype == torch.float32  # bfloat16 fits into float16's digits
    how = {**sizes, "FINE": fine, "DOT": dot, "PRECISION": precision}
    _sums[(splits, heads, b)](k, u, wk, bk, best, total, state, c, cells, per, width, features, **how)
    logs = torch.empty(b, heads, sizes["E"], device=device)
    mean = torch.empty(b, heads, sizes["E"], sizes["D"], device=device)
    _join[(b * heads, sizes["D"] // SOME)](best, total, state, logs, mean, SPLITS=splits, SOME=SOME, **sizes)
    out = torch.empty_like(q) if out is None else out
    _apply[lambda meta: (triton.cdiv(cells, meta["TOKENS"]), heads, b)](
        q,
        y,
        wq,
        bq,
        logs,
        mean,
        gain.contiguous(),
        scale.contiguous(),
        out,
        c,
        cells,
        width,
        features,
        out.stride(0),
        **how,
    )
    return out


def reference(
    q: Tensor, k: Tensor, u: Tensor, y: Tensor, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor],
    gain: Tensor, scale: Tensor,
) -> Tensor:  # fmt: skip
    """:func:`attend_and_gate` by PyTorch."""
    width = query[0].shape[-1]
    parts = [t.unflatten(1, (-1, width)).flatten(3) for t in (q, k, u)]
    q_logs, k_logs = (w.to(x.dtype) @ x + b.to(x.dtype) for x, (w, b) in ((parts[0], query), (parts[1], key)))
    attended = linear_attention(q_logs, k_logs, parts[2], "exp").reshape(q.shape)
    gain, scale = gain[:, None, None], scale[:, None, None]
    return ((1 + scale * q) * (y + gain * attended)).to(q.dtype)
