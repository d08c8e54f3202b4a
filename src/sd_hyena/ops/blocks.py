"""Cutting a grid into blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def block_size(size: Size, extent: Size, edge: int, scaling: str) -> Size:
    """(rows, columns) of the blocks on an (h, w) grid: ``edge`` on the training grid ``extent``; on another one
    grown with the square root of its cells (``stretch``: as many blocks), or the same (``extend``)."""
    if scaling == "stretch":
        edge = max(1, round(edge * math.sqrt(size[0] * size[1] / (extent[0] * extent[1]))))
    return min(edge, size[0]), min(edge, size[1])


def blocks_along(size: Size, block: Size) -> Size:
    """How many blocks there are along each axis."""
    return -(-size[0] // block[0]), -(-size[1] // block[1])


def cut(x: Tensor, size: Size, block: Size) -> Tensor:
    """(B, h w, H, d) -> (B, H, blocks, cells of a block, d); there are zeros beyond the grid's edge."""
    (h, w), (rows, columns), (down, across) = size, block, blocks_along(size, block)
    x = x.unflatten(1, size)
    if (down * rows, across * columns) != (h, w):
        x = F.pad(x, (0, 0, 0, 0, 0, across * columns - w, 0, down * rows - h))
    x = x.unflatten(2, (across, columns)).unflatten(1, (down, rows))  # B down rows across columns H d
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def join(x: Tensor, size: Size, block: Size) -> Tensor:
    """:func:`cut` undone: (B, H, blocks, cells, d) -> (B, h w, H, d)."""
    (h, w), grid = size, blocks_along(size, block)
    x = x.unflatten(3, block).unflatten(2, grid).permute(0, 2, 4, 3, 5, 1, 6)
    return x.flatten(3, 4).flatten(1, 2)[:, :h, :w].flatten(1, 2)


def block_of(size: Size, block: Size) -> Tensor:
    """Each cell's block, (h w,)."""
    rows, columns = torch.arange(size[0]) // block[0], torch.arange(size[1]) // block[1]
    return (rows[:, None] * blocks_along(size, block)[1] + columns).flatten()
