"""``sd-hyena benchmark``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import SdHyenaError, UsageError
from ..files import atomic_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", default="256,512,768,1024", help="image widths in px (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=320, help="channels of the layer (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="attention heads (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="images at once (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of timing per size (default: %(default)s)")
    parser.add_argument("--out", default="", help="write OUT.json, OUT.md, OUT.png and OUT.svg")


def run(args: dict[str, Any]) -> int:
    widths = parse_widths(args["widths"])
    if min(args["dim"], args["heads"], args["batch_size"]) < 1 or args["dim"] % args["heads"]:
        raise UsageError("--dim, --heads and --batch_size must be at least 1, and --dim a multiple of --heads")
    from rich.table import Table

    from ..benchmark.figures import plot_sizes
    from ..benchmark.layers import crossover, machine, run_sizes
    from .display import console, phase

    where = machine()
    phase(f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}; float32, whole layers")

    def report(row: Any) -> None:
        text = f"{row.timing.median:.1f} ms" if row.timing else row.note
        ratio = f", {row.ratio:.2f}x attention's speed" if row.ratio and "SDPA" not in row.kind else ""
        phase(f"{row.width} px {row.kind}: {text}{ratio}")

    rows = run_sizes(widths, args["dim"], args["heads"], args["batch_size"], args["budget"], report)
    title = f"one layer, {args['dim']} channels, batch {args['batch_size']}: {where['cpu']}, {where['threads']} threads"
    table = Table(title=title)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    for heading in ("width", *kinds):
        table.add_column(heading, justify="right")
    lines = ["| px | " + " | ".join(kinds) + " |", "|" + "---|" * (len(kinds) + 1)]
    for width in widths:
        cells = [_cell(next(r for r in rows if r.width == width and r.kind == kind)) for kind in kinds]
        table.add_row(str(width), *cells)
        lines.append(f"| {width} | " + " | ".join(cells) + " |")
    console.print(table)
    for kind in kinds[1:]:
        at = crossover(rows, kind)
        text = f"faster than attention from {at} px" if at else "not faster than attention at any size measured"
        console.print(f"{kind}: {text}")
    if args["out"]:
        out = Path(args["out"])
        flags = " ".join(f"--{k} {args[k]}" for k in ("widths", "dim", "heads", "batch_size", "budget"))
        command = f"sd-hyena benchmark {flags}"
        facts = f"{title}, torch {where['torch']}, {where['date']}\n\n`{command}`\n\n"
        facts += "Median ms of a whole layer in float32; in brackets attention's time over this one's.\n\n"
        document = {"machine": where, "command": command, "rows": [asdict(row) for row in rows]}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            for suffix, text in ((".json", json.dumps(document, indent=2)), (".md", facts + "\n".join(lines) + "\n")):
                with atomic_path(out.with_suffix(suffix)) as temporary:
                    temporary.write_text(text)
            plot_sizes(rows, title, out.with_suffix(".png"), out.with_suffix(".svg"))
        except OSError as error:
            raise SdHyenaError(f"{out}: cannot write: {error.strerror}") from None
    return 0


def _cell(row: Any) -> str:
    if row.timing is None:
        return "skipped"
    ratio = f" ({row.ratio:.2f}x)" if row.ratio and "SDPA" not in row.kind else ""
    return f"{row.timing.median:.1f}{ratio}"


def parse_widths(text: str) -> list[int]:
    """A comma list of image widths in px, sorted. Raises UsageError."""
    try:
        widths = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--widths {text!r}: give widths in px separated by commas") from None
    bad = [w for w in widths if w < 16 or w % 8 or w > 16384]
    if bad or len(set(widths)) < len(widths):
        raise UsageError(f"--widths {text!r}: each must be a different multiple of 8 from 16 to 16384")
    return sorted(widths)
