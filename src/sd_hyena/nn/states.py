"""Hyena over states: a long convolution of what blocks of the grid remember."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import OperatorConfig
from ..ops.blocks import block_of, block_size, blocks_along, cut
from ..ops.mix import Call
from ..ops.naive import features
from .linear import Parts
from .near import Near
from .operator import Size

MOST_BLOCKS = 1024
REACH = 3  # blocks on each side that have a weight of their own
LEAST, MOST = -4.0, 4.0  # a fitted weight's logarithm
ROUNDS = 300  # of the projected gradient that fits them


class BlockWeights(nn.Module):
    """How much a block's state counts for another block, by their offset: ``exp(a)`` up to ``REACH`` blocks away, 1
    beyond: multi-head Hyena's filter (https://arxiv.org/abs/2310.18780) on states, positive so that sums stay means."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, 2 * REACH + 1, 2 * REACH + 1))

    def forward(self, grid: Size) -> Tensor:
        """(H, blocks, blocks) for a grid of (down, across) blocks; the first is the one that reads."""
        down, across, near = offsets(grid, self.weight.device)
        weights = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).exp()
        return torch.where(near, weights[:, down, across], 1.0)


def offsets(grid: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each pair of blocks, row and column in a table of (2 REACH + 1)^2 weights, and whether it has one there."""
    row, column = (t.flatten() for t in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
    down, across = row[:, None] - row + REACH, column[:, None] - column + REACH
    near = (down >= 0) & (down <= 2 * REACH) & (across >= 0) & (across <= 2 * REACH)
    return down.clamp(0, 2 * REACH), across.clamp(0, 2 * REACH), near


class States(Near):
    """A near filter, and linear attention whose states are kept by block and convolved over the blocks.

    ``y_i = near(v)_i + f(q_i) . S'_b(i) / f(q_i) . n'_b(i)`` with ``S'_b = sum_b' w(b - b') sum_{j in b'} f(k_j) v_j``
    and n' the same of the features alone. With w = 1 everywhere this is linear attention exactly. ``block`` cells a
    side on the training grid; on other grids as ``scaling`` says. Without blocks it is :class:`Near`.
    """

    branches = ("near", "states", "global")
    rates = Near.rates | {"blocks.": 30.0}

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__(config)
        self.blocks = BlockWeights(config.attention_heads) if config.block else None

    def block(self, size: Size) -> Size:
        """(rows, columns) of the blocks on an (h, w) grid."""
        c = self.config
        return block_size(size, (c.height, c.width), c.block, c.scaling)

    def refuses(self, size: Size) -> str:
        count = math.prod(blocks_along(size, self.block(size))) if self.blocks is not None else 1
        if count <= MOST_BLOCKS:
            return ""
        return (
            f"{count} blocks are more than {MOST_BLOCKS}, which cost more than they save: take larger ones, or stretch"
        )

    def call(self, parts: Parts, size: Size) -> Call:
        call = super().call(parts, size)
        if self.blocks is None or self.off == "states":
            return call
        block = self.block(size)
        return call._replace(block=block, weights=self.blocks(blocks_along(size, block)))

    def block_weights(self, size: Size, tokens: Tensor) -> Tensor | None:
        if self.blocks is None:
            return None
        block = self.block(size)
        own = block_of(size, block).to(tokens.device)
        return self.blocks(blocks_along(size, block))[:, own[tokens]][:, :, own]

    @torch.no_grad()
    def start_from(self, attention: nn.Module, records: Sequence[tuple[Tensor, Size]]) -> None:
        """Block weights are fitted to the teacher first (:func:`fit_weights`), the near filter to what they leave."""
        if self.blocks is not None:
            self.blocks.weight.zero_()
            if not self.core:
                super(Near, self).start_from(attention, records)
            samples = list(self.samples(attention, records))
            if samples:
                self.blocks.weight.copy_(self._fitted(samples))
        super().start_from(attention, records)

    def _fitted(self, samples: Sequence[tuple[Parts, Size, Tensor]]) -> Tensor:
        found = [
            residual_products(parts, wanted, size, self.block(size), self.config.feature_map)
            for parts, size, wanted in samples
        ]
        gram, shares = (torch.stack(each).sum(0) for each in zip(*found, strict=True))
        return fit_weights(gram, shares).unflatten(1, (2 * REACH + 1, 2 * REACH + 1))

    def flops(self, size: Size) -> int:
        grid = blocks_along(size, self.block(size)) if self.blocks is not None else (1, 1)
        mixing = 2 * (grid[0] * grid[1]) ** 2 * self.inner_dim * (self.width + 1)
        return super().flops(size) + (mixing if self.blocks is not None else 0)


def residual_products(parts: Parts, wanted: Tensor, size: Size, block: Size, feature_map: str) -> tuple[Tensor, Tensor]:
    """Inner products of what the states at each offset leave of ``wanted``, (H, offsets + 1, offsets + 1), and what
    share these states have in the denominator, summed over all cells, (H, offsets + 1).

    The states at offset o contribute numerator N_o and denominator n_o; weights w fit if ``sum_o w_o (N_o - wanted
    n_o)`` is small, here over the denominator at w = 1. The last offset stands for all that have none of their own.
    parts, wanted: (B, L, H, d) each.
    """
    grid = blocks_along(size, block)
    q, k, v, wanted = (t.float() for t in (*parts, wanted))
    one = torch.ones_like(v[..., :1])
    values, target = (cut(t, size, block) for t in (torch.cat([v, one], -1), wanted))
    inside = cut(one, size, block)
    queries, keys = (features(cut(t, size, block), feature_map) for t in (q, k))
    states = keys.transpose(-1, -2) @ values  # B H N d d+1
    total = (queries @ states.sum(2, keepdim=True))[..., -1:]
    down, across, near = offsets(grid, v.device)
    index = torch.where(near, down * (2 * REACH + 1) + across, (2 * REACH + 1) ** 2)
    gram = v.new_zeros(v.shape[2], (2 * REACH + 1) ** 2 + 1, (2 * REACH + 1) ** 2 + 1)
    shares = gram[..., 0].clone()
    for reader in range(grid[0] * grid[1]):
        read = queries[:, :, reader, None] @ states  # B H N cells d+1
        left = (read[..., :-1] - target[:, :, reader, None] * read[..., -1:]) / total[:, :, reader, None]
        left = (left * inside[:, :, reader, None]).permute(1, 2, 0, 3, 4).flatten(2)  # H N rest
        products = left @ left.transpose(1, 2)
        rows = torch.zeros(gram.shape[1], left.shape[1], device=v.device)
        rows[index[reader], torch.arange(left.shape[1], device=v.device)] = 1
        gram += rows @ products @ rows.T
        shares += (read[..., -1:] / total[:, :, reader, None] * inside[:, :, reader, None]).sum((0, 3, 4)) @ rows.T
    return gram, shares


def fit_weights(gram: Tensor, shares: Tensor, ridge: float = 1e-2) -> Tensor:
    """Logarithms of the positive weights w that minimise ``w' gram w + ridge |w - 1|^2``, over that of the offsets
    without a weight of their own, if there were such: (H, offsets).

    The mean denominator stays what it is at w = 1: as nothing is left of nothing, w would vanish otherwise.
    """
    shares = shares / shares.sum(1, keepdim=True)
    ridges = ridge * gram.diagonal(dim1=1, dim2=2).mean(1)
    step = 1 / (torch.linalg.matrix_norm(gram, 2) + ridges)[:, None]
    weights = gram.new_ones(gram.shape[:2])
    for _ in range(ROUNDS):
        gradient = (gram @ weights[..., None])[..., 0] + ridges[:, None] * (weights - 1)
        gradient -= shares * ((shares * gradient).sum(1) / shares.square().sum(1))[:, None]
        weights = (weights - step * gradient).clamp_min(1e-2)
        weights = weights / (shares * weights).sum(1, keepdim=True)
    others = torch.where(shares[:, -1:] > 0, weights[:, -1:], 1.0)
    return (weights[:, :-1] / others).log().clamp(LEAST, MOST)
