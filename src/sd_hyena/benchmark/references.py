"""What attention should return at a few tokens, from the definition, in float64; operators know their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..nn.teacher import Projections
from ..ops import naive


def attention(x: Tensor, projections: Iterable, heads: int, tokens: Tensor, keys: Tensor | None = None) -> Tensor:
    """Softmax attention at ``tokens``: (B, S, D). x: (B, L, D) in float64; keys: (B, L') of the tokens
    attended to, or None for all."""
    to_q, to_k, to_v, to_out = Projections(*projections).double()
    y = []
    for b, image in enumerate(x):
        seen = image if keys is None else image[keys[b]]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (to_q(image[tokens]), to_k(seen), to_v(seen)))
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        y.append((weights @ v).transpose(0, 1).flatten(1))
    return to_out(torch.stack(y))


def linear_attention(x: Tensor, projections: Iterable, heads: int, tokens: Tensor) -> Tensor:
    """Normalised linear attention with elu + 1 at ``tokens``: (B, S, D). x: (B, L, D) in float64."""
    to_q, to_k, to_v, to_out = Projections(*projections).double()
    q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (to_q, to_k, to_v))
    return to_out(naive.linear_attention(q, k, v, "elu", tokens))
