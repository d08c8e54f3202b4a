"""``sd-hyena info FILE``."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a Hyena file of ours or of the 2024 sd-hyena")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: dict[str, Any]) -> int:
    from rich.table import Table

    from .. import checkpoint
    from ..fingerprint import SAMPLE
    from .display import console

    file = checkpoint.load(args["file"])
    counts = {name: sum(t.numel() for t in tensors.values()) for name, tensors in file.tensors.items()}
    if args["json"]:
        layers = {
            n: {"config": v.config.to_dict(), "parameters": counts[n], "figures": v.figures}
            for n, v in file.layers.items()
        }
        print(
            json.dumps(
                {"version": file.version, "layers": layers, "teacher": file.teacher, "training": file.training},
                indent=2,
            )
        )
        return 0
    origin = f"sd-hyena format {file.version}" if file.version else "2024 sd-hyena (one causal layer)"
    console.print(f"{args['file']}: {origin}", soft_wrap=True)
    table = Table()
    on_noise = file.training.get("measure_on") == "noise"  # else on the teacher's pictures
    errors = "error on noise" if on_noise else "held-out error"
    for heading in ("layer", "operator", "channels", "trained grid", "parameters", errors):
        table.add_column(heading, justify="left" if heading in ("layer", "operator") else "right")
    for name, layer in file.layers.items():
        c = layer.config
        error = layer.figures.get("relative_error")
        table.add_row(
            name or "(not named)",
            c.label,
            str(c.dim),
            f"{c.height}x{c.width}",
            f"{counts[name]:,}",
            "-" if error is None else f"{error:.4f}",
        )
    console.print(table)
    for title, section in (("teacher", file.teacher), ("training", file.training)):
        shown = {k: v for k, v in section.items() if v != "" and k != SAMPLE}
        if shown:
            console.print(f"{title}: " + ", ".join(f"{k}={v}" for k, v in shown.items()), soft_wrap=True)
    return 0
