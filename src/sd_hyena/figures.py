"""Matplotlib without a display, and its figures as files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any


def pyplot() -> Any:
    """Its plotting module."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is one
    import matplotlib.pyplot as plt

    return plt


def rendered(figure: Any, form: str = "png", dpi: int = 120) -> bytes:
    """A finished figure as the contents of a file: "png" or "svg"."""
    figure.savefig(data := io.BytesIO(), dpi=dpi, format=form)
    pyplot().close(figure)
    return data.getvalue()


def plain_logarithm(axis: Any) -> None:
    """Decades as plain numbers, and in between where an axis covers little more than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    between = (1.0,) if high > 30 * low else (1.0, 2.0, 5.0) if high > 5 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=between))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_ends(panel: Any, ends: Sequence[tuple[float, str, str]], x: float) -> None:
    """Names lines of a panel with a logarithmic y at their right ends, at ``x``: (y, name, colour) each. Names that
    would overlap move apart, tied to their lines."""
    if not ends:
        return
    low, high = (math.log(value) for value in panel.get_ylim())
    step = (high - low) * 0.06
    ordered = sorted(ends)
    places = [math.log(value) for value, _, _ in ordered]
    for _ in range(200):  # pairs that are too close give way to both sides
        for i in range(len(places) - 1):
            lack = step - (places[i + 1] - places[i])
            if lack > 0:
                places[i], places[i + 1] = places[i] - lack / 2, places[i + 1] + lack / 2
    for (value, kind, colour), place in zip(ordered, places, strict=True):
        panel.annotate(
            kind,
            (x, value),
            (1.06, (place - low) / (high - low)),
            textcoords="axes fraction",
            color=colour,
            fontsize=9.5,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
        )
