"""Operators that are asked about before they are built: near filters, states over blocks, softmax in blocks.

All start from a teacher's projections as the library's own do (``in_proj``, ``out_proj``), and can be run with a
branch switched off (``off``), to see what it does for the whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.nn.linear_attention import FeatureMap

POSITIONAL_RATE = 10.0  # times the others': weights of positions start at nothing and have far to go


class NearAndStates(nn.Module):
    """``y = out(near * v + phi(q) . (T (phi(k) [v, 1]))``, the last divided by its last column; any h x w.

    The grid is cut into ``block`` x ``block`` cells. Each block has a state, ``sum phi(k) [v, 1]^T``; T weighs the
    states of blocks up to ``reach`` away by ``exp(a)`` and all others by 1 (multi-head Hyena's ``q (T (k v))``,
    https://arxiv.org/abs/2310.18780, on blocks). Without blocks T is a sum over everything: linear attention.

    Args:
        dim, heads: channels and heads.
        near: edge of a depthwise filter on v; 0: none.
        block: edge of the blocks; 0: none.
        attend: whether there is a global branch at all.
    """

    form, order = "full", 2

    def __init__(
        self,
        dim: int,
        heads: int,
        near: int = 0,
        block: int = 0,
        attend: bool = True,
        reach: int = 3,
        in_bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.inner_dim, self.heads, self.off = dim, dim, heads, ""
        self.block, self.reach, self.attend = block, reach, attend
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=in_bias), nn.Linear(dim, dim)
        if attend:
            self.query, self.key = (FeatureMap(heads, dim // heads, 2) for _ in range(2))
        if near:
            self.near = nn.Parameter(torch.zeros(dim, 1, near, near))
        if block:
            self.block_weight = nn.Parameter(torch.zeros(heads, 2 * reach + 1, 2 * reach + 1))

    def branches(self) -> list[str]:
        """Names of what can be switched off."""
        names = ["near"] * hasattr(self, "near") + ["states"] * bool(self.block)
        return names + ["global"] * (self.attend and bool(names))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: (B, h * w, D) -> (B, h * w, D)."""
        q, k, v = (t.transpose(1, 2).unflatten(2, size) for t in self.in_proj(x).chunk(3, dim=-1))
        y = torch.zeros_like(v)
        if hasattr(self, "near") and self.off != "near":
            y = y + F.conv2d(v, self.near, padding=self.near.shape[-1] // 2, groups=self.dim)
        if self.attend and self.off != "global":
            y = y + self._attend(q, k, v)
        return self.out_proj(y.flatten(2).transpose(1, 2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h, w = v.shape[2:]
        q, k, v = (t.unflatten(1, (self.heads, -1)).flatten(3) for t in (q, k, v))
        queries, keys = self.query(q), self.key(k)  # (B, H, F, L)
        largest = keys.detach().amax(3, keepdim=True)  # moves to the query: nothing overflows, nothing changes
        keys, queries = (keys - largest).exp(), queries + largest
        queries = (queries - queries.detach().amax(2, keepdim=True)).exp()
        v = torch.cat([v, torch.ones_like(v[:, :, :1])], dim=2)
        queries, keys, v = (self._cut(t.unflatten(3, (h, w))) for t in (queries, keys, v))  # (B, H, blocks, cells, C)
        states = keys.transpose(-1, -2) @ v
        edge = self.block or max(h, w)
        grid = -(-h // edge), -(-w // edge)
        if self.block and self.off != "states":
            states = torch.einsum("hij,bhjfe->bhife", self._weights(grid), states)
        else:
            states = states.sum(2, keepdim=True)
        y = queries @ states
        y = y[..., :-1] / y[..., -1:].clamp_min(1e-30)  # beyond the edge both are 0
        y = y.unflatten(3, (edge, edge)).unflatten(2, grid).permute(0, 1, 6, 2, 4, 3, 5).flatten(3, 4).flatten(4, 5)
        return y[..., :h, :w].flatten(1, 2)

    def _cut(self, t: Tensor) -> Tensor:
        """(B, H, C, h, w) -> (B, H, blocks, cells of a block, C); what is beyond the edge counts nothing."""
        h, w = t.shape[-2:]
        edge = self.block or max(h, w)
        t = F.pad(t, (0, -w % edge, 0, -h % edge))
        t = t.unflatten(4, (-1, edge)).unflatten(3, (-1, edge))
        return t.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3)

    def _weights(self, grid: tuple[int, int]) -> Tensor:
        """(H, blocks, blocks)"""
        rows, columns = (torch.arange(n) for n in grid)
        down = (rows[:, None] - rows)[:, None, :, None].expand(*grid, *grid)
        across = (columns[:, None] - columns)[None, :, None, :].expand(*grid, *grid)
        near = (down.abs() <= self.reach) & (across.abs() <= self.reach)
        index = (down.clamp(-self.reach, self.reach) + self.reach, across.clamp(-self.reach, self.reach) + self.reach)
        weights = torch.where(near, self.block_weight[:, index[0], index[1]].exp(), 1.0)
        return weights.flatten(3, 4).flatten(1, 2)


class SoftmaxInBlocks(NearAndStates):
    """The rival: softmax attention within 8x8 blocks and linear attention, mixed per head. Not a Hyena."""

    EDGE = 8

    def __init__(self, dim: int, heads: int, in_bias: bool = True) -> None:
        super().__init__(dim, heads, in_bias=in_bias)
        self.mixture = nn.Parameter(torch.zeros(heads, 1, 1))

    def branches(self) -> list[str]:
        return ["softmax", "global"]

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = (t.transpose(1, 2).unflatten(2, size) for t in self.in_proj(x).chunk(3, dim=-1))
        share = {"softmax": 0.0, "global": 1.0}.get(self.off, self.mixture.sigmoid())
        attended = self._attend(q, k, v).unflatten(1, (self.heads, -1)).flatten(3)
        y = attended + share * (self._softmax(q, k, v) - attended)
        return self.out_proj(y.flatten(1, 2).transpose(1, 2))

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, d, L). The grid must be whole blocks."""
        h, w = v.shape[-2:]
        edge = self.EDGE
        blocks = []
        for t in (q, k, v):
            t = t.unflatten(3, (-1, edge)).unflatten(2, (-1, edge)).unflatten(1, (self.heads, -1))
            blocks.append(t.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3))
        y = F.scaled_dot_product_attention(*blocks)
        y = y.unflatten(3, (edge, edge)).unflatten(2, (h // edge, w // edge)).permute(0, 1, 6, 2, 4, 3, 5)
        return y.flatten(5, 6).flatten(3, 4).flatten(3, 4)


def parameter_groups(operator: nn.Module, rate: float) -> list[dict]:
    """Groups for Adam: weights of positions at a rate of their own."""
    positional = {"near", "block_weight", "mixture"}
    named = list(operator.named_parameters())
    return [
        {"params": [p for name, p in named if name not in positional], "lr": rate},
        {"params": [p for name, p in named if name in positional], "lr": POSITIONAL_RATE * rate},
    ]
