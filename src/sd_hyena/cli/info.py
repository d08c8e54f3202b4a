"""``sd-hyena info FILE``."""

from __future__ import annotations

import argparse
from typing import Any

from .. import strict_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a Hyena file of ours or of the 2024 sd-hyena, a folder or a hub id")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: dict[str, Any]) -> int:
    from rich.table import Table

    from ..checkpoint import describe, load
    from ..combine import dtype_of
    from ..fingerprint import SAMPLE
    from .display import console

    file = load(args["file"])
    counts = {name: sum(t.numel() for t in tensors.values()) for name, tensors in file.tensors.items()}
    types = {name: dtype_of(tensors) for name, tensors in file.tensors.items()}
    if args["json"]:
        described = describe(file)
        layers = {n: v | {"parameters": counts[n], "dtype": types[n]} for n, v in described["layers"].items()}
        report = {"version": file.version, "layers": layers}
        print(strict_json.dumps(report | {key: described[key] for key in ("teacher", "training")}, file.label, 2))
        return 0
    origin = f"sd-hyena format {file.version}" if file.version else "2024 sd-hyena (one causal layer)"
    console.print(f"{args['file']}: {origin}, {' and '.join(sorted(set(types.values())))}", soft_wrap=True)
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
    for title in ("teacher", "training"):
        records: dict[str, list[str]] = {}
        for name in file.layers:
            section = getattr(file.origin(name), title)
            text = ", ".join(f"{k}={v}" for k, v in section.items() if v != "" and k != SAMPLE)
            records.setdefault(text, []).append(name)
        for text, names in records.items():
            whose = f" of {', '.join(names)}" if len(records) > 1 else ""
            if text or whose:
                console.print(f"{title}{whose}: {text or 'not recorded'}", soft_wrap=True)
    return 0
