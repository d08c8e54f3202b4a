"""The rival: softmax attention in shifted blocks, and linear attention, mixed in each head. Not a Hyena."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import OperatorConfig
from ..ops import naive
from ..ops.blocks import block_of, cut, join
from ..ops.mix import mix
from .linear import HeadwiseLinear, LinearAttention, Parts
from .operator import Projection, Size, copy_projections


class Windows(LinearAttention):
    """``share * softmax attention within blocks + (1 - share) * linear attention``, a learned share for each head.

    Blocks are ``block`` cells a side on any grid; every other head's are shifted by half of that, so that edges do
    not line up (Swin's windows, https://arxiv.org/abs/2103.14030, beside a global branch as in CLEAR and SLA).
    """

    branches = ("softmax", "global")
    rates = {"mixture": 30.0}  # noqa: RUF012

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__(config)
        if not config.block:
            raise ValueError("softmax in blocks needs a block of at least 1 cell")
        maps = (HeadwiseLinear(self.heads, self.width, 1.0, self.offset) for _ in range(2))
        self.query_features, self.key_features = maps
        self.mixture = nn.Parameter(torch.zeros(self.heads, 1))

    def run(self, x: Tensor, size: Size, projections: Iterable[Projection] | None) -> Tensor:
        parts, out = self.project(x, projections)
        local = torch.empty_like(parts[2])
        for first in (0, 1):
            some = [t[:, :, first::2] for t in parts]
            local[:, :, first::2] = self._softmax(some, size, first * (self.config.block // 2))
        everywhere = mix(self.call(self._featured(parts), size)).view_as(local)
        return out(self._mixed(local, everywhere).flatten(2))

    def _mixed(self, local: Tensor, everywhere: Tensor) -> Tensor:
        share = {"softmax": 0.0, "global": 1.0}.get(self.off, self.mixture.sigmoid().to(local.dtype))
        return share * local + (1 - share) * everywhere

    def _featured(self, parts: Parts) -> Parts:
        q, k, v = (t.flatten(2) for t in parts)
        return self.split((self.query_features(q), self.key_features(k), v))

    def _softmax(self, parts: Sequence[Tensor], size: Size, shift: int) -> Tensor:
        """Attention within blocks that start ``shift`` cells before the grid: (B, L, G, d)."""
        edge, (h, w) = self.config.block, size
        larger, before = (h + shift, w + shift), (0, 0, 0, 0, shift, 0, shift, 0)
        there = torch.ones(1, h * w, 1, 1, device=parts[0].device, dtype=parts[0].dtype)
        q, k, v, there = (
            cut(F.pad(t.unflatten(1, size), before).flatten(1, 2), larger, (edge, edge)) for t in (*parts, there)
        )
        mask = (there.transpose(-1, -2) - 1) * 1e4  # 1 1 N 1 cells
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return join(y, larger, (edge, edge)).unflatten(1, larger)[:, shift:, shift:].flatten(1, 2)

    def define(self, parts: Parts, size: Size, tokens: Tensor) -> Tensor:
        edge = self.config.block
        seen = []
        for head in range(self.heads):
            shift = head % 2 * (edge // 2)
            own = block_of((size[0] + shift, size[1] + shift), (edge, edge)).view(size[0] + shift, -1)
            own = own[shift:, shift:].flatten().to(tokens.device)
            seen.append(own[tokens][:, None] == own)
        q, k, v = (t.transpose(1, 2) for t in parts)
        local = naive.softmax_attention(q * self.width**0.5, k, v, tokens, torch.stack(seen))
        everywhere = super().define(self._featured(parts), size, tokens)
        by_head = (t.unflatten(-1, (self.heads, self.width)) for t in (local, everywhere))
        return self._mixed(*by_head).flatten(2)

    @torch.no_grad()
    def start_from(self, attention: nn.Module, records: Sequence[tuple[Tensor, Size]]) -> None:
        copy_projections(self, attention, self.width**-0.25)

    def flops(self, size: Size) -> int:
        maps, local = self.width, 2 * self.config.block**2
        return super().flops(size) + 2 * size[0] * size[1] * self.inner_dim * (2 * maps + local)
