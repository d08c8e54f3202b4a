"""The figure of errors by timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..figures import pyplot, rendered

if TYPE_CHECKING:
    from .run import Evaluation, Row

COLOURS = ("#1f77b4", "#2a9d6f", "#7b4ab0", "#0b3d66", "#c2588a", "#5a8f29")  # students
GREY, LINES = "#9a9a9a", ("-", "--")  # yardsticks


def plot_errors(result: Evaluation) -> bytes:
    """The UNet's error (left) and the layers' mean error (right) by timestep, as a PNG; nothing if none were
    measured."""
    rows = [row for row in result.rows if row.unet]
    if not rows:
        return b""
    centres = [(first + last + 1) / 2 for first, last in result.bands]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    styles = _styles(rows)
    for row in rows:
        colour, line = styles[row.label]
        values = [band["relative_error"] for band in row.unet["conditional"]["bands"]]
        left.plot(centres, values, line, color=colour, marker="o", ms=4, label=row.label)
        if row.layers:
            each = [[band["relative_error"] for band in f["bands"]] for f in row.layers.values()]
            mean = [sum(values) / len(each) for values in zip(*each, strict=True)]
            right.fill_between(centres, _lows(each), _highs(each), color=colour, alpha=0.15, lw=0)
            right.plot(centres, mean, line, color=colour, marker="o", ms=4, label=row.label)
    left.set_title("whole UNet, with the prompt", fontsize=10)
    right.set_title("layers: mean, and from the best to the worst", fontsize=10)
    for panel in (left, right):
        panel.set_yscale("log")
        panel.set_xlabel("timestep (0: no noise)")
        panel.set_ylabel("relative error")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.legend(fontsize=8, frameon=False)
    return rendered(figure)


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and line of each row: yardsticks grey, students in colour."""
    students = [row.label for row in rows if row.kind == "student"]
    others = [row.label for row in rows if row.kind != "student"]
    styles = {label: (COLOURS[i % len(COLOURS)], "-") for i, label in enumerate(students)}
    return styles | {label: (GREY, LINES[i % len(LINES)]) for i, label in enumerate(others)}


def _lows(each: list[list[float]]) -> list[float]:
    return [min(values) for values in zip(*each, strict=True)]


def _highs(each: list[list[float]]) -> list[float]:
    return [max(values) for values in zip(*each, strict=True)]
