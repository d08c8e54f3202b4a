"""How layers project: any linear map that they are given, called as it is, or by its weights where it is plain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import linear

Projection = Callable[[Tensor], Tensor]


def wants_gradient(operator: nn.Module, x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether a gradient of this call may be asked for."""
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad or not all(isinstance(layer, nn.Module) for layer in projections):
        return True  # a function may hold parameters that want a gradient
    modules: tuple[Any, ...] = (operator, *projections)
    return any(p.requires_grad for module in modules for p in module.parameters())


def is_plain(layer: Any, kind: type[nn.Module]) -> bool:
    """Whether calling ``layer`` does what ``kind`` does and nothing else: no subclass, hook or wrapped forward."""
    return (
        type(layer) is kind
        and "forward" not in vars(layer)
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))
    )


def apply(layer: Projection, x: Tensor) -> Tensor:
    """``layer(x)``, by :func:`sd_hyena.ops.linear.project` if it is a plain ``nn.Linear``."""
    if is_plain(layer, nn.Linear):
        return linear.project(x, layer.weight, layer.bias)  # type: ignore[attr-defined]
    return layer(x)


def input_projection(layers: Sequence[Projection], x: Tensor, inner: int) -> Callable[[slice, slice, slice], Tensor]:
    """A function (images, channels, rows) -> (B, rows, w, (N + 1) C), computed when asked for if the layers
    are plain, or cut from the whole otherwise. x: (B, h, w, D)."""
    if all(is_plain(layer, nn.Linear) for layer in layers):
        pieces = [_pieces(layer, inner) for layer in layers]
        weights, biases = ([piece for layer in kind for piece in layer] for kind in zip(*pieces, strict=True))
        biased = any(bias is not None for bias in biases)

        def part(images: slice, channels: slice, rows: slice) -> Tensor:
            if len(layers) == 1 and channels == slice(0, inner):
                return linear.project(x[images, rows], layers[0].weight, layers[0].bias)  # type: ignore[attr-defined]
            weight = torch.cat([w[channels] for w in weights])
            nothing = weight.new_zeros(channels.stop - channels.start)
            bias = torch.cat([nothing if b is None else b[channels] for b in biases]) if biased else None
            return linear.project(x[images, rows], weight, bias)
    else:
        h, w = x.shape[1:3]
        whole = [p for layer in layers for p in layer(x.flatten(1, 2)).unflatten(1, (h, w)).split(inner, dim=-1)]

        def part(images: slice, channels: slice, rows: slice) -> Tensor:
            return torch.cat([p[images, rows, :, channels] for p in whole], dim=-1)

    return part


def _pieces(layer: Any, inner: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """A linear layer's weight and bias, cut into parts of ``inner`` rows."""
    weights = list(layer.weight.split(inner))
    return weights, [None] * len(weights) if layer.bias is None else list(layer.bias.split(inner))
