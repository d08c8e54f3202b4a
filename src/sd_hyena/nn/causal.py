"""The published Hyena operator: causal, one-dimensional over the row-major raster of latent cells.

Maths: "Hyena Hierarchy", https://arxiv.org/abs/2302.10866; parameter names and conventions follow
HazyResearch/safari, so that files written by the 2024 sd-hyena load unchanged. It is kept for those
files and for comparison; :class:`sd_hyena.nn.Hyena2D` is what this project trains by default.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import fft, naive


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

    def forward(self, length: int) -> Tensor:
        """The filter's first ``length`` taps, (length, channels)."""
        z, t = self.pos_emb.z[:, :length], self.pos_emb.t[:, :length]
        return (self.implicit_filter(z) * self.modulation(t))[0]


class HyenaOperator(nn.Module):
    """The causal Hyena operator with the original's hyper-parameters.

    ``y = out_proj(x_0 * v_N)``, ``v_{i+1} = conv(v_i * x_i) + bias * (v_i * x_i)``.

    Args:
        dim: channels D.
        l_max: longest sequence, in tokens.
        order: N >= 2, giving N - 1 long convolutions.
        filter_order: width of the filter's MLP.
        num_heads: groups of channels that share filters; D must be a multiple.
        num_blocks: the sequence is cut into this many blocks, each convolved on its own; lengths must be
            a multiple. As in the reference the filter then spans the whole sequence and is applied
            circularly at twice the block's length.
        short_filter_order: taps of the causal depthwise convolution before the gates.

    Raises ValueError for hyper-parameters that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        l_max: int,
        order: int = 2,
        filter_order: int = 64,
        num_heads: int = 1,
        num_blocks: int = 1,
        short_filter_order: int = 3,
    ) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        if dim % num_heads:
            raise ValueError(f"{dim} channels cannot be split into {num_heads} heads")
        if l_max % num_blocks:
            raise ValueError(f"{l_max} tokens cannot be cut into {num_blocks} equal blocks")
        self.dim, self.l_max, self.order = dim, l_max, order
        self.num_heads, self.num_blocks = num_heads, num_blocks
        width = dim * (order + 1)
        self.in_proj = nn.Linear(dim, width)
        self.short_filter = nn.Conv1d(width, width, short_filter_order, groups=width, padding=short_filter_order - 1)
        self.filter_fn = HyenaFilter(dim // num_heads * (order - 1), filter_order, l_max)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, *, reference: bool = False) -> Tensor:
        """x: (B, L, D) -> (B, L, D). ``size`` = (h, w) with h * w = L is accepted for a uniform call.

        ``reference`` uses the O(L^2) definition of the convolution. Raises ValueError when L exceeds
        ``l_max`` (the published code truncates the output instead) or does not fit ``num_blocks``.
        """
        length = x.shape[1]
        if length > self.l_max:
            raise ValueError(
                f"this operator was built for at most {self.l_max} tokens, got {length}: train one at this size"
            )
        if length % self.num_blocks:
            raise ValueError(f"{length} tokens cannot be cut into {self.num_blocks} equal blocks")
        head_dim = self.dim // self.num_heads
        u = self.short_filter(self.in_proj(x).transpose(1, 2))[..., :length]
        u = u.unflatten(1, (self.num_heads, self.order + 1, head_dim))  # B H N+1 D/H L
        *gates, v = u.unbind(2)
        k = self.filter_fn(length).T.unflatten(0, (head_dim, self.order - 1))  # D/H N-1 L
        bias = self.filter_fn.bias.unflatten(0, (head_dim, self.order - 1))
        for i, gate in enumerate(reversed(gates[1:])):
            v = v * gate
            v = self._conv(v, k[:, i], reference) + v * bias[:, i, None].to(v.dtype)
        y = (v * gates[0]).flatten(1, 2).transpose(1, 2)
        return self.out_proj(y)

    def _conv(self, v: Tensor, k: Tensor, reference: bool) -> Tensor:
        """v: (B, H, D/H, L), k: (D/H, L) -> (B, H, D/H, L)."""
        conv = naive.causal_conv1d if reference else fft.causal_conv1d
        if self.num_blocks == 1:
            return conv(v, k)
        blocks = v.unflatten(-1, (self.num_blocks, -1)).transpose(2, 3)  # B H Z D/H L/Z
        block = blocks.shape[-1]
        y = conv(blocks, k)
        # The reference's circular transform of length 2 * block folds taps beyond the block back in as
        # taps of negative lag: s > t sees k[2 * block + t - s]. Files trained that way rely on it.
        wrapped = k[:, block + 1 : 2 * block]
        y[..., :-1] += conv(blocks.flip(-1)[..., :-1], wrapped.flip(-1)).flip(-1)
        return y.transpose(2, 3).flatten(-2)
