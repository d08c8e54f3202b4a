"""Figures: names at the ends of lines do not overlap, numbers are plain, nothing lies under a bar on a logarithm."""

import itertools
from types import SimpleNamespace

import pytest
from matplotlib.text import Annotation

from sd_hyena.benchmark.figures import plot_image, plot_layer, plot_sizes
from sd_hyena.benchmark.image import ImageRow
from sd_hyena.benchmark.measure import Row
from sd_hyena.benchmark.timing import Timing
from sd_hyena.evaluate import plot as evaluate_plot
from sd_hyena.figures import label_ends, plain_logarithm, pyplot


def names_in(panel):
    """(name, height as a share of the axes) of the names beside a panel, from below."""
    notes = [child for child in panel.get_children() if isinstance(child, Annotation)]
    return sorted(((note.get_text(), note.xyann[1]) for note in notes), key=lambda pair: pair[1])


def row(kind, family, width, ms, ratio, peak):
    timing = Timing(ms, 0.9 * ms, 1.1 * ms, 3)
    return Row(width, width, 1, kind, family, False, 1000, timing, ratio, peak, best=family == "attention")


SIZES = [
    row(kind, family, width, ms * scale, 8 / ms, peak * scale)
    for width, scale in ((256, 1), (512, 4))
    for kind, family, ms, peak in (
        ("sdp-flash", "attention", 8.0, 2**20),
        ("states", "hyena", 2.0, 2**20),
        ("near", "hyena", 2.0, 2**20),
        ("linear", "peer", 1.99, 2**20),
    )
]


def test_names_at_lines_that_end_together_are_apart_and_in_order():
    figure = plot_sizes(SIZES, "title")
    for panel in figure.axes:
        names = names_in(panel)
        heights = [height for _, height in names]
        assert len(names) == 4
        assert all(b - a > 0.05 for a, b in itertools.pairwise(heights))
    speeds = [name for name, _ in names_in(figure.axes[0])]
    assert speeds[0] == "sdp-flash"
    assert speeds[-1] == "linear"
    pyplot().close(figure)


def test_a_layer_is_points_with_numbers_clear_of_their_quartiles():
    figure = plot_layer([r for r in SIZES if r.width == 256], "title")
    times, memory = figure.axes
    assert not times.patches
    assert not memory.patches
    (first,) = (note for note in times.texts if note.get_text().startswith("8 ms"))
    assert first.xy[0] == pytest.approx(8.8)  # where its quartiles end
    assert [label.get_text() for label in times.get_yticklabels()][1] == "states  1k"
    assert plot_layer([], "title") is None
    pyplot().close(figure)


def test_a_generation_has_three_colours_and_names_in_its_bars():
    def timing(ms):
        return Timing(ms, ms, ms, 1)

    layers = {"IN01": timing(40.0), "OUT11": timing(1.0)}
    rows = [
        ImageRow("sdpa", "attention", 64, 64, [], layers, timing(100.0), timing(2.0), 1.0, 1.0),
        ImageRow("high", "hyena", 64, 64, ["OUT11"], layers, timing(100.0), timing(2.0), 1.0, 1.0),
    ]
    figure = plot_image(rows, "title")
    steps = figure.axes[0]
    assert len({patch.get_facecolor() for patch in steps.patches}) == 3
    assert [text.get_text() for text in steps.texts].count("IN01") == 2
    assert "OUT11" not in [text.get_text() for text in steps.texts]  # too narrow for its name
    pyplot().close(figure)


def test_numbers_on_logarithmic_axes_are_plain():
    figure, panel = pyplot().subplots()
    panel.plot([1, 2], [1e-5, 1e-1])
    panel.set_yscale("log")
    plain_logarithm(panel.yaxis)
    label_ends(panel, [], 2)
    figure.canvas.draw()
    texts = [label.get_text() for label in panel.get_yticklabels() if label.get_text()]
    assert "0.001" in texts
    assert not any("$" in text for text in texts)
    pyplot().close(figure)


def test_errors_that_are_too_small_to_draw_are_said(monkeypatch):
    def bands(size):
        return {"bands": [{"relative_error": size}, {"relative_error": size / 2}]}

    rows = [
        SimpleNamespace(label=label, kind=kind, unet={"conditional": bands(size)}, layers={"IN01": bands(size)})
        for label, kind, size in (("student", "student", 0.1), ("other backend", "yardstick", 1e-13))
    ]
    kept = []
    monkeypatch.setattr(evaluate_plot, "rendered", lambda figure: kept.append(figure) or b"png")
    assert evaluate_plot.plot_errors(SimpleNamespace(rows=rows, bands=[(0, 499), (500, 999)])) == b"png"
    for panel in kept[0].axes:
        assert [name for name, _ in names_in(panel)] == ["student"]
        assert panel.get_xlabel().endswith("below 1e-08: other backend")
    pyplot().close(kept[0])
