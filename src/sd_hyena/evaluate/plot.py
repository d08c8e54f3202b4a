"""The figure of errors by timestep."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..figures import label_ends, plain_logarithm, pyplot, rendered

if TYPE_CHECKING:
    from .run import Evaluation, Row

COLOURS = ("#1f77b4", "#2a9d6f", "#7b4ab0", "#0b3d66", "#c2588a", "#5a8f29")  # students
LEAST = 1e-8  # errors below are said, not drawn: a line down there would flatten all others
GREY, LINES = "#9a9a9a", ("-", "--")  # yardsticks


def plot_errors(result: Evaluation) -> bytes:
    """The UNet's error (left) and the layers' mean error (right) by timestep, as a PNG; nothing if none were
    measured."""
    rows = [row for row in result.rows if row.unet]
    if not rows:
        return b""
    centres = [(first + last + 1) / 2 for first, last in result.bands]
    figure, panels = pyplot().subplots(1, 2, figsize=(12, 4), constrained_layout=True)
    styles = _styles(rows)
    curves: list[list[tuple[str, list[list[float]]]]] = [
        [(row.label, [_by_band(row.unet["conditional"])]) for row in rows],
        [(row.label, [_by_band(layer) for layer in row.layers.values()]) for row in rows if row.layers],
    ]
    titles = "whole UNet, with the prompt: relative error", "layers: mean relative error, and best to worst"
    for panel, drawn, title in zip(panels, curves, titles, strict=True):
        ends, below = [], []
        for label, each in drawn:
            colour, line = styles[label]
            columns = list(zip(*each, strict=True))
            mean = [sum(values) / len(values) for values in columns]
            if min(mean) < LEAST:
                below.append(label)
                continue
            panel.fill_between(centres, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15)
            panel.plot(centres, mean, line, color=colour, marker="o", ms=4)
            ends.append((mean[-1], textwrap.fill(label, 20), colour))
        panel.set_yscale("log")
        plain_logarithm(panel.yaxis)
        note = f"; below {LEAST:g}: {', '.join(below)}" if below else ""
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel(f"timestep (0: no noise){note}")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        label_ends(panel, ends, centres[-1])
    return rendered(figure)


def _by_band(figures: Mapping[str, Any]) -> list[float]:
    return [band["relative_error"] for band in figures["bands"]]


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and line of each row: yardsticks grey, students in colour."""
    students = [row.label for row in rows if row.kind == "student"]
    others = [row.label for row in rows if row.kind != "student"]
    styles = {label: (COLOURS[i % len(COLOURS)], "-") for i, label in enumerate(students)}
    return styles | {label: (GREY, LINES[i % len(LINES)]) for i, label in enumerate(others)}
