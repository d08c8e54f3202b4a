"""Variations of the operator that the library does not have, because they did not earn a place in it.

Each changes a freshly built ``Hyena2D`` (or what surrounds its making) for one row of ``ablations.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sd_hyena.distill import optimisation
from sd_hyena.nn import Hyena2D, filter2d
from sd_hyena.nn.causal import Sine
from sd_hyena.nn.filter2d import ImplicitFilter2d


class _ShortFilter(nn.Conv2d):
    """An ordinary depthwise filter of a type of its own, so that the operator calls it on all channels at once and
    mixes as written here, not in the fused path."""


class _Variant(Hyena2D):
    """Gates and values as in ``Hyena2D``; subclasses say how a gate works and what is done with the product."""

    def gate_of(self, s: Tensor, x: Tensor) -> Tensor:
        return 1 + s * x

    def product(self, gate: Tensor, v: Tensor) -> Tensor:
        return gate * v

    def local(self, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], convolve: Callable) -> Tensor:
        return convolve(v, 0, slice(0, self.inner_dim))

    def combine(self, gate: Tensor, local: Tensor, attended: Tensor) -> Tensor:
        return gate * (local + attended)

    def _mix(self, channels: slice, convolve: Callable, *parts: Tensor, reference: bool = False) -> Tensor:
        q, k, v = self.short_filter(torch.cat(parts, dim=1)).chunk(3, dim=1)
        gates = [self.gate_of(s, x) for s, x in zip(self.gate.weight, (q, k), strict=True)]
        v = self.product(gates[1], v)
        y = self.local(q, k, v, gates, convolve)
        return self.combine(gates[0], y, self.gain.weight[0] * self.attend(q, k, v, slice(0, self.inner_dim)))


class SiluGates(_Variant):
    START = 1.2784645427610738  # SiLU of it is 1

    def gate_of(self, s: Tensor, x: Tensor) -> Tensor:
        return nn.functional.silu(self.START + s * x)


class NormalisedProduct(_Variant):
    """The gated product has each token's values' length: the gate turns it, and does not stretch it."""

    def product(self, gate: Tensor, v: Tensor) -> Tensor:
        product = gate * v
        lengths = [x.square().mean(1, keepdim=True).add(1e-6).sqrt() for x in (v, product)]
        return product * (lengths[0] / lengths[1])


class OuterProduct(_Variant):
    """Heads of WIDTH channels: ``sum_j g_0j (K ** (g_1j v))`` over the head's gates."""

    WIDTH = 4

    def product(self, gate: Tensor, v: Tensor) -> Tensor:
        return v

    def local(self, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], convolve: Callable) -> Tensor:
        b, d, h, w = v.shape
        left, right = (g.view(b, d // self.WIDTH, self.WIDTH, h, w) for g in gates)
        total = torch.zeros_like(v)
        for j in range(self.WIDTH):
            spread = [g[:, :, j : j + 1].expand(-1, -1, self.WIDTH, -1, -1).reshape(v.shape) for g in (left, right)]
            total = total + spread[0] * convolve(spread[1] * v, 0, slice(0, d)) / self.WIDTH
        return total

    def combine(self, gate: Tensor, local: Tensor, attended: Tensor) -> Tensor:
        return local + gate * attended  # the local part has met its gates


class PerHead(Hyena2D):
    """One kernel for each attention head, for all of its channels; built with as many channels to a kernel."""

    def kernels(
        self, grid: tuple[int, int], index: int, channels: slice, hidden: Tensor, rows: slice = slice(None)
    ) -> Tensor:
        own = torch.arange(channels.start, channels.stop) // (self.inner_dim // self.attention_heads)
        return self.filter(grid, own, hidden, rows)


class _FlatWindow(nn.Module):
    def forward(self, distance: Tensor, channels: Tensor | slice = slice(None)) -> Tensor:
        count = len(range(*channels.indices(self.channels))) if isinstance(channels, slice) else len(channels)
        return torch.ones(count, *distance.shape, dtype=distance.dtype)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels


class _GaussianWindow(filter2d.Window):
    def forward(self, distance: Tensor, channels: Tensor | slice = slice(None)) -> Tensor:
        return (-(self.rate[channels].to(distance.dtype)[:, None, None] * distance).square()).exp()


class _SiluFilter(ImplicitFilter2d):
    def _mlp(self, y: Tensor, x: Tensor) -> Tensor:
        y, x = torch.meshgrid(y, x, indexing="ij")
        octaves = torch.pi * 2.0 ** torch.arange(filter2d.BANDS, dtype=y.dtype)[:, None, None]
        waves = torch.cat([y * octaves, x * octaves])
        features = torch.cat([torch.stack([y, x, torch.sqrt(y * y + x * x)]), waves.sin(), waves.cos()]).flatten(1)
        for layer in self.mlp:
            silu = isinstance(layer, Sine)
            features = nn.functional.silu(layer.freq.T * features) if silu else self._linear(layer, features)
        return features.unflatten(1, y.shape)


def as_class(kind: type[Hyena2D]) -> Callable[[Hyena2D], None]:
    def change(operator: Hyena2D) -> None:
        operator.__class__ = kind
        operator.short_filter.__class__ = _ShortFilter

    return change


def per_head(operator: Hyena2D) -> None:
    if operator.num_heads * operator.attention_heads != operator.inner_dim:
        raise ValueError("needs as many channels to a kernel as a head has")
    fit, operator.__class__ = operator.filter.fit_, PerHead
    operator.num_heads = 1  # what is fitted comes by channel ...
    operator.filter.fit_ = lambda target: fit(
        target.unflatten(0, (operator.attention_heads, -1)).mean(1)
    )  # ... by head


def window(make: Callable[[int], nn.Module]) -> Callable[[Hyena2D], None]:
    def change(operator: Hyena2D) -> None:
        operator.filter.window = make(len(operator.filter.head.weight))

    return change


def silu_filter(operator: Hyena2D) -> None:
    operator.filter.__class__ = _SiluFilter


def no_gates(operator: Hyena2D) -> None:
    operator.gate.requires_grad_(False)  # they start at a factor of 1


flat_window, gaussian_window = window(_FlatWindow), window(_GaussianWindow)


@contextlib.contextmanager
def bands(count: int) -> Iterator[None]:
    """Within the block filters have ``count`` octaves of coordinate features."""
    before, filter2d.BANDS = filter2d.BANDS, count
    try:
        yield
    finally:
        filter2d.BANDS = before


@contextlib.contextmanager
def one_rate() -> Iterator[None]:
    """Within the block filters learn at the projections' rate."""
    before = optimisation.parameter_groups
    optimisation.parameter_groups = lambda operator, rate, decay: [
        {"params": list(operator.parameters()), "lr": rate, "weight_decay": 0.0}
    ]
    try:
        yield
    finally:
        optimisation.parameter_groups = before
