"""What was found, in tables and words: for the terminal, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .. import strict_json
from ..evaluate.tables import Table, markdown_table
from ..files import Claim, make_folder
from ..machine import describe
from ..texts import in_markdown
from .figures import plot_displacement, plot_heads
from .heads import ORACLES, WINDOW, WINDOWS
from .run import Anatomy, LayerAnatomy
from .settings import FILES

# Thresholds of the advice, shares of a layer's output that an oracle may leave.
FLAT, LOCAL = 0.05, 0.1
SPREAD = 0.75  # of log L: attention that is called flat
FEW_CELLS = 64


def advice(layer: LayerAnatomy) -> str:
    """What could take the layer's place, from what the oracles leave."""
    if layer.cells <= FEW_CELLS:
        return "few cells: attention costs little, keep it"
    low, both = layer.error("rank"), layer.error("window+rank")
    if low <= FLAT or (low <= LOCAL and both > low / 2):  # what is near adds little
        what = "flat" if layer.mean("entropy") >= SPREAD else "low rank"
        return f"{what}: --operator linear {'is enough' if low <= FLAT else 'comes close'} (error {low:.3f})"
    if both <= LOCAL:
        return f"local and low rank: --operator states (error {both:.3f})"
    return f"high rank: keep attention (at best error {min(map(layer.error, ORACLES)):.2f})"


def tables(result: Anatomy) -> list[Table]:
    """Layers, what changes with the timestep, and heads."""
    return [_layers(result), _bands(result), _heads(result)]


def _layers(result: Anatomy) -> Table:
    columns: list[tuple[str, Callable[[LayerAnatomy], str]]] = [
        ("layer", lambda layer: layer.name),
        ("grid", lambda layer: f"{layer.size[0]}x{layer.size[1]}"),
        ("entropy", lambda layer: f"{layer.mean('entropy'):.2f}"),
        *((f"in {size}x{size}", partial(_mass, size)) for size in WINDOWS),
        ("uniform", lambda layer: f"{layer.mean(f'uniform_{WINDOW}'):.2f}"),
        ("stable rank", lambda layer: f"{layer.mean('stable_rank'):.1f}"),
        ("window", lambda layer: f"{layer.error('window'):.3f}"),
        ("rank r", lambda layer: f"{layer.error('rank'):.3f}"),
        ("both", lambda layer: f"{layer.error('window+rank'):.3f}"),
        ("mean", lambda layer: f"{layer.error('displacement'):.3f}"),
        ("advice", advice),
    ]
    note = (
        "Entropy: 1 is attention that looks everywhere alike. In 3x3 and so on: the share of the attention within that "
        "many cells; uniform: what uniform attention would have within 7x7. Window (7x7), rank r, both, mean "
        "(attention by displacement): the error of the layer's output if only that part of the attention is kept; 1 is "
        f"that of always giving the mean. r is {result.settings.rank}, or an eighth of the cells."
    )
    sampled = [layer for layer in result.layers if layer.queries < layer.cells]
    if sampled:
        note += f" Grids of more than {sampled[0].queries} cells were looked at from so many of them."
    lines = [[text(layer) for _, text in columns] for layer in result.layers]
    return Table("self-attention, layer by layer", note, [name for name, _ in columns], lines)


def _mass(size: int, layer: LayerAnatomy) -> str:
    return f"{layer.mean(f'mass_{size}'):.2f}"


def _heads(result: Anatomy) -> Table:
    lines = []
    for layer in result.layers:
        columns = [layer.head(name) for name in ("entropy", f"mass_{WINDOW}", f"uniform_{WINDOW}", "stable_rank")]
        columns += [layer.head_error(name) for name in ("window", "rank", "window+rank", "displacement")]
        for number, (entropy, mass, uniform, rank, *errors) in enumerate(zip(*columns, strict=True)):
            figures = [f"{entropy:.2f}", f"{mass:.2f} ({uniform:.2f})", f"{rank:.1f}", *(f"{e:.3f}" for e in errors)]
            lines.append([layer.name, str(number), *figures])
    headings = ["layer", "head", "entropy", "in 7x7", "stable rank", "window", "rank r", "both", "mean"]
    return Table("head by head", "Errors are of each head's own part of the layer's output.", headings, lines)


def _bands(result: Anatomy) -> Table:
    headings = ["layer", *(f"t {first}-{last}" for first, last in result.bands)]
    lines = []
    for layer in result.layers:
        texts = [f"{b['errors']['rank']:.3f} / {b['errors']['window+rank']:.3f}" for b in layer.bands]
        lines.append([layer.name, *texts])
    return Table(
        "by timestep",
        "Errors if only rank r of the attention is kept / only a 7x7 window and rank r of the rest.",
        headings,
        lines,
    )


def markdown(result: Anatomy) -> str:
    """The tables, and what was looked at, where and how."""
    s = result.settings
    where = f"{s.width}x{s.height} px, {describe(result.machine)}, {result.machine['date']}."
    parts = [f"# Anatomy of {in_markdown(s.name)}", f"`{result.command()}`", where]
    for table in tables(result):
        parts += [f"## {table.title.capitalize()}", table.note, markdown_table(table)]
        if table.headings[-1] == "advice":
            parts += ["![layers by heads](anatomy.png)", "![attention by displacement](displacement.png)"]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, result: Anatomy, claim: Claim | None = None) -> list[Path]:
    """Writes anatomy.md, anatomy.json, anatomy.png and displacement.png, replacing what ``claim`` allows, else all;
    returns their paths. Raises SdHyenaError if the folder cannot be written to."""
    paths = [make_folder(folder) / name for name in FILES]
    claim = claim or Claim(paths)
    contents: tuple[str | bytes, ...] = (
        markdown(result),
        strict_json.dumps(result.record(), str(paths[1]), 1) + "\n",
        plot_heads(result),
        plot_displacement(result),
    )
    return [claim.write(path, data) for path, data in zip(paths, contents, strict=True)]
