"""What a layer should return at a few tokens, from the definitions, in float64.

O(L) per token, so it can be asked at the very shape that is timed. Everything here is differentiable and does
without what it checks: fused attention, FFTs, kept spectra, chunks and reordered projections. A Hyena layer's
implicit filter and short filter are its own, in float64; ``tests/nn`` holds those to their formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Hyena2D, HyenaOperator, LinearAttention
from ..nn.linear_attention import FeatureMaps

Projections = Sequence[Callable[[Tensor], Tensor]]


def doubled(layers: Projections) -> list[Callable[[Tensor], Tensor]]:
    """The projections as float64 functions, their weights unchanged."""
    return [copy.deepcopy(layer).double() if isinstance(layer, nn.Module) else layer for layer in layers]


def attention(x: Tensor, projections: Projections, heads: int, tokens: Tensor, keys: Tensor | None = None) -> Tensor:
    """Softmax attention at ``tokens``: (B, S, D). x: (B, L, D) in float64; keys: (B, L') of the tokens
    attended to, or None for all."""
    to_q, to_k, to_v, to_out = doubled(projections)
    y = []
    for b, image in enumerate(x):
        seen = image if keys is None else image[keys[b]]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (to_q(image[tokens]), to_k(seen), to_v(seen)))
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        y.append((weights @ v).transpose(0, 1).flatten(1))
    return to_out(torch.stack(y))


def linear_attention(x: Tensor, projections: Projections, heads: int, tokens: Tensor) -> Tensor:
    """Normalised linear attention with elu + 1 at ``tokens``: (B, S, D). x: (B, L, D) in float64."""
    to_q, to_k, to_v, to_out = doubled(projections)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (to_q(x[:, tokens]), to_k(x), to_v(x)))
    return to_out(_merge(_linear_weights(q, k) @ v))


def hyena2d(
    operator: Hyena2D, x: Tensor, size: tuple[int, int], tokens: Tensor, projections: Projections | None = None
) -> Tensor:
    """A whole ``Hyena2D`` layer of order 2 at ``tokens``: (B, S, D). x: (B, L, D) in float64."""
    model = copy.deepcopy(operator).double()
    inner = model.inner_dim
    *inputs, out = (model.in_proj, model.out_proj) if projections is None else doubled(projections)
    hidden = model.filter.hidden(size)
    y = []
    for channels in model.channel_groups(0):
        parts = [_rows(layer, part, inner, channels, len(inputs) == 1) for part, layer in enumerate(_each(inputs))]
        u = [project(x).transpose(1, 2).unflatten(2, size) for project in parts]
        x0, x1, v = (model.filter_short(t, part, channels) for part, t in enumerate(u))
        g0, g1 = (1 + s[:, channels] * t for s, t in zip(model.gate.weight, (x0, x1), strict=True))
        v = g1 * v
        kernels = model.kernels(size, 0, channels, hidden)
        mixed = _conv_at(v, kernels, tokens) + model.bias.weight[0, :, channels].flatten(2) * v.flatten(2)[..., tokens]
        if model.global_branch == "mean":
            mixed = mixed + model.gain.weight[0, :, channels].flatten(2) * v.mean((-2, -1))[..., None]
        elif model.global_branch == "linear":
            width = inner // model.attention_heads
            heads = slice(channels.start // width, channels.stop // width)
            q, k, values = (t.flatten(2).unflatten(1, (-1, width)) for t in (x0, x1, v))
            attended = _weights(model.features, q[..., tokens], k, heads) @ values.transpose(2, 3)
            mixed = mixed + model.gain.weight[0, :, channels].flatten(2) * _merge(attended).transpose(1, 2)
        y.append(g0.flatten(2)[..., tokens] * mixed)
    return out(torch.cat(y, 1).transpose(1, 2))


def linear_operator(operator: LinearAttention, x: Tensor, tokens: Tensor) -> Tensor:
    """A whole ``LinearAttention`` layer at ``tokens``: (B, S, D). x: (B, L, D) in float64."""
    model = copy.deepcopy(operator).double()
    q, k, v = (t.transpose(1, 2).unflatten(1, (model.attention_heads, -1)) for t in model.in_proj(x).chunk(3, -1))
    return model.out_proj(_merge(_weights(model.features, q[..., tokens], k) @ v.transpose(2, 3)))


def causal(operator: HyenaOperator, x: Tensor, tokens: Tensor) -> Tensor:
    """A whole causal operator of order 2, one head and one block, at ``tokens``: (B, S, D). x in float64."""
    model = copy.deepcopy(operator).double()
    length = x.shape[1]
    u = model.short_filter(model.in_proj(x).transpose(1, 2))[..., :length]
    x0, x1, v = u.chunk(3, dim=1)
    v = v * x1
    k = model.filter_fn(length).T
    past = torch.stack([(k[:, : t + 1].flip(-1) * v[..., : t + 1]).sum(-1) for t in tokens.tolist()], -1)
    return model.out_proj(((past + model.filter_fn.bias[:, None] * v[..., tokens]) * x0[..., tokens]).transpose(1, 2))


def _each(inputs: Projections) -> Projections:
    return [inputs[0]] * 3 if len(inputs) == 1 else inputs


def _rows(
    layer: Callable[[Tensor], Tensor], part: int, inner: int, channels: slice, joint: bool
) -> Callable[[Tensor], Tensor]:
    """The projection to some channels of one part; of a joint layer only those rows are computed."""
    if not isinstance(layer, nn.Linear):
        return lambda x: layer(x)[..., channels]
    first = part * inner if joint else 0
    rows = slice(first + channels.start, first + channels.stop)
    return lambda x: F.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])


def _conv_at(u: Tensor, k: Tensor, tokens: Tensor) -> Tensor:
    """The zero-padded convolution at a few cells. u: (B, C, h, w); k: (C, 2 ry + 1, 2 rx + 1) -> (B, C, S)."""
    h, w = u.shape[-2:]
    ry, rx = k.shape[-2] // 2, k.shape[-1] // 2
    full = F.pad(k, (w - 1 - rx, w - 1 - rx, h - 1 - ry, h - 1 - ry)).flip(-2, -1)
    cells = [divmod(token, w) for token in tokens.tolist()]
    return torch.stack(
        [
            torch.einsum("chw,bchw->bc", full[:, h - 1 - i : 2 * h - 1 - i, w - 1 - j : 2 * w - 1 - j], u)
            for i, j in cells
        ],
        -1,
    )


def _linear_weights(q: Tensor, k: Tensor) -> Tensor:
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
    return weights / weights.sum(-1, keepdim=True)


def _weights(features: FeatureMaps, q: Tensor, k: Tensor, heads: slice = slice(None)) -> Tensor:
    """The weights of an operator's linear attention, (B, heads, S, L), from q and k, (B, heads, width, tokens)."""
    if features.kind == "elu":
        return _linear_weights(*(x.transpose(2, 3) * features.width**-0.25 for x in (q, k)))
    weights = features.query(q, heads).exp().transpose(-1, -2) @ features.key(k, heads).exp()
    return weights / weights.sum(-1, keepdim=True)


def _merge(heads: Tensor) -> Tensor:
    """(B, heads, S, head_dim) -> (B, S, D)."""
    return heads.transpose(1, 2).flatten(2)
