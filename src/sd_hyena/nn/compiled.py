"""``Hyena2D`` under ``torch.compile``: convolutions are operators that the compiler does not look into.

Everything else - projections, short filter, gates, linear attention - is left to the compiler, which has no code
for complex numbers. ``sd_hyena::long_filter`` is inference: it convolves as the layer does without compilation,
spectra kept between calls included. It holds a layer's key, not the layer, which has to live, with the parameters
it was compiled with, as long as the graph is used. ``sd_hyena::long_conv2d`` is training: the kernel is made in the
graph, the gradient is an operator of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..ops import long_conv

if TYPE_CHECKING:
    from .hyena2d import Hyena2D

_layers: WeakValueDictionary[int, Hyena2D] = WeakValueDictionary()
_keys = itertools.count()


def register(layer: Hyena2D) -> int:
    """A new key for a layer."""
    key = next(_keys)
    _layers[key] = layer
    return key


def forward(
    layer: Hyena2D,
    x: Tensor,
    size: tuple[int, int],
    inputs: Sequence[Callable[[Tensor], Tensor]],
    out: Callable[[Tensor], Tensor],
) -> Tensor:
    """As :meth:`Hyena2D.forward`, traceable as one graph."""
    projected = torch.cat([project(x) for project in inputs], dim=-1).transpose(1, 2).unflatten(2, size)
    parts = layer.short_filter(projected).chunk(layer.order + 1, dim=1)
    everything = slice(0, layer.inner_dim)
    if torch.is_grad_enabled():
        hidden = layer.filter.hidden(size)

        def convolve(v: Tensor, index: int, channels: slice) -> Tensor:
            k = layer.kernels(size, index, channels, hidden)
            return torch.ops.sd_hyena.long_conv2d(v, k, *layer.shortcuts(index, channels))
    else:
        parameters = layer.parameters_of_filter()

        def convolve(v: Tensor, index: int, channels: slice) -> Tensor:
            return torch.ops.sd_hyena.long_filter(v, parameters, layer.key, index)

    return out(layer.gate_and_convolve(parts, everything, convolve).flatten(2).transpose(1, 2))


@torch.library.custom_op("sd_hyena::long_filter", mutates_args=())
def long_filter(u: Tensor, parameters: list[Tensor], key: int, index: int) -> Tensor:
    """Convolution ``index`` of the layer with that key, with its shortcuts: u (B, D, h, w) -> the same."""
    layer = _layers[key]
    return layer.convolve_kept(u, index, slice(0, layer.inner_dim), {}).contiguous()


@long_filter.register_fake
def _(u: Tensor, parameters: list[Tensor], key: int, index: int) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("sd_hyena::long_conv2d", mutates_args=())
def long_conv2d(u: Tensor, k: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """:func:`sd_hyena.ops.long_conv.long_conv2d`."""
    radius = k.shape[-2] // 2, k.shape[-1] // 2
    spectrum = long_conv.kernel_spectrum(k, k.shape, (u.shape[-2], u.shape[-1]), bias, gain)
    return long_conv.convolve(u, spectrum, radius).contiguous()


@long_conv2d.register_fake
def _(u: Tensor, k: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("sd_hyena::long_conv2d_backward", mutates_args=())
def long_conv2d_backward(grad: Tensor, u: Tensor, k: Tensor, bias: Tensor, gain: Tensor) -> list[Tensor]:
    """The gradients of u, k, bias and gain."""
    return [g.contiguous() for g in long_conv.gradients(grad, u, k, bias, gain) if g is not None]


@long_conv2d_backward.register_fake
def _(grad: Tensor, u: Tensor, k: Tensor, bias: Tensor, gain: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, k, bias, gain)]


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return tuple(torch.ops.sd_hyena.long_conv2d_backward(grad, *ctx.saved_tensors))


long_conv2d.register_autograd(_backward, setup_context=_keep)
