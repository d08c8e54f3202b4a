"""``report.html``: one file that opens by itself, pictures included."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..benchmark.report import size_lines
from ..files import atomic_path

if TYPE_CHECKING:
    from .run import Demonstration

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .8rem 0 } th, td { padding: .25rem .8rem; text-align: right }
th { border-bottom: 1px solid #999; font-weight: 600 } td:first-child, th:first-child { text-align: left }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.2rem }
.pair img { width: 49%; image-rendering: auto } .pair p { margin: .2rem 0; font-size: .85rem; color: #444 }
.key { display: flex; gap: 2.5rem; flex-wrap: wrap } .key div { font-size: .9rem; color: #555 }
.key b { display: block; font-size: 1.7rem; color: #222 } img.plot { max-width: 100% } code { background: #f2f2f2 }
"""


def write_report(folder: Path, result: Demonstration) -> None:
    """Writes ``report.html`` into ``folder``, which already holds times.svg."""
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(_page(folder, result), encoding="utf-8")


def _page(folder: Path, result: Demonstration) -> str:
    pairs, where = result.comparison, result.machine
    asked = {who: pairs.fidelity[who]["prompt"] for who in ("teacher", "student")}
    widest = max(row.width for row in result.rows if row.family == "attention")
    fastest = max(row.ratio for row in result.rows if row.ratio and row.width == widest and "hyena2d" in row.kind)
    keys = (
        (f"{pairs.mean_psnr:.1f} dB", "mean PSNR, student to teacher"),
        (f"{asked['student']:.0%} / {asked['teacher']:.0%}", "prompt fidelity, student / teacher"),
        (f"{result.mean_error:.3f}", "relative error per layer, mean"),
        (f"{fastest:.1f}x", f"one layer against attention at {widest} px"),
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>sd-hyena demonstration</title><style>{_STYLE}</style></head><body>
<h1>sd-hyena: five self-attention layers replaced by Hyena layers</h1>
<p>The bundled model drew its own training data; five Hyena layers (IN01, IN02, OUT09, OUT10, OUT11) learned from its
attention in {result.training.seconds:.0f} s; then both drew the same held-out prompts from the same seeds.</p>
<div class="key">{"".join(f"<div><b>{value}</b>{label}</div>" for value, label in keys)}</div>
<h2>Attention (left) and Hyena (right), same prompt and seed</h2>
<div class="pairs">{"".join(_pair(result, i) for i in range(len(pairs.prompts)))}</div>
<h2>How close each layer is</h2>
<p>Relative error |y - t|&sup2; / |t - mean|&sup2; on held-out latents; 1 is what a constant would score.</p>
{_table(("layer", "relative error", "cosine"), _layers(result))}
<h2>What a recognition scorer sees in the pictures</h2>
<p>A classifier trained on rendered scenes only. Share of pictures showing what the prompt asked for.</p>
{_table(("", "teacher", "student"), _fidelity(result))}
<h2>Time of one layer</h2>
<p>A whole layer of Stable Diffusion 1.x's finest level (320 channels, 8 heads, projections included), float32, batch 1.
In brackets the best attention's time over this one's. Losses are shown too.</p>
<img class="plot" alt="time per layer against image width" src="{_inline(folder / "times.svg", "image/svg+xml")}">
{_table(*_times(result))}
<p>On the bundled model itself one 256 px picture took {pairs.teacher_seconds:.2f} s with attention and
{pairs.student_seconds:.2f} s with Hyena.</p>
<h2>Where</h2>
<p>{html.escape(where["cpu"])}, {where["threads"]} threads, torch {where["torch"]}, Python {where["python"]},
{where["date"]}; {result.seconds:.0f} s in all. Made by <code>sd-hyena demo</code>.</p>
</body></html>
"""


def _pair(result: Demonstration, i: int) -> str:
    pairs = result.comparison
    images = "".join(f'<img alt="" src="{_png(p)}">' for p in (pairs.teacher[i], pairs.student[i]))
    return f'<div class="pair">{images}<p>{html.escape(pairs.prompts[i])} - {pairs.psnr[i]:.1f} dB</p></div>'


def _layers(result: Demonstration) -> list[tuple[str, ...]]:
    figures = result.training.figures.items()
    return [(name, f"{f['relative_error']:.4f}", f"{f['cosine']:.4f}") for name, f in figures]


def _fidelity(result: Demonstration) -> list[tuple[str, ...]]:
    scores = result.comparison.fidelity
    return [(name, *(f"{scores[who][name]:.1%}" for who in ("teacher", "student"))) for name in scores["teacher"]]


def _times(result: Demonstration) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    headings, lines = size_lines(result.rows)
    return tuple(headings), [tuple(line) for line in lines]


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()
