"""``Hyena2D``: the non-causal two-dimensional Hyena operator, this project's own and its default."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import fft, linear, naive
from .filter2d import ImplicitFilter2d
from .spectrum_cache import SpectrumCache

FORMS = ("full", "core")
GLOBAL_BRANCHES = ("none", "mean", "linear")
Projection = Callable[[Tensor], Tensor]


class Scale(nn.Module):
    """A learned factor per row and channel, (rows, 1, dim, 1, 1)."""

    def __init__(self, rows: int, dim: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, 1, dim, 1, 1), value))


class Hyena2D(nn.Module):
    """Gated long convolutions over the latent grid plus a global branch, O(L log L), any h x w.

    With v and the gates g_i = 1 + s_i x_i taken from D -> (N + 1) D projections after a depthwise short
    filter, ``y = out(g_0 * (K ** u + bias * u + gain * global(u)))`` with u = g_{N-1} * v, where ``**`` is
    a zero-padded 2-D convolution. Orders above 2 repeat ``v <- K_i ** (g_i v) + bias_i g_i v`` first. No
    parameter depends on the resolution.

    ``full`` owns its projections. ``core`` (order 2) runs on the teacher's ``to_q``, ``to_k``, ``to_v``
    and ``to_out``, which the caller passes: LoRA weights on those keep working.

    The global branch carries the flat part of an attention map, which a decaying kernel cannot:
    ``mean`` adds ``gain * mean(u)``; ``linear`` adds ``gain *`` linear attention of (x_0, x_{N-1}, u),
    the same idea weighted by content; ``none`` adds nothing.

    Args:
        dim: channels D of input and output.
        inner_dim: width of the projections, ``dim`` unless given.
        extent: (h, w) latent cells of the training grid, the filter's unit of length.
        num_heads: groups of channels that share long filters.
        attention_heads: heads of the ``linear`` branch.
        scaling: how the filter grows to other grids, see :class:`ImplicitFilter2d`.
        in_bias: whether ``in_proj`` has a bias (SD's attention has none).

    Raises ValueError for hyper-parameters that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        *,
        extent: tuple[int, int] = (64, 64),
        inner_dim: int | None = None,
        order: int = 2,
        filter_order: int = 64,
        num_heads: int = 1,
        attention_heads: int = 8,
        short_filter_order: int = 3,
        form: str = "full",
        global_branch: str = "linear",
        scaling: str = "stretch",
        in_bias: bool = True,
    ) -> None:
        super().__init__()
        inner = inner_dim or dim
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {form!r}")
        if global_branch not in GLOBAL_BRANCHES:
            raise ValueError(f"global_branch must be one of {GLOBAL_BRANCHES}, got {global_branch!r}")
        if order < 2 or (form == "core" and order != 2):
            raise ValueError(f"order must be {'2 in core form' if form == 'core' else 'at least 2'}, got {order}")
        if inner % num_heads:
            raise ValueError(f"{inner} channels cannot be split into {num_heads} heads")
        if global_branch == "linear" and inner % attention_heads:
            raise ValueError(f"{inner} channels cannot be split into {attention_heads} attention heads")
        if short_filter_order < 1 or short_filter_order % 2 == 0:
            raise ValueError(f"short_filter_order must be odd, got {short_filter_order}")
        self.dim, self.inner_dim, self.order, self.form = dim, inner, order, form
        self.num_heads, self.attention_heads, self.global_branch = num_heads, attention_heads, global_branch
        width = inner * (order + 1)
        if form == "full":
            self.in_proj = nn.Linear(dim, width, bias=in_bias)
            self.out_proj = nn.Linear(inner, dim)
        self.short_filter = nn.Conv2d(width, width, short_filter_order, padding=short_filter_order // 2, groups=width)
        self.filter = ImplicitFilter2d(inner // num_heads * (order - 1), filter_order, extent, scaling)
        self.gate = Scale(order, inner, 1.0)
        self.bias = Scale(order - 1, inner, 0.0)
        if global_branch != "none":
            self.gain = Scale(1, inner, 1.0)
        self._spectra = SpectrumCache()
        self.reset_short_filter()

    @torch.no_grad()
    def reset_short_filter(self) -> None:
        """Makes the short filter the identity: it starts as what the projections say."""
        nn.init.dirac_(self.short_filter.weight, groups=self.short_filter.groups)
        self.short_filter.bias.zero_()

    def forward(self, x: Tensor, size: tuple[int, int], projections: Sequence[Projection] | None = None) -> Tensor:
        """x: (B, h * w, D), row-major over the grid; size: (h, w). Returns (B, h * w, D).

        ``core`` needs ``projections`` = (to_q, to_k, to_v, to_out); ``full`` takes none. Raises ValueError
        if that or the token count does not fit.
        """
        h, w = size
        if x.shape[1] != h * w:
            raise ValueError(f"{x.shape[1]} tokens are not a {h} x {w} grid")
        if (projections is None) != (self.form == "full"):
            need = (
                "runs on the teacher's projections: attach it to its UNet"
                if self.form == "core"
                else "has its own projections"
            )
            raise ValueError(f"a {self.form} operator {need}")
        if projections is None:
            u, out = self.in_proj(x), self.out_proj
        else:
            *inputs, out = projections
            u = torch.cat([project(x) for project in inputs], dim=-1)
        y = self.mix(u.transpose(1, 2).unflatten(2, (h, w)))
        return out(y.flatten(2).transpose(1, 2))

    def mix(self, u: Tensor, *, reference: bool = False) -> Tensor:
        """Everything between the projections. u: (B, (N + 1) D, h, w), gates first, v last -> (B, D, h, w).

        ``reference`` uses the O(L^2) definitions of the convolution and of linear attention.
        """
        u = self.short_filter(u)
        *x, v = u.chunk(self.order + 1, dim=1)
        gates = [1 + s.to(g.dtype) * g for s, g in zip(self.gate.weight, x, strict=True)]
        for i in range(1, self.order):
            v = gates[i] * v
            y = self._long_conv(v, i - 1, reference) + self.bias.weight[i - 1].to(v.dtype) * v
            if i == self.order - 1 and self.global_branch != "none":
                y = y + self.gain.weight[0].to(v.dtype) * self._global(x[0], x[-1], v, reference)
            v = y
        return gates[0] * v

    def _global(self, q: Tensor, k: Tensor, u: Tensor, reference: bool) -> Tensor:
        if self.global_branch == "mean":
            return u.mean((-2, -1), keepdim=True)
        attend = naive.linear_attention if reference else linear.linear_attention
        # The same temperature as softmax attention, so that a teacher's q and k mean the same here.
        scale = (self.inner_dim // self.attention_heads) ** -0.25
        heads = [t.unflatten(1, (self.attention_heads, -1)).flatten(3) for t in (q * scale, k * scale, u)]
        return attend(*heads).reshape(u.shape)

    def _long_conv(self, u: Tensor, index: int, reference: bool) -> Tensor:
        grid = (u.shape[-2], u.shape[-1])
        if reference:
            return naive.conv2d(u, self._kernels(grid, index).to(u.dtype))
        return fft.conv2d(u, self._spectrum(grid, index), self.filter.radius(grid))

    def _kernels(self, grid: tuple[int, int], index: int) -> Tensor:
        kernels = self.filter(grid).chunk(self.order - 1)[index]
        return kernels.repeat(self.num_heads, 1, 1)

    def _spectrum(self, grid: tuple[int, int], index: int) -> Tensor:
        def compute() -> Tensor:
            return fft.kernel_spectrum(self._kernels(grid, index), grid)

        key = (grid, index, self.filter.scaling)
        return self._spectra.get(key, self.filter.parameters(), grid[0] * grid[1], compute)
