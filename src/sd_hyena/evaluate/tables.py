"""The tables of an evaluation as headings and lines of text, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..likeness import MAX_PSNR
from ..texts import in_markdown

if TYPE_CHECKING:
    from .run import Evaluation, Row

ATTRIBUTE = "_as_asked"  # ends the names of scores that the prompt fidelity is the mean of


@dataclass
class Table:
    """A title, one line that says how to read it, headings, and lines of as many cells."""

    title: str
    note: str
    headings: list[str]
    lines: list[list[str]]


def markdown_table(table: Table) -> str:
    """Headings and lines as Markdown."""
    rule = ["---", *["---:"] * (len(table.headings) - 1)]
    return "\n".join(f"| {' | '.join(map(in_markdown, line))} |" for line in (table.headings, rule, *table.lines))


def all_tables(result: Evaluation) -> list[Table]:
    """Those that have something to show: summary, attributes, whole UNet, layers of each student."""
    tables = [summary(result), attributes(result)]
    tables += [unet(result, kind) for kind in ("conditional", "guided")]
    tables += [layers(result, row) for row in result.students]
    return [table for table in tables if table.lines]


def summary(result: Evaluation) -> Table:
    """One line for the teacher, each yardstick and student."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("", lambda row: row.label),
        ("PSNR, mean", lambda row: decibels(_distance(row, "psnr_mean_db"))),
        ("median", lambda row: decibels(_distance(row, "psnr_median_db"))),
        ("worst", lambda row: decibels(_distance(row, "psnr_min_db"))),
        ("SSIM", lambda row: f"{_distance(row, 'ssim_mean'):.3f}" if row.distances else "-"),
        ("detail", lambda row: f"{_distance(row, 'detail_mean'):.3f}" if row.distances else "-"),
        ("latent distance", lambda row: short(_distance(row, "latent_distance_mean"))),
        ("layer error", lambda row: short(row.layer_error)),
        ("UNet error", lambda row: short(row.unet.get("conditional", {}).get("relative_error"))),
        ("guided", lambda row: short(row.unet.get("guided", {}).get("relative_error"))),
    ]
    names = dict.fromkeys(name for row in result.rows for name in row.scores if not name.endswith(ATTRIBUTE))
    columns += [(name.replace("_", " "), _score(name)) for name in names]
    columns.append(("s/picture", lambda row: f"{row.drawing.seconds:.2f}"))
    lines = [[text(row) for _, text in columns] for row in result.rows]
    kept = [i for i in range(len(columns)) if any(line[i] != "-" for line in lines)]
    return Table(
        f"{len(result.prompts)} held-out prompts, the same seeds",
        "Measured against the teacher's own pictures and predictions. PSNR: 40 dB looks the same, 25 dB differs in "
        "details, 15 dB is another picture. Errors are relative: 1 is that of always giving the mean. Further rows of "
        "the teacher are itself with other arithmetic: differences of their size are harmless. Detail: the energy of "
        "the pictures' finest Laplacian band, over the teacher's. s/picture is of one run, start included.",
        [columns[i][0] for i in kept],
        [[line[i] for i in kept] for line in lines],
    )


def attributes(result: Evaluation) -> Table:
    """What the bundled scorer recognises, attribute by attribute."""
    names = [name for name in result.teacher.scores if name.endswith(ATTRIBUTE)]
    lines = [[row.label, *(f"{row.scores[name]:.1%}" for name in names)] for row in result.rows] if names else []
    return Table(
        "What a recognition scorer sees in the pictures",
        "Share of pictures that show what the prompt asked for; the classifier was trained on rendered scenes only.",
        ["", *(name.removesuffix(ATTRIBUTE) for name in names)],
        lines,
    )


def unet(result: Evaluation, kind: str) -> Table:
    """The UNet's prediction error by timestep band."""
    rows = [row for row in result.rows if kind in row.unet]
    what = "with the prompt" if kind == "conditional" else f"with guidance {result.settings.cfg_scale:g}"
    return Table(
        f"Prediction error of the whole UNet, {what}, by timestep",
        "|s - t|^2 / |t - mean t|^2 of the student's prediction s and the teacher's t, on noised latents of the "
        "teacher's pictures.",
        ["", "mean", *_bands(result), "cosine"],
        [
            [row.label, short(f["relative_error"]), *_each_band(f), f"{f['cosine']:.5f}"]
            for row in rows
            for f in [row.unet[kind]]
        ],
    )


def layers(result: Evaluation, row: Row) -> Table:
    """Each layer's error by timestep band, and their mean."""
    branches = list(dict.fromkeys(name for f in row.layers.values() for name in f.get("without", ())))

    def off(figures: dict) -> list[str]:
        return [short(figures.get("without", {}).get(branch)) for branch in branches]

    lines = [
        [name, short(f["relative_error"]), *_each_band(f), f"{f['cosine']:.4f}", *off(f)]
        for name, f in row.layers.items()
    ]
    if lines:
        count = len(row.layers)
        cosine = sum(f["cosine"] for f in row.layers.values()) / count
        bands = [
            sum(f["bands"][b]["relative_error"] for f in row.layers.values()) / count for b in range(len(result.bands))
        ]
        lines.append(["mean", short(row.layer_error), *map(short, bands), f"{cosine:.4f}", *["" for _ in branches]])
    return Table(
        f"Relative error of each layer, by timestep: {row.label}",
        "|y - t|^2 / |t - mean t|^2 of the layer's output y and the attention's t, on the teacher's activations; "
        "without: the same with one branch of the operator switched off.",
        ["layer", "mean", *_bands(result), "cosine", *(f"without {branch}" for branch in branches)],
        lines,
    )


def short(value: float | None) -> str:
    """Four decimals, or as many digits as tell a small number."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return "identical" if value >= MAX_PSNR else f"{value:.1f} dB"


def _distance(row: Row, name: str) -> float | None:
    return row.distances.figures()[name] if row.distances else None


def _score(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.scores.get(name)
        if value is None:
            return "-"
        return f"{value:.1%}" if name == "prompt_fidelity" else f"{value:.3g}"

    return text


def _bands(result: Evaluation) -> list[str]:
    return [f"{first}-{last}" for first, last in result.bands]


def _each_band(figures: dict) -> list[str]:
    return [short(band["relative_error"]) for band in figures["bands"]]
