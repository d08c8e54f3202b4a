"""What an evaluation leaves in its folder: figures as JSON and Markdown, a contact sheet, ``report.html``."""

from __future__ import annotations

import html
from pathlib import Path

from PIL import Image

from .. import strict_json
from ..files import Claim, make_folder
from ..generate.draw import contact_sheet, to_png
from . import page
from .plot import plot_errors
from .run import Evaluation, Row, command
from .settings import FILES
from .tables import all_tables, decibels, markdown_table, short

SHEET_COLUMNS = 8
SHEET_SIDES = (192, 384)  # px; smaller pictures are enlarged on the sheet, larger ones reduced


def write_report(folder: Path, result: Evaluation, more: str = "", claim: Claim | None = None) -> list[Path]:
    """Writes evaluation.json, evaluation.md, sheet.png, report.html and, if errors were measured, errors.png,
    replacing what ``claim`` allows, else all.

    ``more`` is HTML for the end of the page. Returns what was written. Raises SdHyenaError if the folder cannot be
    written to.
    """
    paths = [make_folder(folder) / name for name in FILES]
    claim = claim or Claim(paths)
    plot = plot_errors(result)
    contents: tuple[str | bytes, ...] = (
        _html(result, plot, more),
        markdown(result),
        strict_json.dumps(result.figures(), str(paths[2]), 2) + "\n",
        to_png(sheet(result)),
        plot,
    )
    if not plot:  # nor is there one of these figures
        claim.remove(paths[-1])
    return [claim.write(path, data) for path, data in zip(paths, contents, strict=True) if data]


def sheet(result: Evaluation) -> Image.Image:
    """The teacher's pictures above each student's, from the first student's best PSNR to its worst, each with its
    PSNR over it."""
    shown = [result.teacher, *result.students]
    rows, labels = [], []
    for start in range(0, len(result.prompts), SHEET_COLUMNS):
        places = result.ranking[start : start + SHEET_COLUMNS]
        for row in shown:
            rows.append([_resized(row.drawing.images[i]) for i in places])
            labels.append([_caption(result, row, i) for i in places])
    return contact_sheet(rows, labels)


def _caption(result: Evaluation, row: Row, place: int) -> str:
    if row.distances is None:
        return result.prompts[place]
    return f"{row.label}: {decibels(row.distances.psnr[place])}"


def _resized(image: Image.Image) -> Image.Image:
    low, high = SHEET_SIDES
    side = max(image.size)
    if side < low:
        return image.resize([n * -(-low // side) for n in image.size], Image.Resampling.NEAREST)
    if side > high:
        return image.resize([max(1, round(n * high / side)) for n in image.size], Image.Resampling.LANCZOS)
    return image


def markdown(result: Evaluation) -> str:
    """The tables, and where and how they were measured."""
    parts = ["# Teacher against student", f"`{command(result.settings)}`", _where(result)]
    for table in all_tables(result):
        parts += [f"## {table.title}", table.note, markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def _where(result: Evaluation) -> str:
    s, facts = result.settings, ", ".join(f"{k} {v}" for k, v in result.machine.items())
    return f"{s.width}x{s.height} px, {s.steps} steps, guidance {s.cfg_scale:g}, seeds from {s.seed}; {facts}."


def _html(result: Evaluation, plot: bytes, more: str) -> str:
    first, tables = result.students[0], all_tables(result)
    parts = [
        f"<h1>{html.escape(result.settings.model)}: teacher against {html.escape(first.label)}</h1>",
        "<p>The same held-out prompts, drawn from the same seeds with the teacher's self-attention and with Hyena "
        "layers in its place.</p>",
        page.keys(_keys(result)),
    ]
    for number, table in enumerate(tables):
        parts.append(f"<h2>{html.escape(table.title)}</h2>" + page.table(table.headings, table.lines))
        parts.append(f'<p class="note">{html.escape(table.note)}</p>')
        if number == 0:
            parts.append(_pictures(result))
            if plot:
                source = page.inline(plot, "image/png")
                parts.append(f'<h2>Error by timestep</h2><img class="plot" alt="error by timestep" src="{source}">')
    parts.append(f"<h2>Where and how</h2><p>{html.escape(_where(result))}</p>")
    parts.append(f"<p><code>{html.escape(command(result.settings))}</code></p>")
    return page.page(f"sd-hyena evaluate: {first.label}", *parts, more)


def _keys(result: Evaluation) -> list[tuple[str, str]]:
    first = result.students[0]
    assert first.distances is not None
    figures = first.distances.figures()
    keys = [
        (decibels(figures["psnr_mean_db"]), "mean PSNR, student to teacher"),
        (decibels(figures["psnr_min_db"]), "PSNR of the worst picture"),
        (f"{figures['ssim_mean']:.3f}", "mean SSIM"),
    ]
    if first.layer_error is not None:
        keys.append((short(first.layer_error), "relative error per layer, mean"))
        keys.append((short(first.unet["conditional"]["relative_error"]), "prediction error of the UNet, mean"))
    if "prompt_fidelity" in first.scores:
        asked = [row.scores["prompt_fidelity"] for row in (first, result.teacher)]
        keys.append((f"{asked[0]:.0%} / {asked[1]:.0%}", "prompt fidelity, student / teacher"))
    return keys


def _pictures(result: Evaluation) -> str:
    """Every prompt's pictures, from the first student's best to its worst."""
    shown = [result.teacher, *result.students]
    names = ", ".join(row.label for row in shown)
    items = []
    for i in result.ranking:
        values = [decibels(row.distances.psnr[i]) for row in shown if row.distances]
        items.append(([row.drawing.images[i] for row in shown], f"{result.prompts[i]} - {', '.join(values)}"))
    return f"<h2>Pictures, best to worst: {html.escape(names)}</h2>{page.pairs(items)}"
