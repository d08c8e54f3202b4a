"""``Hyena2D`` inference on a CPU, a few channels at a time.

The same sums as :meth:`Hyena2D.forward`, which stays the definition, arranged so that all between input
and output lives in cache: project some channels of the gates and v, filter them while they are there,
gate, convolve, gate again into the result. The (N + 1) D wide tensor never exists; memory is the result
and one chunk. Tokens stay channels-last, as the layer gets them; only gated chunks are turned round for
the transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import long_conv
from .projections import Projection, apply, input_projection, is_plain, wants_gradient

if TYPE_CHECKING:
    from .hyena2d import Hyena2D

CHUNK = 2**21  # projected elements worked on at once, and at most half as many as the input has ...
SMALL = 2**18  # ... unless that is smaller than this: then calls cost more than memory
TILE = 2**13  # cells of a large grid projected at once
TRANSFORMS = 2**22  # bytes that the transforms of a few planes take
BLOCK = 2**12  # tokens whose output projection is computed at once


def suits(operator: Hyena2D, x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether this path can take the call: no gradient is wanted, and it is the CPU's to do."""
    plain = is_plain(operator.short_filter, nn.Conv2d) and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and plain and not wants_gradient(operator, x, projections)


def forward(
    operator: Hyena2D,
    x: Tensor,
    size: tuple[int, int],
    inputs: Sequence[Projection],
    out: Projection,
) -> Tensor:
    """As :meth:`Hyena2D.forward`, without gradients, by the given projections.

    x: (B, h * w, D) -> (B, h * w, D); size: (h, w).
    """
    with torch.no_grad():
        (b, _, _), (h, w), parts = x.shape, size, operator.order + 1
        cells = h * w
        project = input_projection(inputs, x.unflatten(1, size), operator.inner_dim)
        y = x.new_empty(b, h, w, operator.inner_dim)
        images = max(1, min(b, CHUNK // (cells * parts * operator.inner_dim)))
        most = CHUNK if x.numel() <= SMALL else min(CHUNK, x.numel() // 2)
        groups = operator.channel_groups(most // (cells * parts))
        workspace: dict[int | str, Tensor] = {}
        width = groups[0].stop
        projected = cells * parts * width * x.element_size()
        features = operator.features.multiple if operator.global_branch == "linear" else 0
        working = projected * (2 + features) + TRANSFORMS
        plan = operator.plan_memory(size, x.nbytes, width, working)
        for channels in groups:
            spectra = [operator.spectrum(size, i, channels, plan, workspace) for i in range(operator.order - 1)]
            short = _ShortFilter(operator, channels)
            for first in range(0, b, images):
                some = slice(first, first + images)
                _mix(operator, short, spectra, channels, partial(project, some, channels), y[some])
        return _project_out(out, y.view(b, cells, -1), x.shape[-1])


class _ShortFilter:
    """The short filter for some channels of all parts. Unless the ``linear`` branch wants to see the gates
    as they are, each comes out as the factor it is going to be, ``1 + s x``."""

    def __init__(self, operator: Hyena2D, channels: slice) -> None:
        layer, parts = operator.short_filter, operator.order + 1
        self.reach = layer.weight.shape[-1] // 2
        self.raw = operator.global_branch == "linear"
        weight = layer.weight.unflatten(0, (parts, -1))[:, channels]
        bias = layer.bias.unflatten(0, (parts, -1))[:, channels]
        self.scale = operator.gate.weight[:, 0, channels, 0, 0].to(weight.dtype)
        if not self.raw:
            unity = torch.ones_like(self.scale[:1])
            scale = torch.cat([self.scale, unity])
            weight = weight * scale[..., None, None, None]
            bias = bias * scale + torch.cat([torch.ones_like(self.scale), torch.zeros_like(unity)])
        self.weight, self.bias = weight.flatten(0, 1), bias.flatten()

    def __call__(self, z: Tensor) -> Tensor:
        """z: (B, h, w, (N + 1) C) -> the same shape."""
        y = nn.functional.conv2d(
            z.permute(0, 3, 1, 2), self.weight, self.bias, padding=self.reach, groups=len(self.weight)
        )
        return y.permute(0, 2, 3, 1)

    def factor(self, x: Tensor, index: int, in_place: bool = False) -> Tensor:
        """Gate ``index`` as a factor, (B, h, w, C)."""
        if not self.raw:
            return x
        return (x.mul_(self.scale[index]) if in_place else x * self.scale[index]).add_(1)


def _mix(
    operator: Hyena2D,
    short: _ShortFilter,
    spectra: Sequence[Tensor],
    channels: slice,
    project: Callable[[slice], Tensor],
    y: Tensor,
) -> None:
    """Fills ``channels`` of ``y``, (B, h, w, D), for the images that ``project`` projects rows of."""
    b, h, w, _ = y.shape
    radius = operator.filter.radius((h, w))
    *x, u = _gated(operator.order, short, project, (b, h, w))
    for i, spectrum in enumerate(spectra, start=1):
        if i > 1:
            u = u * short.factor(x[i], i)
        y_i = long_conv.convolve(u.permute(0, 3, 1, 2), spectrum, radius)
        if short.raw and i == operator.order - 1:
            q, k, values = (t.permute(0, 3, 1, 2) for t in (x[0], x[-1], u))
            attended = operator.attend(q, k, values, channels)
            y_i += attended.mul_(operator.gain.weight[0, 0, channels].to(y.dtype))
        u = y_i.permute(0, 2, 3, 1)
    torch.mul(u, short.factor(x[0], 0, in_place=True), out=y[..., channels])


def _gated(
    order: int, short: _ShortFilter, project: Callable[[slice], Tensor], shape: tuple[int, int, int]
) -> list[Tensor]:
    """The gates after the short filter, and v times the first that it meets: (B, h, w, C) each.

    A large grid is projected in bands of rows, with the rows around them that the short filter sees.
    """
    b, h, w = shape
    band = h if h * w <= 2 * TILE else max(1, TILE // w)
    parts: list[Tensor] = []
    for top in range(0, h, band):
        bottom = min(top + band, h)
        above, below = max(0, top - short.reach), min(h, bottom + short.reach)
        z = short(project(slice(above, below)))[:, top - above : bottom - above]
        *x, v = z.chunk(order + 1, dim=-1)
        v.mul_(short.factor(x[1], 1))
        if band == h:
            return [*x, v]
        if not parts:
            parts = [v.new_empty(b, h, w, v.shape[-1]) for _ in range(order + 1)]
        for whole, piece in zip(parts, (*x, v), strict=True):
            whole[:, top:bottom] = piece
    return parts


def _project_out(layer: Projection, y: Tensor, dim: int) -> Tensor:
    """The output projection, (B, L, inner) -> (B, L, dim), written over ``y`` block by block where it fits."""
    if not is_plain(layer, nn.Linear) or y.shape[-1] != dim:
        return apply(layer, y)
    for block in y.view(-1, dim).split(BLOCK):
        block.copy_(apply(layer, block))
    return y
