"""Teaches half of the teacher's finest heads to look around themselves, while it learns to draw.

A model this small, with as many convolutions as attention layers, leaves everything near to the convolutions:
its attention stays flat, and every operator imitates it alike. Stable Diffusion's heads look mostly at their
surroundings. So a term of the loss asks some heads to keep most of their attention within 7x7 cells. The bias
ends up in the weights - the deep levels tell where a cell is, queries and keys use it - and nothing but
ordinary attention is left after training.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Before these, at the finest level, no layer can know where in the picture a cell lies.
BLOCK = "up_blocks.3"
REACH, SHARE = 3, 0.85
QUERIES = 4  # one in so many is looked at in each step


class LocalHeads:
    """An attention processor that notes how far its first half of heads looks.

    ``loss`` is the mean of ``-log(mass / SHARE)`` over queries whose mass within 7x7 cells is less than ``SHARE``.
    """

    def __init__(self) -> None:
        self.active = False
        self.loss: Tensor | float = 0.0

    def __call__(self, attn: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if self.active:
            half = attn.heads // 2
            queries = slice(int(torch.randint(QUERIES, ())), None, QUERIES)
            self.loss = self._loss(q[:, :half, queries], k[:, :half], queries)
        out = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))

    @staticmethod
    def _loss(q: Tensor, k: Tensor, queries: slice) -> Tensor:
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        inside = scores.masked_fill(~_window(k.shape[2]).to(k.device)[queries], -math.inf)
        mass = inside.logsumexp(-1) - scores.logsumexp(-1)
        return F.relu(math.log(SHARE) - mass).mean()


@cache
def _window(tokens: int) -> Tensor:
    """(L, L), true where key and query lie within 7x7 cells of each other on a square grid."""
    edge = math.isqrt(tokens)
    y, x = (a.flatten() for a in torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij"))
    return ((y[:, None] - y).abs() <= REACH) & ((x[:, None] - x).abs() <= REACH)


def plant_local_heads(unet: Any) -> list[LocalHeads]:
    """Gives the self-attention of the last block a processor of this kind; returns them in order."""
    chosen: dict[str, LocalHeads] = {}
    processors = dict(unet.attn_processors)
    for name in processors:
        if name.startswith(BLOCK) and "attn1" in name:
            chosen[name] = processors[name] = LocalHeads()
    unet.set_attn_processor(processors)
    return list(chosen.values())
