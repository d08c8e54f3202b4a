"""``report.html``: one file that opens by itself, pictures included."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from ..benchmark.report import size_lines
from ..evaluate import page
from ..evaluate.tables import ATTRIBUTE, decibels
from ..files import atomic_path

if TYPE_CHECKING:
    from .run import Demonstration


def write_report(folder: Path, result: Demonstration) -> None:
    """Writes ``report.html`` into ``folder``, which already holds times.svg."""
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(_page(folder, result), encoding="utf-8")


def _page(folder: Path, result: Demonstration) -> str:
    teacher, student = result.evaluation.rows
    distances, where = student.distances, result.machine
    assert distances is not None
    asked = [f"{row.scores['prompt_fidelity']:.0%}" for row in (student, teacher)]
    widest = max(row.width for row in result.rows if row.family == "attention")
    fastest = max(row.ratio for row in result.rows if row.ratio and row.width == widest and "hyena2d" in row.kind)
    keys = (
        (decibels(distances.figures()["psnr_mean_db"]), "mean PSNR, student to teacher"),
        (" / ".join(asked), "prompt fidelity, student / teacher"),
        (f"{result.mean_error:.3f}", "relative error per layer, mean"),
        (f"{fastest:.1f}x", f"one layer against attention at {widest} px"),
    )
    pairs = [
        ((teacher.drawing.images[i], student.drawing.images[i]), f"{prompt} - {decibels(distances.psnr[i])}")
        for i, prompt in enumerate(result.evaluation.prompts)
    ]
    return page.page(
        "sd-hyena demonstration",
        f"""<h1>sd-hyena: five self-attention layers replaced by Hyena layers</h1>
<p>The bundled model drew its own training data; five Hyena layers (IN01, IN02, OUT09, OUT10, OUT11) learned from its
attention in {result.training.seconds:.0f} s; then both drew the same held-out prompts from the same seeds.</p>
{page.keys(keys)}
<h2>Attention (left) and Hyena (right), same prompt and seed</h2>
{page.pairs(pairs)}
<h2>How close each layer is</h2>
<p>Relative error |y - t|&sup2; / |t - mean|&sup2; on held-out latents; 1 is what a constant would score.</p>
{page.table(("layer", "relative error", "cosine"), _layers(result))}
<h2>What a recognition scorer sees in the pictures</h2>
<p>A classifier trained on rendered scenes only. Share of pictures showing what the prompt asked for.</p>
{page.table(("", "teacher", "student"), _fidelity(result))}
<h2>Time of one layer</h2>
<p>A whole layer of Stable Diffusion 1.x's finest level (320 channels, 8 heads, projections included), float32, batch 1.
In brackets the best attention's time over this one's. Losses are shown too.</p>
<img class="plot" alt="time per layer against image width" src="{page.inline(folder / "times.svg", "image/svg+xml")}">
{page.table(*size_lines(result.rows))}
<p>On the bundled model itself one 256 px picture took {teacher.drawing.seconds:.2f} s with attention and
{student.drawing.seconds:.2f} s with Hyena.</p>
<h2>Where</h2>
<p>{html.escape(where["cpu"])}, {where["threads"]} threads, torch {where["torch"]}, Python {where["python"]},
{where["date"]}; {result.seconds:.0f} s in all. Made by <code>sd-hyena demo</code>.</p>""",
    )


def _layers(result: Demonstration) -> list[tuple[str, ...]]:
    figures = result.training.figures.items()
    return [(name, f"{f['relative_error']:.4f}", f"{f['cosine']:.4f}") for name, f in figures]


def _fidelity(result: Demonstration) -> list[tuple[str, ...]]:
    rows = result.evaluation.rows
    return [
        (name.removesuffix(ATTRIBUTE).replace("_", " "), *(f"{row.scores[name]:.1%}" for row in rows))
        for name in rows[0].scores
    ]
