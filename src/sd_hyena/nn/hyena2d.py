"""``Hyena2D``: the non-causal two-dimensional Hyena operator, this project's own and its default."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import dispatch, long_conv, naive
from . import chunked, compiled, fused
from .filter2d import ImplicitFilter2d
from .linear_attention import FeatureMaps
from .projections import Projection, apply, input_projection, is_plain
from .spectrum_cache import SpectrumCache

FORMS = ("full", "core")
GLOBAL_BRANCHES = ("none", "mean", "linear")
Convolution = Callable[[Tensor, int, slice], Tensor]
GROUP = {"cpu": 11 * 2**17, "other": 2**28}  # elements between the projections that are mixed at once
SMALL_CELLS = 64 * 64  # of smaller grids all spectra are kept between calls
MEMORY = 4.8  # times its input that a layer may take at inference, what is kept included


@dataclass(frozen=True)
class MemoryPlan:
    """What a layer keeps between calls at inference: the spectra of so many channels, and if those are not all,
    the hidden layer that the others are made from."""

    channels: int
    keep_hidden: bool


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
        feature_map, num_features: of the ``linear`` branch, see :class:`FeatureMaps`.
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
        feature_map: str = "exp",
        num_features: int = 2,
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
        if global_branch == "linear":
            self.features = FeatureMaps(attention_heads, inner // attention_heads, feature_map, num_features)
        self.spectra = SpectrumCache()
        self.key = compiled.register(self)
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
        *inputs, out = (self.in_proj, self.out_proj) if projections is None else projections
        if torch.compiler.is_compiling():
            return compiled.forward(self, x, size, inputs, out)
        if fused.suits(self, x, (*inputs, out)):
            return fused.forward(self, x, size, inputs, out)
        if chunked.suits(self, x, (*inputs, out)):
            return chunked.forward(self, x, size, inputs, out)
        return apply(out, self._mix_in_groups(x, size, inputs).flatten(2).transpose(1, 2))

    def _mix_in_groups(self, x: Tensor, size: tuple[int, int], inputs: Sequence[Projection]) -> Tensor:
        """Projects and mixes some channels at a time: (B, D, h, w).

        A gradient recomputes a group instead of keeping what it made, its projections and kernels included:
        between calls only the layer's input and the result exist whole.
        """
        cells, elements = len(x) * size[0] * size[1], GROUP["cpu" if x.device.type == "cpu" else "other"]
        groups = self.channel_groups(elements // (cells * (self.order + 1)), least=32)
        if not is_plain(self.short_filter, nn.Conv2d):
            groups = [slice(0, self.inner_dim)]  # it may do more than its weights say: it is called, on everything
        project = input_projection(inputs, x.unflatten(1, size), self.inner_dim)

        def mix(channels: slice, convolve: Convolution) -> Tensor:
            u = project(slice(None), channels, slice(None)).permute(0, 3, 1, 2)
            return self._mix(channels, convolve, *u.chunk(self.order + 1, dim=1))

        if not torch.is_grad_enabled():
            workspace: dict[int | str, Tensor] = {}
            kept = partial(self.convolve_kept, workspace=workspace)
            mixed = [mix(channels, kept) for channels in groups]
        elif len(groups) == 1:
            mixed = [mix(groups[0], partial(self._convolve, self.filter.hidden(size)))]
        else:
            recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            hidden = recompute(self.filter.hidden, size)

            def mix_from(hidden: Tensor, channels: slice) -> Tensor:
                return mix(channels, partial(self._convolve, hidden))

            mixed = [recompute(mix_from, hidden, channels) for channels in groups]
        return torch.cat(mixed, dim=1) if len(mixed) > 1 else mixed[0]

    def mix(self, u: Tensor, *, reference: bool = False) -> Tensor:
        """Everything between the projections. u: (B, (N + 1) D, h, w), gates first, v last -> (B, D, h, w).

        ``reference`` uses the O(L^2) definitions of the convolution and of linear attention.
        """
        hidden = self.filter.hidden((u.shape[-2], u.shape[-1]))
        convolve = partial(self._convolve, hidden, reference=reference)
        parts = u.chunk(self.order + 1, dim=1)
        return self._mix(slice(0, self.inner_dim), convolve, *parts, reference=reference)

    def _mix(self, channels: slice, convolve: Convolution, *parts: Tensor, reference: bool = False) -> Tensor:
        """:meth:`mix` for some channels of the N + 1 parts, (B, C, h, w) each -> (B, C, h, w)."""
        if is_plain(self.short_filter, nn.Conv2d):
            *x, v = [self.filter_short(u, part, channels) for part, u in enumerate(parts)]
        else:
            *x, v = self.short_filter(torch.cat(parts, dim=1)).chunk(self.order + 1, dim=1)
        return self.gate_and_convolve((*x, v), channels, convolve, reference)

    def gate_and_convolve(
        self, parts: Sequence[Tensor], channels: slice, convolve: Convolution, reference: bool = False
    ) -> Tensor:
        """What follows the short filter, for some channels of the N + 1 parts, (B, C, h, w) each -> (B, C, h, w)."""
        *x, v = parts
        gates = [1 + s[:, channels].to(g.dtype) * g for s, g in zip(self.gate.weight, x, strict=True)]
        for i in range(1, self.order):
            v = gates[i] * v
            y = convolve(v, i - 1, channels)
            if i == self.order - 1 and self.global_branch == "linear":
                attended = self.attend(x[0], x[-1], v, channels, reference)
                y = y + self.gain.weight[0, :, channels].to(v.dtype) * attended
            v = y
        return gates[0] * v

    def _convolve(self, hidden: Tensor, v: Tensor, index: int, channels: slice, reference: bool = False) -> Tensor:
        """Convolution ``index`` with its shortcuts, differentiable: (B, C, h, w) -> (B, C, h, w)."""
        convolve = naive.long_conv2d if reference else long_conv.long_conv2d
        grid = (v.shape[-2], v.shape[-1])
        return convolve(v, self.kernels(grid, index, channels, hidden), *self.shortcuts(index, channels))

    def convolve_kept(self, v: Tensor, index: int, channels: slice, workspace: dict[int | str, Tensor]) -> Tensor:
        """:meth:`_convolve` at inference, with spectra kept between calls."""
        grid = (v.shape[-2], v.shape[-1])
        radius = self.filter.radius(grid)
        backend = dispatch.choose(dispatch.Case(v.device, v.dtype, grid, radius, self.global_branch == "mean"))
        spectrum = self.spectrum(grid, index, channels, self.keep_all(), workspace, backend)
        return backend.convolve(v.contiguous(), spectrum, radius)

    def parameters_of_filter(self) -> list[nn.Parameter]:
        """What the long filters' spectra are made from."""
        gain = list(self.gain.parameters()) if self.global_branch != "none" else []
        return [*self.filter.parameters(), self.bias.weight, *gain]

    def filter_short(self, u: Tensor, part: int, channels: slice) -> Tensor:
        """The short filter on some channels of one of the N + 1 parts: (B, C, h, w)."""
        rows = slice(part * self.inner_dim + channels.start, part * self.inner_dim + channels.stop)
        short = self.short_filter
        weight, bias = short.weight[rows], short.bias[rows]
        return nn.functional.conv2d(u, weight, bias, padding=short.padding, groups=len(weight))

    def attend(self, q: Tensor, k: Tensor, u: Tensor, channels: slice, reference: bool = False) -> Tensor:
        """The ``linear`` branch on ``channels`` of whole heads. q, k, u: (B, C, h, w) -> (B, C, h, w)."""
        width = self.inner_dim // self.attention_heads
        heads = slice(channels.start // width, channels.stop // width)
        parts = [t.unflatten(1, (-1, width)).flatten(3) for t in (q, k, u)]
        return self.features(*parts, heads, reference).reshape(u.shape)

    def channel_groups(self, channels: int, least: int = 40) -> list[slice]:
        """Even, consecutive groups of at most that many channels, but at least ``least``, and of whole heads
        where the ``linear`` branch needs them."""
        unit = self.inner_dim // self.attention_heads if self.global_branch == "linear" else 8
        most = max(channels, least) // unit * unit or unit
        size = -(-self.inner_dim // -(-self.inner_dim // most) // unit) * unit
        return [slice(c, min(c + size, self.inner_dim)) for c in range(0, self.inner_dim, size)]

    def shortcuts(self, index: int, channels: slice) -> tuple[Tensor, Tensor]:
        """Convolution ``index``'s bias, and the gain of its mean (zero unless that is the global branch)."""
        bias = self.bias.weight[index, 0, channels, 0, 0]
        if self._has_mean(index):
            return bias, self.gain.weight[0, 0, channels, 0, 0]
        return bias, torch.zeros_like(bias)

    def _has_mean(self, index: int) -> bool:
        return self.global_branch == "mean" and index == self.order - 2

    def kernels(
        self, grid: tuple[int, int], index: int, channels: slice, hidden: Tensor, rows: slice = slice(None)
    ) -> Tensor:
        """Convolution ``index``'s kernels for some channels, or some of their rows: (C, 2 ry + 1, 2 rx + 1)."""
        shared = self.inner_dim // self.num_heads
        first = index * shared
        if self.num_heads == 1:
            return self.filter(grid, slice(first + channels.start, first + channels.stop), hidden, rows)
        own = torch.arange(channels.start, channels.stop, device=hidden.device) % shared
        return self.filter(grid, own + first, hidden, rows)

    def spectrum(
        self,
        grid: tuple[int, int],
        index: int,
        channels: slice,
        plan: MemoryPlan,
        workspace: dict[int | str, Tensor],
        backend: dispatch.Backend = dispatch.FFT,
    ) -> Tensor:
        """The spectrum that ``backend`` needs for some channels at inference.

        workspace: memory that one call uses again and again for what is not kept.
        """
        (ry, rx), count = self.filter.radius(grid), channels.stop - channels.start
        own = self.parameters_of_filter()
        self.spectra.check(grid, (self.filter.scaling, backend.name), own)

        def make(out: Tensor | None) -> Tensor:
            if "hidden" not in workspace:
                workspace["hidden"] = self.spectra.hidden(plan.keep_hidden, lambda: self.filter.hidden(grid))
            hidden = workspace["hidden"]
            kept = out is not None
            if not kept and index in workspace and len(workspace[index]) >= count:
                out = workspace[index][:count]

            def rows(band: slice) -> Tensor:
                return self.kernels(grid, index, channels, hidden, band)

            shape = count, 2 * ry + 1, 2 * rx + 1
            bias, gain = self.shortcuts(index, channels)
            if not self._has_mean(index):
                gain = None
            how = {"device": hidden.device}
            if kind.is_floating_point:
                how["dtype"] = kind
            made = backend.spectral.kernel_spectrum(rows, shape, grid, bias, gain, out, **how)
            if not kept and out is None:
                workspace[index] = made
            return made

        shape = backend.spectral.spectrum_shape(grid, (ry, rx))
        kind = backend.spectrum_dtype(own[0].dtype)
        like = self.filter.head.weight.new_empty((), dtype=kind)
        with torch.no_grad():
            return self.spectra.spectrum(index, channels, shape, plan.channels, like, make)

    def keep_all(self) -> MemoryPlan:
        """Keeps every spectrum: what a GPU does, where making them again costs more than the rest of the layer."""
        return MemoryPlan(self.inner_dim, False)

    def plan_memory(
        self,
        grid: tuple[int, int],
        input_bytes: int,
        channels: int,
        chunk_bytes: int,
        backend: dispatch.Backend = dispatch.FFT,
    ) -> MemoryPlan:
        """What to keep between calls, so that all this layer takes stays below ``MEMORY`` times its input:
        attention takes five times.

        channels: worked on at once; chunk_bytes: what they take, besides their spectra, while they are.
        """
        size = backend.spectrum_dtype(torch.float32).itemsize
        each = size * math.prod(backend.spectral.spectrum_shape(grid, self.filter.radius(grid))) * (self.order - 1)
        free = int((MEMORY - 1) * input_bytes) - chunk_bytes
        if grid[0] * grid[1] < SMALL_CELLS or each * self.inner_dim <= free:
            return MemoryPlan(self.inner_dim, False)
        ry, rx = self.filter.radius(grid)
        hidden = 4 * (2 * ry + 1) * (2 * rx + 1) * self.filter.head.in_features
        return MemoryPlan(max(0, free - hidden - each * channels) // each, True)

    def train(self, mode: bool = True) -> Hyena2D:
        """As in any module; forgets kept spectra."""
        self.spectra.clear()
        return super().train(mode)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.key = compiled.register(self)  # a copy is a layer of its own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Hyena2D:
        self.spectra.clear()  # a layer that moves to another device leaves nothing behind
        return super()._apply(fn, recurse)
