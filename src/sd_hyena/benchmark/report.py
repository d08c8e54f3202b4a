"""Measured rows as JSON, CSV and Markdown, and earlier ones read back to compare with."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import strict_json
from ..errors import UsageError
from ..machine import describe
from ..texts import in_markdown
from .image import ImageRow
from .measure import Row, crossover

MIB = 2**20


def records(document: dict[str, Any], markdown: str) -> dict[str, str]:
    """Files by what their names end in: ``document``, whose "rows" are flat, as JSON; those rows, with the machine's
    facts, as CSV; and ``markdown``."""
    facts = document["machine"] | {"command": document["command"]}
    rows = [row | facts for row in document["rows"]]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return {".json": to_json(document), ".csv": table.getvalue(), ".md": markdown}


def to_json(document: dict[str, Any]) -> str:
    """One row a line."""
    rows = ",\n".join(f"    {strict_json.dumps(row, 'the figures')}" for row in document["rows"])
    rest = strict_json.dumps({key: value for key, value in document.items() if key != "rows"}, "the figures", 2)
    return f'{rest[:-2]},\n  "rows": [\n{rows}\n  ]\n}}\n'


def read_document(path: str) -> dict[str, Any]:
    """An earlier run's JSON. Raises UsageError if it is none."""
    try:
        document = strict_json.load(Path(path))
        if not all({"kind", "width", "ms"} <= row.keys() for row in document["rows"]):
            raise ValueError
        describe(document["machine"])
    except OSError as error:
        raise UsageError(f"--compare {path}: cannot read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--compare {path}: not the .json of an sd-hyena benchmark") from None
    return document


def compare_records(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows in both: what, the old and the new median, how many times faster the new, and both ratios."""

    def key(row: dict[str, Any]) -> tuple:
        return tuple(row.get(name) for name in ("width", "height", "batch", "kind", "backward"))

    before = {key(row): row for row in old if row.get("ms")}
    lines = []
    for row in new:
        earlier = before.get(key(row))
        if not row.get("ms") or earlier is None:
            continue
        what = f"{row['kind']}, {row['width']}x{row['height']} px" + (", with backward" if row.get("backward") else "")
        ratios = [f"{r['ratio']:.2f}x" if r.get("ratio") else "-" for r in (earlier, row)]
        lines.append([what, f"{earlier['ms']:.1f}", f"{row['ms']:.1f}", f"{earlier['ms'] / row['ms']:.2f}x", *ratios])
    return lines


def differing_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings of two documents that make their times incomparable, "name: before, now"."""
    one, other = old.get("settings", {}), new.get("settings", {})
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f"{name}: {one.get(name)} before, {other.get(name)} now" for name in names]


COMPARED = ["", "before, ms", "now, ms", "faster", "ratio before", "ratio now"]


def layer_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines for the rows of one shape that were timed. Ratio: the best attention's median over this."""
    lines = []
    for row in rows:
        if row.timing:
            ratio = f"{row.ratio:.2f}x" if row.ratio else ""
            spread = f"{row.timing.low:.3g}-{row.timing.high:.3g}" if row.timing.repeats > 1 else "one call"
            lines.append(
                [
                    row.kind,
                    f"{row.parameters:,}",
                    f"{row.timing.median:.1f}",
                    spread,
                    "best" if row.best else ratio,
                    f"{(row.peak_bytes or 0) / MIB:.1f}",
                ]
            )
    return ["kind", "parameters", "ms", "quartiles", "ratio", "peak MiB"], lines


def size_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines with one kind a line, one width a column: ms and ratio."""
    widths = list(dict.fromkeys(row.width for row in rows))
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows):
        own = {row.width: row for row in rows if row.kind == kind}
        if any(row.timing for row in own.values()):
            lines.append([kind, *(_cell(own.get(width)) for width in widths)])
    return ["kind", *(f"{width} px" for width in widths)], lines


def memory_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """As :func:`size_lines`, peak memory in MiB."""
    widths = list(dict.fromkeys(row.width for row in rows))
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows):
        own = {row.width: row for row in rows if row.kind == kind and row.timing}
        if own:
            cells = [f"{(own[width].peak_bytes or 0) / MIB:.1f}" if width in own else "-" for width in widths]
            lines.append([kind, *cells])
    return ["kind", *(f"{width} px" for width in widths)], lines


def crossover_lines(rows: Sequence[Row]) -> list[str]:
    """Where each rival of attention overtakes the best attention."""
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows if row.family in ("hyena", "peer") and row.ratio):
        at = crossover(rows, kind)
        lines.append(f"{kind}: " + (f"faster than attention from {at} px" if at else "no faster at the largest size"))
    return lines


def _cell(row: Row | None) -> str:
    if row is None or row.timing is None:
        return "-"
    if not row.timing.steady:
        return f"{row.timing.low:.1f} to {row.timing.high:.1f} (unsteady)"
    return f"{row.timing.median:.1f} ({row.ratio:.2f}x)" if row.ratio else f"{row.timing.median:.1f}"


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column left-aligned, the others right-aligned."""
    rule = "|".join(["---"] + ["---:"] * (len(headings) - 1))
    return (
        "\n".join(
            [
                f"| {' | '.join(headings)} |",
                f"|{rule}|",
                *(f"| {' | '.join(map(in_markdown, line))} |" for line in lines),
            ]
        )
        + "\n"
    )


def skipped(rows: Sequence[Row] | Sequence[ImageRow]) -> list[str]:
    """One line for everything that was not measured, each reason once."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for record in (row.record() for row in rows):
        if record["ms"] is None:
            reasons.setdefault((record["kind"], record["note"]), []).append(record["width"])
    everywhere = len({row.width for row in rows})
    return [
        f"{kind}{'' if len(widths) == everywhere else ' at ' + ', '.join(f'{w} px' for w in widths)}: {note}"
        for (kind, note), widths in reasons.items()
    ]


def image_lines(rows: Sequence[ImageRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: whole generations."""
    lines = []
    for row in rows:
        if row.step and row.seconds:
            lines.append(
                [
                    row.entry,
                    f"{row.seconds.median:.2f}",
                    f"{row.ratio:.2f}x" if row.ratio else "",
                    f"{row.step.median:.0f}",
                    f"{row.step_ratio:.2f}x" if row.step_ratio else "",
                    f"{(row.unet_peak_bytes or 0) / MIB:.0f}",
                    f"{(row.peak_bytes or 0) / MIB:.0f}",
                ]
            )
    return ["", "s/image", "ratio", "ms/step", "ratio", "UNet MiB", "all MiB"], lines


def image_layer_lines(rows: Sequence[ImageRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: one self-attention layer a line, one entry a column; * where it is a Hyena layer."""
    shown = [row for row in rows if row.step]
    names = list(dict.fromkeys(name for row in shown for name in row.layers))
    lines = [
        [name, *(f"{row.layers[name].median:.1f}{'*' if name in row.replaced else ''}" for row in shown)]
        for name in names
    ]
    lines.append(["all", *(f"{sum(t.median for t in row.layers.values()):.1f}" for row in shown)])
    return ["layer", *(row.entry for row in shown)], lines


def checked(rows: Sequence[Row] | Sequence[ImageRow]) -> str:
    """One sentence on how far anything was from its definition."""
    errors = [row.error for row in rows if row.error is not None]
    if not errors:
        return "Nothing was measured."
    return f"Every kind agrees with its definition at the shapes timed: relative RMS error at most {max(errors):.0e}."
