"""The implicit two-dimensional long filter: relative coordinates in, one kernel per channel out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .causal import Sine

SCALINGS = ("extend", "stretch")
BANDS = 4  # octaves of the coordinate features along each axis
BAND = 2**13  # taps whose features are computed at once at inference
FASTEST, SLOWEST = 16.0, 0.5  # decay rates per trained extent across the channels at the start


class Window(nn.Module):
    """``exp(-|rate_c| r)`` over distance r, with a learned rate per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), channels))

    def forward(self, distance: Tensor, channels: Tensor | slice = slice(None)) -> Tensor:
        """(C, *shape) from distances of that shape."""
        return (-self.rate[channels].to(distance.dtype).abs()[:, None, None] * distance).exp_()


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

    def hidden(self, grid: tuple[int, int]) -> Tensor:
        """The MLP's last hidden layer at every offset, (order, 2 ry + 1, 2 rx + 1), shared by all channels."""
        with torch.autocast(self.head.weight.device.type, enabled=False):
            y, x = self._axes(grid)
            if torch.is_grad_enabled() or y.device.type != "cpu":
                return self._mlp(y, x)
            hidden = y.new_empty(len(self.head.weight[0]), len(y), len(x))
            for band in torch.arange(len(y)).split(max(1, BAND // len(x))):  # in cache, band by band
                hidden[:, band[0] : band[-1] + 1] = self._mlp(y[band[0] : band[-1] + 1], x)
            return hidden

    def _mlp(self, y: Tensor, x: Tensor) -> Tensor:
        """(order, len(y), len(x)): the hidden layer at the offsets y by x, in units of the extent."""
        y, x = torch.meshgrid(y, x, indexing="ij")
        octaves = math.pi * 2.0 ** torch.arange(BANDS, device=y.device, dtype=y.dtype)[:, None, None]
        waves = torch.cat([y * octaves, x * octaves])
        features = torch.cat([torch.stack([y, x, torch.sqrt(y * y + x * x)]), waves.sin(), waves.cos()]).flatten(1)
        for layer in self.mlp:
            if isinstance(layer, Sine):
                features = torch.sin(layer.freq.to(features.dtype).T * features)
            else:
                features = self._linear(layer, features)
        return features.unflatten(1, y.shape)

    def forward(
        self,
        grid: tuple[int, int],
        channels: Tensor | slice = slice(None),
        hidden: Tensor | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """The kernels for an (h, w) grid: (C, 2 ry + 1, 2 rx + 1), centre tap at offset (0, 0).

        ``channels`` and ``rows`` pick some of them and some of their rows; ``hidden`` is :meth:`hidden` for
        ``grid``, if it is known already.
        """
        with torch.autocast(self.head.weight.device.type, enabled=False):
            if hidden is None:
                hidden = self.hidden(grid)
            y, x = self._axes(grid)
            window = self.window(torch.sqrt(y[rows, None] ** 2 + x**2), channels)
            amplitude = self._amplitude(grid)
            taps = self._linear(self.head, hidden[:, rows].flatten(1), channels, amplitude).view_as(window)
            return taps * window if torch.is_grad_enabled() else taps.mul_(window)

    def _axes(self, grid: tuple[int, int]) -> list[Tensor]:
        """Offsets per axis in units of the extent. At least float32: half-precision coordinates cannot
        tell neighbouring cells of a large grid apart."""
        like: dict[str, Any] = {
            "device": self.head.weight.device,
            "dtype": torch.promote_types(self.head.weight.dtype, torch.float32),
        }
        unit = self.extent if self.scaling == "extend" else grid
        return [torch.arange(-r, r + 1, **like) / n for r, n in zip(self.radius(grid), unit, strict=True)]

    @staticmethod
    def _linear(layer: nn.Linear, x: Tensor, rows: Tensor | slice = slice(None), scale: float = 1.0) -> Tensor:
        """(out, taps) from (in, taps)."""
        weight, bias = layer.weight[rows].to(x.dtype), layer.bias[rows].to(x.dtype)
        return torch.addmm(bias[:, None] * scale, weight * scale, x)

    def _amplitude(self, grid: tuple[int, int]) -> float:
        return 1.0 if self.scaling == "extend" else self.extent[0] * self.extent[1] / (grid[0] * grid[1])

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
        basis = nn.functional.pad(self.hidden(self.extent).flatten(1).T, (0, 1), value=1.0).double()
        y, x = self._axes(self.extent)
        window = self.window(torch.sqrt(y[:, None] ** 2 + x**2)).flatten(1).T.double()
        wanted = target.flatten(1).double().to(window.device)
        for c in range(len(wanted)):
            a = basis * window[:, c : c + 1]
            gram = a.T @ a
            gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            solution = torch.linalg.solve(gram, a.T @ wanted[c])
            self.head.weight[c], self.head.bias[c] = solution[:-1], solution[-1]
