"""Figures of an anatomy, as PNG: a heat map of layers by heads, and each head's mean attention by displacement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..figures import pyplot, rendered
from .heads import WINDOW
from .run import Anatomy, LayerAnatomy

REACH = 16  # cells to each side that the small pictures show


def plot_heads(result: Anatomy) -> bytes:
    """Entropy, mass within 7x7 cells over the uniform share, and what the oracles leave; layers down, heads across."""
    plt = pyplot()
    near = [_concentration(layer) for layer in result.layers]
    panels = [
        ("entropy / log L\n(1: looks everywhere)", [layer.head("entropy") for layer in result.layers], 0.0, 1.0),
        ("weight within 7x7 cells,\ntimes a uniform share", near, 1.0, max(4.0, *map(max, near))),
        ("error of low rank alone\n", [layer.head_error("rank") for layer in result.layers], 0.0, 1.0),
        ("error of a 7x7 window\nand low rank", [layer.head_error("window+rank") for layer in result.layers], 0.0, 1.0),
    ]
    rows, columns = len(result.layers), max(len(values) for values in panels[0][1])
    wide = 1.4 + 0.34 * columns
    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(9, wide * len(panels)), 1.5 + 0.3 * rows), constrained_layout=True, sharey=True
    )
    for axis, (title, values, low, high) in zip(axes, panels, strict=True):
        grid = torch.full((rows, columns), math.nan)
        for r, row in enumerate(values):
            grid[r, : len(row)] = torch.tensor(row)
        image = axis.imshow(grid, vmin=low, vmax=high, cmap="Blues", aspect="auto", interpolation="nearest")
        if columns > 8:
            figure.colorbar(image, ax=axis, shrink=0.8)
        else:
            for r, row in enumerate(values):
                for c, value in enumerate(row):
                    red, green, blue, _ = image.cmap(image.norm(value))
                    dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                    axis.text(c, r, _three(value), ha="center", va="center", fontsize=9, color="w" if dark else "k")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("head")
        axis.set_xticks(range(0, columns, max(1, columns // 8)))
        axis.set_yticks(range(rows), [f"{layer.name} ({layer.size[0]}x{layer.size[1]})" for layer in result.layers])
    figure.suptitle(f"Self-attention of {result.settings.name}, {result.settings.width}x{result.settings.height} px")
    return rendered(figure)


def _concentration(layer: LayerAnatomy) -> list[float]:
    pairs = zip(layer.head(f"mass_{WINDOW}"), layer.head(f"uniform_{WINDOW}"), strict=True)
    return [mass / uniform for mass, uniform in pairs]


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def plot_displacement(result: Anatomy) -> bytes:
    """A small picture of each head's mean attention around a query, each scaled to its own largest value.

    Many layers of few heads stand in two blocks.
    """
    plt = pyplot()
    columns = max(len(layer.displacement) for layer in result.layers)
    blocks = 2 if columns <= 8 and len(result.layers) > 6 else 1
    rows = -(-len(result.layers) // blocks)
    width = max(4.5, blocks * (0.6 + 1.05 * columns))
    figure = plt.figure(figsize=(width, 0.8 + 1.12 * rows), layout="constrained")
    for block, part in enumerate(figure.subfigures(1, blocks, squeeze=False)[0]):
        layers = result.layers[block * rows : (block + 1) * rows]
        axes = part.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for row, layer in zip(axes, layers, strict=False):
            _draw_kernels(row, layer, titled=layer is layers[0])
    figure.suptitle(
        f"Mean attention by displacement, {result.settings.name}\n"
        f"up to {REACH} cells to each side; square root, each to its own maximum",
        fontsize=8,
    )
    return rendered(figure)


def _draw_kernels(row: Sequence[Any], layer: LayerAnatomy, titled: bool) -> None:
    """The heads of one layer."""
    h, w = layer.size
    down, across = min(REACH, h - 1), min(REACH, w - 1)
    for number, (axis, kernel) in enumerate(zip(row, layer.displacement, strict=False)):
        shown = kernel[h - 1 - down : h + down, w - 1 - across : w + across]
        axis.axis("on")
        axis.imshow(shown.sqrt(), cmap="magma", vmin=0, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        if number == 0:
            axis.set_ylabel(f"{layer.name}\n{h}x{w}", fontsize=8)
        if titled:
            axis.set_title(f"head {number}", fontsize=8)
