"""The definition in matrix products: differentiable, on any device, and what ``torch.compile`` sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..blocks import cut, join
from ..naive import features
from .call import Call, planes

NAME, CHECKED = "plain", False
GROUP = 2**19  # elements of q that are worked on at once on a CPU


def refuses(call: Call) -> str:
    return ""


def run(call: Call) -> Tensor:
    """Everything in float32 at least: sums over thousands of tokens are beyond half precision.

    On a CPU a few heads are worked on at a time, and a gradient computes them again instead of keeping them.
    """
    q, k, v, heads = call.q, call.k, call.v, call.q.shape[2]
    large = torch.compiler.is_compiling() or v.device.type != "cpu"
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    recompute = again if call.wants_gradient and not large else _call
    with torch.autocast(v.device.type, enabled=False):
        if large:
            mixed = _attend(call, call.weights, q, k, v)
        else:
            count = max(1, min(GROUP * heads // max(1, v.numel()), heads // 4))
            weights = [None] * heads if call.weights is None else call.weights.split(count)
            parts = zip(weights, *(t.split(count, dim=2) for t in (q, k, v)), strict=False)
            mixed = torch.cat([recompute(_attend, call, *part) for part in parts], dim=2)
    if call.near is not None:
        near = call.near(planes(v, call.size)).flatten(2).transpose(1, 2).view_as(mixed)
        mixed = mixed + near if large else mixed.add_(near)  # what was concatenated is nobody else's
    return mixed.flatten(2)


def _call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def _attend(call: Call, weights: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention of some heads with their states mixed over blocks; q, k, v: (B, L, G, d) -> the same."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    block = call.block or call.size
    one = torch.ones_like(v[..., :1], dtype=dtype)
    values = cut(torch.cat([v.to(dtype), one], dim=-1), call.size, block)  # beyond the grid the one is a zero
    queries, keys = (features(cut(t.to(dtype), call.size, block), call.feature_map) for t in (q, k))
    states = keys.transpose(-1, -2) @ values  # B G N d d+1
    if weights is not None:
        states = (weights.to(dtype) @ states.flatten(3)).view_as(states)
    y = join(queries @ states, call.size, block)
    return (y[..., :-1] / y[..., -1:]).to(v.dtype)
