"""The long form: a global two-dimensional filter made by an MLP over relative coordinates, applied by FFT."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OperatorConfig
from ..ops import naive
from ..ops.fft import fast_length
from ..ops.long_conv import long_conv2d
from .causal import Sine
from .operator import Linear, Operator, Projection, Size, copy_projections

BANDS = 4  # octaves of the coordinate features along each axis
FASTEST, SLOWEST = 16.0, 0.5  # decay rates per trained extent across the channels at the start


class ImplicitFilter(nn.Module):
    """``K_c(dy, dx) = MLP_c(features(dy, dx)) * exp(-|rate_c| r)``, sampled on any grid.

    Offsets run over (-1, 1) per axis on every grid, so the trained filter is stretched over a larger one; dividing by
    the ratio of areas keeps its sum. No parameter depends on the resolution. Sine MLP after
    https://arxiv.org/abs/2302.10866; the 2-D coordinate grid after HyenaPixel, https://arxiv.org/abs/2402.19305.

    Args:
        channels: kernels to make.
        order: width of the MLP.
        extent: (h, w) of the training grid, in latent cells.
    """

    def __init__(self, channels: int, order: int, extent: Size) -> None:
        super().__init__()
        self.extent = extent
        features = 3 + 4 * BANDS
        self.mlp = nn.Sequential(nn.Linear(features, order), Sine(order), nn.Linear(order, order), Sine(order))
        self.head = nn.Linear(order, channels)
        self.rate = nn.Parameter(torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), channels))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, grid: Size) -> Tensor:
        """(C, 2 h - 1, 2 w - 1), centre tap at offset (0, 0). Coordinates are float32 at least: in half precision
        neighbouring cells of a large grid are the same."""
        dtype = torch.promote_types(self.rate.dtype, torch.float32)
        axes = [torch.arange(1 - n, n, device=self.rate.device, dtype=dtype) / n for n in grid]
        y, x = torch.meshgrid(*axes, indexing="ij")
        distance = torch.sqrt(y * y + x * x)
        octaves = math.pi * 2.0 ** torch.arange(BANDS, device=y.device, dtype=dtype)
        waves = torch.cat([y[..., None] * octaves, x[..., None] * octaves], dim=-1)
        features = torch.cat([torch.stack([y, x, distance], -1), waves.sin(), waves.cos()], dim=-1)
        taps = self.head(self.mlp(features.to(self.rate.dtype))).to(dtype)
        area = self.extent[0] * self.extent[1] / (grid[0] * grid[1])
        return (taps * torch.exp(-self.rate.to(dtype).abs() * distance[..., None]) * area).permute(2, 0, 1)


class LongConvolution(Operator):
    """``y = out(g_0 (K ** u + bias u + gain mean(u)))``, u = g_1 v, g_i = 1 + s_i x_i: Hyena of order 2 with a
    non-causal filter over the grid. x_0, x_1 and v are projections after a depthwise short filter."""

    branches = ("long", "mean")

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__(config)
        inner, taps = config.inner, config.hyena_short_filter_order
        if taps % 2 == 0:
            raise ValueError(f"hyena_short_filter_order must be odd, got {taps}")
        self.in_proj, self.out_proj = Linear(config.dim, 3 * inner), Linear(inner, config.dim)
        self.short_filter = nn.Conv2d(3 * inner, 3 * inner, taps, padding=taps // 2, groups=3 * inner)
        self.filter = ImplicitFilter(inner, config.hyena_filter_order, (config.height, config.width))
        self.gate = nn.Parameter(torch.zeros(2, inner))
        self.bias = nn.Parameter(torch.zeros(inner))
        self.gain = nn.Parameter(torch.ones(inner))
        nn.init.dirac_(self.short_filter.weight, groups=3 * inner)
        nn.init.zeros_(self.short_filter.bias)
        # A kernel has as many taps as the grid has cells, so a step of its last layer moves their sum that much
        # further than a step of a projection moves anything.
        self.rates = {"filter.head.": 1 / (config.height * config.width), "filter.mlp.": 1e-2}

    def run(self, x: Tensor, size: Size, projections: Iterable[Projection] | None) -> Tensor:
        x0, u = self._gated(x, size)
        y = self.bias[:, None, None] * u
        if self.off != "long":
            y = y + long_conv2d(u, self.filter(size)).to(u.dtype)
        if self.off != "mean":
            y = y + self.gain[:, None, None] * u.mean((-2, -1), keepdim=True)
        return self.out_proj((x0 * y).flatten(2).transpose(1, 2))

    def _gated(self, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """The output's gate, and v times the input's: (B, D, h, w) each."""
        planes = self.short_filter(self.in_proj(x).transpose(1, 2).unflatten(2, size))
        x0, x1, v = planes.chunk(3, dim=1)
        g0, g1 = (1 + s[:, None, None] * t for s, t in zip(self.gate, (x0, x1), strict=True))
        return g0, g1 * v

    def reference(self, x: Tensor, size: Size, tokens: Tensor, projections: Iterable[Projection] | None) -> Tensor:
        gate, u = self._gated(x, size)
        y = torch.cat([naive.conv2d(u, self.filter(size), token[None]) for token in tokens], dim=1)
        gate, own = (t.flatten(2)[..., tokens].transpose(1, 2) for t in (gate, u))
        return self.out_proj(gate * (y + self.bias * own + self.gain * u.mean((-2, -1))[:, None]))

    @torch.no_grad()
    def start_from(self, attention: nn.Module, records: Any) -> None:
        copy_projections(self, attention)

    def flops(self, size: Size) -> int:
        cells, n = size[0] * size[1], fast_length(2 * size[0] - 1) * fast_length(2 * size[1] - 1)
        transforms = int(5 * n * math.log2(n) + 3 * n)  # there and back, and the product between them
        short = 6 * cells * self.config.hyena_short_filter_order**2
        return self.inner_dim * (transforms + short + 8 * cells)
