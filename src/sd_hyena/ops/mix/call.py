"""What a path is asked to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """``y = near(v) + f(q) . (T S) / f(q) . (T n)`` with the blocks' states S = sum f(k) v, n = sum f(k).

    q, k, v: (B, L, H, d); size: (h, w) with h w = L; feature_map: f, see :func:`sd_hyena.ops.naive.features`; block:
    (rows, columns) of the blocks, and weights: T, (H, blocks, blocks), or None for both: all is one block; near: a
    depthwise filter, (B, D, h, w) to the same, that sees ``reach`` cells around each, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    size: tuple[int, int]
    feature_map: str
    block: tuple[int, int] | None = None
    weights: Tensor | None = None
    near: Callable[[Tensor], Tensor] | None = None
    reach: int = 0

    @property
    def wants_gradient(self) -> bool:
        """Whether a gradient of this call may be asked for."""
        given = [self.q, self.k, self.v, *([] if self.weights is None else [self.weights])]
        given += self.near.parameters() if isinstance(self.near, nn.Module) else []
        return torch.is_grad_enabled() and any(t.requires_grad for t in given)


def planes(v: Tensor, size: tuple[int, int]) -> Tensor:
    """v, (B, h w, H, d), as (B, H d, h, w), channels-last in memory, for which oneDNN is fast."""
    return v.reshape(len(v), *size, -1).permute(0, 3, 1, 2)  # a batch of one, too, with strides that say so
