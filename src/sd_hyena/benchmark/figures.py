"""Figures of measured layers, sizes and generations; None where nothing was timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..figures import pyplot
from .image import ImageRow
from .measure import Row

MIB = 2**20
COLOURS = {"attention": "#b3402e", "peer": "#c9962b", "hyena": "#1f77b4", "floor": "#9a9a9a"}


def plot_layer(rows: Sequence[Row], title: str) -> Any:
    """Parameters (left), time (centre, logarithmic), peak memory (right) of every kind that was timed."""
    shown = [row for row in rows if row.timing]
    if not shown:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=(11, 1.6 + 0.3 * len(shown)), constrained_layout=True)
    colours = [COLOURS[row.family] for row in shown]
    times = [row.timing.median for row in shown]  # type: ignore[union-attr]
    spread = [
        [row.timing.median - row.timing.low for row in shown],  # type: ignore[union-attr]
        [row.timing.high - row.timing.median for row in shown],  # type: ignore[union-attr]
    ]
    values: list[tuple[str, list[float], Callable[[float], str]]] = [
        ("parameters (thousands)", [(row.parameters or 0) / 1000 for row in shown], "{:.0f}".format),
        (f"{'forward + backward' if shown and shown[0].backward else 'forward'} (ms)", times, _three_digits),
        ("peak memory (MiB)", [(row.peak_bytes or 0) / MIB for row in shown], _three_digits),
    ]
    for panel, (label, numbers, text) in zip(axes, values, strict=True):
        bars = panel.barh([row.kind for row in shown], numbers, color=colours, height=0.72)
        panel.bar_label(bars, [text(n) for n in numbers], padding=3, fontsize=8)
        panel.set_xlabel(label)
        panel.margins(x=0.16)
        panel.spines[["top", "right"]].set_visible(False)
    axes[1].errorbar(times, range(len(shown)), xerr=spread, fmt="none", ecolor="#222", elinewidth=1)
    for panel in axes[1:]:
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        panel.set_xlim(low, high * 1.6)
        _plain_logarithm(panel.xaxis)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    return figure


def plot_sizes(rows: Sequence[Row], title: str) -> Any:
    """Speed (left) and peak memory (right) of every kind against image width, as ratios to the fastest attention of
    each width: above 1 is faster, or more memory."""
    timed = [row for row in rows if row.timing]
    widths = sorted({row.width for row in timed})
    best = {row.width: row.peak_bytes for row in timed if row.best}
    plt = pyplot()
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    ends: dict[Any, list[tuple[float, str, str]]] = {speed: [], memory: []}
    for kind in dict.fromkeys(row.kind for row in timed):
        own = [row for row in timed if row.kind == kind]
        shares = [(row.width, (row.peak_bytes or 0) / (best.get(row.width) or math.inf)) for row in own]
        for panel, ratios in ((speed, [(row.width, row.ratio) for row in own]), (memory, shares)):
            points = [(width, value) for width, value in ratios if value]
            if points:
                colour = COLOURS[own[0].family]
                style = "-" if own[0].family == "hyena" else "--"
                panel.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3)
                ends[panel].append((points[-1][1], kind, colour))
    backward = rows and rows[0].backward
    called = "forward + backward: times" if backward else "times"
    for panel, label in ((speed, f"{called} as fast as attention"), (memory, "peak memory / attention's")):
        panel.axhline(1, color="#333333", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        _ticks(panel, widths)
        _plain_logarithm(panel.yaxis)
        panel.set_xlabel("image width = height (px)")
        panel.set_title(label, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
        _label_ends(panel, ends[panel])
    figure.suptitle(title, fontsize=9)
    return figure


def _label_ends(panel: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names lines at their right ends, moved apart where they would overlap."""
    if not ends:
        return
    low, high = (math.log(value) for value in panel.get_ylim())
    step, place = (high - low) * 0.055, -math.inf
    for value, kind, colour in sorted(ends):
        place = max(math.log(value), place + step)
        panel.annotate(
            kind,
            (1.01, (place - low) / (high - low)),
            xycoords="axes fraction",
            color=colour,
            fontsize=8.5,
            verticalalignment="center",
        )


def plot_image(rows: Sequence[ImageRow], title: str) -> Any:
    """Time per UNet step, stacked by self-attention layer, and seconds per picture."""
    shown = [row for row in rows if row.step and row.seconds]
    if not shown:
        return None
    names = list(dict.fromkeys(name for row in shown for name in row.layers))
    plt = pyplot()
    figure, (steps, seconds) = plt.subplots(
        1, 2, sharey=True, width_ratios=(3, 1), figsize=(12, 2.4 + 0.55 * len(shown)), constrained_layout=True
    )
    palette = plt.get_cmap("turbo")
    labels = [row.entry for row in shown]
    left = [0.0] * len(shown)
    for i, name in enumerate(names):
        values = [row.layers[name].median if name in row.layers else 0.0 for row in shown]
        colour = palette(0.05 + 0.9 * i / max(1, len(names) - 1))
        steps.barh(labels, values, left=left, color=colour, height=0.66, label=name, edgecolor="white", linewidth=0.4)
        left = [a + b for a, b in zip(left, values, strict=True)]
    totals = [row.step.median for row in shown]  # type: ignore[union-attr]
    rest = [max(0.0, total - done) for total, done in zip(totals, left, strict=True)]
    bars = steps.barh(labels, rest, left=left, color="#d5d5d5", height=0.66, label="all else")
    texts = [
        f"{t:.0f} ms" + (f", {r.step_ratio:.2f}x" if r.step_ratio else "") for t, r in zip(totals, shown, strict=True)
    ]
    steps.bar_label(bars, texts, padding=4, fontsize=9)
    steps.set_xlim(0, max(totals) * 1.22)
    steps.set_xlabel("one UNet step (ms), by self-attention layer")
    whole = [row.seconds.median for row in shown]  # type: ignore[union-attr]
    bars = seconds.barh(labels, whole, color=[COLOURS[row.family] for row in shown], height=0.66)
    texts = [f"{s:.3g} s" + (f", {r.ratio:.2f}x" if r.ratio else "") for s, r in zip(whole, shown, strict=True)]
    seconds.bar_label(bars, texts, padding=4, fontsize=9)
    seconds.set_xlim(0, max(whole) * 1.75)
    seconds.set_xlabel("one picture (s)")
    steps.invert_yaxis()
    for panel in (steps, seconds):
        panel.spines[["top", "right"]].set_visible(False)
    handles, texts = steps.get_legend_handles_labels()
    if len(texts) > 20:  # SDXL has 70 layers: name the first and last of each colour run only
        keep = [*range(0, len(texts) - 1, -(-len(texts) // 16)), len(texts) - 1]
        handles, texts = [handles[i] for i in keep], [texts[i] for i in keep]
    figure.legend(handles, texts, loc="outside lower center", ncols=9, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _ticks(panel: Any, widths: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    panel.set_xticks(widths, [str(w) for w in widths], rotation=45)
    panel.xaxis.set_minor_locator(NullLocator())


def _plain_logarithm(axis: Any) -> None:
    """Decades as plain numbers, and in between where an axis covers little more than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
