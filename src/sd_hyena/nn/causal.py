"""The published Hyena operator: causal, one-dimensional over the row-major raster of latent cells.

Maths: "Hyena Hierarchy", https://arxiv.org/abs/2302.10866; parameter names and conventions follow
HazyResearch/safari, so that files written by the 2024 sd-hyena load unchanged. It is kept for those
files and for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OperatorConfig
from ..ops import fft, naive
from .operator import Operator, Projection, Size
from .teacher import projections_of


class Sine(nn.Module):
    """``sin(freq * x)`` with a learned frequency per feature."""

    def __init__(self, dim: int, freq: float = 1.0) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, dim), freq))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class PositionalEmbedding(nn.Module):
    """``z = [t, Re e^{-i f w}, Im e^{-i f w}]``. Learned in the original, hence its growth with l_max."""

    def __init__(self, emb_dim: int, l_max: int) -> None:
        super().__init__()
        bands = (emb_dim - 1) // 2
        angle = torch.linspace(0, 2 * math.pi * (l_max - 1) / l_max, l_max)[None, :, None]
        phase = torch.linspace(1e-4, bands - 1, bands)[None, None] * angle
        t = torch.linspace(0, 1, l_max)[None, :, None]
        self.z = nn.Parameter(torch.cat([t, torch.cos(phase), -torch.sin(phase)], dim=-1))
        self.register_buffer("t", t)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """z, (1, length, emb_dim), and t, (1, length, 1)."""
        return self.z[:, :length], self.t[:, :length]


class ExponentialModulation(nn.Module):
    """``exp(-|delta_c| t)`` per channel: fast to slow decay across the channels. Not learned."""

    def __init__(self, channels: int, fast_decay: float = 0.3, slow_decay: float = 1.5, target: float = 1e-2) -> None:
        super().__init__()
        rates = math.log(target) / slow_decay, math.log(target) / fast_decay
        self.register_buffer("deltas", torch.linspace(*rates, channels)[None, None])

    def forward(self, t: Tensor) -> Tensor:
        return torch.exp(-t * self.deltas.abs())


class HyenaFilter(nn.Module):
    """Implicit long filter: an MLP with sine activations over positions, times the modulation."""

    def __init__(self, channels: int, order: int, l_max: int, emb_dim: int = 3) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels))
        self.pos_emb = PositionalEmbedding(emb_dim, l_max)
        sine = Sine(order)  # one module in three places, as published: three names for one parameter
        self.implicit_filter = nn.Sequential(
            nn.Linear(emb_dim, order),
            sine,
            nn.Linear(order, order),
            sine,
            nn.Linear(order, order),
            sine,
            nn.Linear(order, channels, bias=False),
        )
        self.modulation = ExponentialModulation(channels)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """The filter's first ``length`` taps, (length, channels), and the shortcuts, (channels,)."""
        z, t = self.pos_emb(length)
        return (self.implicit_filter(z) * self.modulation(t))[0], self.bias


class HyenaOperator(Operator):
    """The causal Hyena operator with the original's hyper-parameters.

    ``y = out_proj(x_0 * v_N)``, ``v_{i+1} = conv(v_i * x_i) + bias * (v_i * x_i)``. The longest sequence is
    height * width of the configuration. With ``hyena_num_blocks`` the sequence is cut into that many blocks, each
    convolved on its own; lengths must be a multiple. As in the reference the filter then spans the whole sequence and
    is applied circularly at twice the block's length.

    Raises ValueError for hyper-parameters that do not fit together.
    """

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__(config)
        dim, order = config.dim, config.hyena_order
        self.l_max, self.order = config.height * config.width, order
        self.num_heads, self.num_blocks = config.hyena_num_heads, config.hyena_num_blocks
        if dim % self.num_heads:
            raise ValueError(f"{dim} channels cannot be split into {self.num_heads} heads")
        if self.l_max % self.num_blocks:
            raise ValueError(f"{self.l_max} tokens cannot be cut into {self.num_blocks} equal blocks")
        width, taps = dim * (order + 1), config.hyena_short_filter_order
        self.in_proj = nn.Linear(dim, width)
        self.short_filter = nn.Conv1d(width, width, taps, groups=width, padding=taps - 1)
        self.filter_fn = HyenaFilter(dim // self.num_heads * (order - 1), config.hyena_filter_order, self.l_max)
        self.out_proj = nn.Linear(dim, dim)

    def refuses(self, size: Size) -> str:
        """More tokens than it was built for are an error; the published code truncates the output instead."""
        length = size[0] * size[1]
        if length > self.l_max:
            return f"it was built for at most {self.l_max} tokens, not {length}: train one at this size"
        if length % self.num_blocks:
            return f"{length} tokens cannot be cut into {self.num_blocks} equal blocks"
        return ""

    def run(self, x: Tensor, size: Size, projections: Iterable[Projection] | None) -> Tensor:
        return self._compute(x, fft.causal_conv1d)

    def reference(self, x: Tensor, size: Size, tokens: Tensor, projections: Iterable[Projection] | None) -> Tensor:
        return self._compute(x, naive.causal_conv1d, tokens)

    def _compute(self, x: Tensor, conv: Any, tokens: Tensor | None = None) -> Tensor:
        length, head_dim = x.shape[1], self.dim // self.num_heads
        u = self.short_filter(self.in_proj(x).transpose(1, 2))[..., :length]
        u = u.unflatten(1, (self.num_heads, self.order + 1, head_dim))  # B H N+1 D/H L
        *gates, v = u.unbind(2)
        k, bias = self.filter_fn(length)
        k = k.T.unflatten(0, (head_dim, self.order - 1))  # D/H N-1 L
        bias = bias.unflatten(0, (head_dim, self.order - 1))
        for i, gate in enumerate(reversed(gates[1:])):
            v = v * gate
            some = tokens if i == self.order - 2 else None  # what is convolved again is needed everywhere
            v = self._conv(v, k[:, i], conv, some) + _at(v, some) * bias[:, i, None].to(v.dtype)
        y = (v * _at(gates[0], tokens)).flatten(1, 2).transpose(1, 2)
        return self.out_proj(y)

    def _conv(self, v: Tensor, k: Tensor, conv: Any, tokens: Tensor | None = None) -> Tensor:
        """v: (B, H, D/H, L), k: (D/H, L) -> (B, H, D/H, L), or only at ``tokens``."""
        if self.num_blocks == 1:
            return conv(v, k) if tokens is None else conv(v, k, tokens)
        blocks = v.unflatten(-1, (self.num_blocks, -1)).transpose(2, 3)  # B H Z D/H L/Z
        block = blocks.shape[-1]
        y = conv(blocks, k)
        # The reference's circular transform of length 2 * block folds taps beyond the block back in as
        # taps of negative lag: s > t sees k[2 * block + t - s]. Files trained that way rely on it.
        wrapped = k[:, block + 1 : 2 * block]
        y[..., :-1] += conv(blocks.flip(-1)[..., :-1], wrapped.flip(-1)).flip(-1)
        return _at(y.transpose(2, 3).flatten(-2), tokens)

    @torch.no_grad()
    def start_from(self, attention: nn.Module, records: Any) -> None:
        """What a causal operator can take from a teacher: its value and output projections. Gates start at 1."""
        value, out = attention.to_v, projections_of(attention).layers[3]
        gated = self.in_proj.weight.shape[0] - len(value.weight)
        self.in_proj.weight[:gated] = 0
        self.in_proj.weight[gated:] = value.weight
        self.in_proj.bias.zero_()
        self.in_proj.bias[:gated] = 1
        self.short_filter.weight.zero_()
        self.short_filter.weight[..., -1] = 1
        self.short_filter.bias.zero_()
        self.out_proj.weight.copy_(out.weight)
        self.out_proj.bias.copy_(torch.zeros_like(out.weight[:, 0]) if out.bias is None else out.bias)

    def flops(self, size: Size) -> int:
        cells, order = size[0] * size[1], self.order
        n = fft.fast_length(2 * cells)
        each = int(5 * n * math.log2(n) + 3 * n)
        short = 2 * cells * (order + 1) * self.config.hyena_short_filter_order
        return self.dim * (short + (order - 1) * each + 3 * order * cells)


def _at(x: Tensor, tokens: Tensor | None) -> Tensor:
    """x, (..., L), at ``tokens``."""
    return x if tokens is None else x[..., tokens]
