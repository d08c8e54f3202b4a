"""Figures of measured layers, sizes and generations; None where nothing was timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..figures import label_ends, plain_logarithm, pyplot
from .image import ImageRow
from .measure import Row

MIB = 2**20
COLOURS = {"attention": "#b3402e", "peer": "#c9962b", "hyena": "#1f77b4", "floor": "#8a8a8a"}
REST = "#d5d5d5"
CENTRED: dict[str, Any] = {"fontsize": 8, "horizontalalignment": "center", "verticalalignment": "center"}


def plot_layer(rows: Sequence[Row], title: str) -> Any:
    """Time (left) and peak memory (right) of every kind that was timed, and its parameters beside its name.

    Logarithmic, so that equal distances are equal ratios; a line marks the best attention.
    """
    shown = [row for row in rows if row.timing]
    if not shown:
        return None
    plt = pyplot()
    figure, (times, memory) = plt.subplots(
        1, 2, sharey=True, figsize=(9, 1.5 + 0.32 * len(shown)), constrained_layout=True
    )
    names = [f"{row.kind}  {(row.parameters or 0) / 1000:.0f}k" for row in shown]
    for place, row in enumerate(shown):
        assert row.timing
        ratio = f"  {_ratio(row.ratio)}" if row.ratio else ""
        times.plot([row.timing.low, row.timing.high], [place] * 2, color=COLOURS[row.family], linewidth=2, alpha=0.5)
        _dot(times, row.timing.median, place, row, f"{_three_digits(row.timing.median)} ms{ratio}", row.timing.high)
        peak = (row.peak_bytes or 0) / MIB
        _dot(memory, peak, place, row, f"{_three_digits(peak)} MiB", peak)
        if row.best:
            times.axvline(row.timing.median, color=COLOURS["attention"], linewidth=0.8, alpha=0.6)
            memory.axvline(peak, color=COLOURS["attention"], linewidth=0.8, alpha=0.6)
    what = "forward + backward" if shown[0].backward else "forward"
    for panel, label in ((times, f"{what} (ms), speedup over attention"), (memory, "peak memory (MiB)")):
        panel.set_title(label, fontsize=10, loc="left")
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        panel.set_xlim(low, high * (high / low) ** 0.35)  # room for the numbers
        plain_logarithm(panel.xaxis)
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
    times.set_yticks(range(len(shown)), names, fontsize=9)
    times.invert_yaxis()
    figure.suptitle(title, fontsize=9)
    return figure


def _dot(panel: Any, value: float, place: int, row: Row, text: str, end: float) -> None:
    """A point, and its number to the right of ``end``."""
    panel.plot([value], [place], "o", color=COLOURS[row.family], markersize=7)
    panel.annotate(
        text,
        (end, place),
        (8, 0),
        textcoords="offset points",
        fontsize=8.5,
        verticalalignment="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


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
                panel.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.4)
                ends[panel].append((points[-1][1], kind, colour))
    backward = rows and rows[0].backward
    called = "forward + backward: times" if backward else "times"
    for panel, label in ((speed, f"{called} as fast as attention"), (memory, "peak memory / attention's")):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        _ticks(panel, widths)
        plain_logarithm(panel.yaxis)
        panel.set_xlabel("image width = height (px)")
        panel.set_title(label, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
        if widths:
            label_ends(panel, ends[panel], widths[-1])
    figure.suptitle(title, fontsize=9)
    return figure


def plot_image(rows: Sequence[ImageRow], title: str) -> Any:
    """Time of one UNet step, self-attention layer by layer, with and without Hyena, and seconds per picture."""
    shown = [row for row in rows if row.step and row.seconds]
    if not shown:
        return None
    plt = pyplot()
    figure, (steps, seconds) = plt.subplots(
        1, 2, sharey=True, width_ratios=(3, 1), figsize=(11, 1.9 + 0.55 * len(shown)), constrained_layout=True
    )
    longest = max(row.step.median for row in shown)  # type: ignore[union-attr]
    for place, row in enumerate(shown):
        assert row.step
        assert row.seconds
        left = 0.0
        for name, timing in row.layers.items():
            colour = COLOURS["hyena" if name in row.replaced else "attention"]
            steps.barh(place, timing.median, left=left, color=colour, height=0.66, edgecolor="white", linewidth=0.5)
            if timing.median > 0.05 * longest:
                steps.text(left + timing.median / 2, place, name, color="white", **CENTRED)
            left += timing.median
        rest = max(0.0, row.step.median - left)
        steps.barh(place, rest, left=left, color=REST, height=0.66)
        if rest > 0.12 * longest:
            steps.text(left + rest / 2, place, "all else", color="#333333", **CENTRED)
        _beside_bar(steps, row.step.median, place, f"{row.step.median:.0f} ms", row.step_ratio)
        seconds.barh(place, row.seconds.median, color=COLOURS[row.family], height=0.66)
        _beside_bar(seconds, row.seconds.median, place, f"{row.seconds.median:.3g} s", row.ratio)
    steps.set_yticks(range(len(shown)), [row.entry for row in shown])
    steps.invert_yaxis()
    steps.set_title("one UNet step (ms): each attention layer red, each Hyena layer blue", fontsize=10, loc="left")
    seconds.set_title("one picture (s)", fontsize=10, loc="left")
    for panel, room in ((steps, 1.2), (seconds, 1.8)):
        panel.set_xlim(0, room * panel.get_xlim()[1] / 1.05)
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    return figure


def _beside_bar(panel: Any, end: float, place: int, text: str, ratio: float | None) -> None:
    if ratio:
        text += f", {_ratio(ratio)}"
    panel.annotate(text, (end, place), (5, 0), textcoords="offset points", fontsize=9, verticalalignment="center")


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value >= 1 else f"{value:.2f}x"


def _ticks(panel: Any, widths: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    panel.set_xticks(widths, [str(w) for w in widths], rotation=45)
    panel.xaxis.set_minor_locator(NullLocator())


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
