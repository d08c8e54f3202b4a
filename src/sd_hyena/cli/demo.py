"""``sd-hyena demo``."""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import given_path
from ..errors import UsageError
from ..files import refuse_existing
from ..interrupts import Interrupted
from ..settings import MANY, STEPS, check_number, check_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out_dir", default="demo-out", help="folder to write (default: %(default)s)")
    parser.add_argument("-n", "--n_steps", type=int, default=160, help="training steps (default: %(default)s)")
    parser.add_argument("--n_images", type=int, default=24, help="pictures to learn from (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts to draw (default: %(default)s)")
    parser.add_argument("-s", "--steps", type=int, default=30, help="diffusion steps (default: %(default)s)")
    parser.add_argument("--widths", default="256,512,1024", help="image widths to time (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demonstration's files")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: %(default)s)")


def run(args: dict[str, Any]) -> int:
    from ..benchmark.settings import parse_widths
    from .device import choose_device

    widths = parse_widths(args["widths"])
    for name, most in (("n_steps", MANY), ("n_images", 1_000_000), ("prompts", 10_000), ("steps", STEPS)):
        check_number(name, args[name], 1, most)
    out = given_path(args["out_dir"], "--out_dir")
    check_path("--out_dir", str(out), folder=True)

    from ..demo.run import MARK, DemoSettings, demonstrate
    from ..distill.state import STATE
    from ..evaluate.tables import all_tables
    from .display import console, phase, print_tables, training_progress

    device = choose_device(args["device"])
    settings = DemoSettings(
        out_dir=str(out),
        n_steps=args["n_steps"],
        prompts=args["prompts"],
        steps=args["steps"],
        widths=tuple(widths),
        n_images=args["n_images"],
        device=device,
    )
    refuse_existing([*settings.outputs(), out / STATE], args["overwrite"])
    if (out / STATE).exists() and not (out / MARK).exists() and not (out / "report.html").exists():
        raise UsageError(f"{out} holds a training run that is no demonstration's: choose another --out_dir")
    try:
        with training_progress(settings.n_steps) as advance:
            result = demonstrate(settings, phase, advance)
    except Interrupted as wish:
        wish.kept = "the same command with --overwrite starts again"
        raise
    print_tables(all_tables(result.evaluation))
    for row in result.rows:
        if row.timing and row.ratio and row.family != "attention":
            speed = f"{row.timing.median:.1f} ms, {row.ratio:.2f}x the best attention's speed"
            if not row.timing.steady:
                speed = f"{row.timing.low:.1f} to {row.timing.high:.1f} ms: unsteady, other work is in the way"
            console.print(f"{row.width} px, one layer: {row.kind} {speed}")
    console.print(f"{result.seconds:.0f} s in all; open {(out / 'report.html').resolve()}", soft_wrap=True)
    return 0
