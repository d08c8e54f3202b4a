"""Matplotlib without a display, and its figures as files."""

from __future__ import annotations

import io
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
