"""Figures of measured times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .layers import Row

COLOURS = {
    "attention (SDPA)": "#b3402e",
    "hyena2d mean": "#1f77b4",
    "hyena2d linear": "#2a9d6f",
    "hyena causal": "#8a8a8a",
}


def plot_sizes(rows: Sequence[Row], title: str, *paths: Path) -> None:
    """Time per layer against image width, both axes logarithmic; one file per path (PNG or SVG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    for kind in dict.fromkeys(row.kind for row in rows):
        points = [(row.width, row.timing) for row in rows if row.kind == kind and row.timing]
        x, y = [p[0] for p in points], [p[1].median for p in points]
        spread = [[t.median - t.low for _, t in points], [t.high - t.median for _, t in points]]
        axes.errorbar(x, y, spread, marker="o", markersize=4, capsize=2, label=kind, color=COLOURS.get(kind))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    widths = sorted({row.width for row in rows})
    axes.set_xticks(widths, [str(w) for w in widths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("image width = height (px)")
    axes.set_ylabel("time per layer (ms), median and quartiles")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for path in paths:
        figure.savefig(path, dpi=130)
    plt.close(figure)
