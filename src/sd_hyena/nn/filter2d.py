"""The implicit two-dimensional long filter: relative coordinates in, one kernel per channel out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .causal import Sine

SCALINGS = ("extend", "stretch")
BANDS = 4  # octaves of the coordinate features along each axis
FASTEST, SLOWEST = 16.0, 0.5  # decay rates per trained extent across the channels at the start


class Window(nn.Module):
    """``exp(-|rate_c| r)`` over distance r, with a learned rate per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), channels))

    def forward(self, distance: Tensor) -> Tensor:
        return torch.exp(-distance[..., None] * self.rate.to(distance.dtype).abs())


class ImplicitFilter2d(nn.Module):
    """``K_c(dy, dx) = MLP_c(features(dy, dx)) * exp(-|rate_c| r)``, sampled on any grid.

    No parameter depends on the resolution. Coordinates are in units of the trained extent (``extent`` =
    (h, w) latent cells), so offsets run over (-1, 1) per axis on the trained grid. Two ways to a larger
    grid: ``extend`` keeps one coordinate step per cell and gives the kernel no taps beyond the offsets it
    was trained on; ``stretch`` spreads the trained extent over the whole grid (and divides by the area
    ratio, so that a kernel's sum is kept). Sine MLP after https://arxiv.org/abs/2302.10866; the 2-D
    coordinate grid after HyenaPixel, https://arxiv.org/abs/2402.19305.

    Args:
        channels: kernels to make.
        order: width of the MLP.
        extent: (h, w) of the training grid, in latent cells.
        scaling: "extend" or "stretch".
    """

    def __init__(self, channels: int, order: int, extent: tuple[int, int], scaling: str = "stretch") -> None:
        super().__init__()
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {SCALINGS}, got {scaling!r}")
        self.extent, self.scaling = (extent[0], extent[1]), scaling
        features = 3 + 4 * BANDS
        self.mlp = nn.Sequential(nn.Linear(features, order), Sine(order), nn.Linear(order, order), Sine(order))
        self.head = nn.Linear(order, channels)
        self.window = Window(channels)

    def radius(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Largest offset per axis, in cells, that a kernel for ``grid`` has a tap for."""
        reach = self.extent if self.scaling == "extend" else grid
        return min(grid[0], reach[0]) - 1, min(grid[1], reach[1]) - 1

    def _coordinates(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Features (2 ry + 1, 2 rx + 1, F) and distances (2 ry + 1, 2 rx + 1), in units of the extent."""
        like = {"device": self.head.weight.device, "dtype": self._dtype}
        unit = self.extent if self.scaling == "extend" else grid
        axes = [torch.arange(-r, r + 1, **like) / n for r, n in zip(self.radius(grid), unit, strict=True)]
        y, x = torch.meshgrid(*axes, indexing="ij")
        distance = torch.sqrt(y * y + x * x)
        octaves = math.pi * 2.0 ** torch.arange(BANDS, **like)
        waves = torch.stack([y, x], -1)[..., None] * octaves
        features = torch.cat([torch.stack([y, x, distance], -1), waves.sin().flatten(-2), waves.cos().flatten(-2)], -1)
        return features, distance

    @property
    def _dtype(self) -> torch.dtype:
        """At least float32: half-precision coordinates cannot tell neighbouring cells of a large grid apart."""
        return torch.promote_types(self.head.weight.dtype, torch.float32)

    def _mlp(self, features: Tensor) -> Tensor:
        for layer in self.mlp:
            if isinstance(layer, Sine):
                features = torch.sin(layer.freq.to(self._dtype) * features)
            else:
                features = self._linear(layer, features)
        return features

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, layer.weight.to(self._dtype), layer.bias.to(self._dtype))

    def _amplitude(self, grid: tuple[int, int]) -> float:
        return 1.0 if self.scaling == "extend" else self.extent[0] * self.extent[1] / (grid[0] * grid[1])

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """The kernels for an (h, w) grid: (channels, 2 ry + 1, 2 rx + 1), centre tap at offset (0, 0)."""
        with torch.autocast(self.head.weight.device.type, enabled=False):
            features, distance = self._coordinates(grid)
            taps = self._linear(self.head, self._mlp(features)) * self.window(distance)
        return taps.permute(2, 0, 1) * self._amplitude(grid)

    @torch.no_grad()
    def zero_(self) -> None:
        """Makes every kernel zero."""
        self.head.weight.zero_()
        self.head.bias.zero_()

    @torch.no_grad()
    def fit_(self, target: Tensor, ridge: float = 1e-6) -> None:
        """Fits the kernels on the trained grid to ``target`` (channels, 2h - 1, 2w - 1).

        The kernel is linear in the MLP's last layer, so this is one ridge regression per channel.
        """
        features, distance = self._coordinates(self.extent)
        basis = torch.nn.functional.pad(self._mlp(features), (0, 1), value=1.0).flatten(0, 1).double()
        window = self.window(distance).flatten(0, 1).double()
        wanted = target.flatten(1).double().to(window.device)
        for c in range(len(wanted)):
            a = basis * window[:, c : c + 1]
            gram = a.T @ a
            gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            solution = torch.linalg.solve(gram, a.T @ wanted[c])
            self.head.weight[c], self.head.bias[c] = solution[:-1], solution[-1]
