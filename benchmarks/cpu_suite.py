"""The CPU benchmarks in about five minutes: ``make bench``. Writes benchmarks/results/cpu.md, .json and figures.

``--full`` adds what takes attention minutes: forward and backward at 2048 px.

The time and memory of one layer at 512 px (batch 2), 1024 px and 2048 px, forward and with backward, and a whole
generation of the bundled model at 1024 px.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from sd_hyena.benchmark import report
from sd_hyena.benchmark.image import measure_image
from sd_hyena.benchmark.measure import Limits
from sd_hyena.benchmark.pipelines import prepare
from sd_hyena.benchmark.settings import ALL_KINDS, GROUPS, ImageSettings
from sd_hyena.benchmark.suite import Suite

OURS, PLAINER, PUBLISHED = "hyena2d-full-linear", "hyena2d-full-mean", "hyena-causal"
BRIEF = [kind for kind in ALL_KINDS if kind in (*GROUPS["sdp"][1:], "linear", PUBLISHED, OURS, PLAINER)]
BY_SIZE = [kind for kind in ALL_KINDS if kind in (*BRIEF, "hypertile", "projections")]
SHAPES = ((512, 2), (1024, 1), (2048, 1))  # px, batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "cpu"), help="STEM of the files")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--full", action="store_true", help="forward and backward at 2048 px too: four minutes more")
    args = parser.parse_args()
    shapes, image = (((64, 2), (128, 1)), 128) if args.quick else (SHAPES, 1024)
    command = "python benchmarks/cpu_suite.py" + (" --quick" if args.quick else "") + (" --full" if args.full else "")
    suite = Suite(args.out, "CPU: one layer, and a whole generation", command, "cpu", torch.float32, print)
    few = Limits(repeats=2, budget=0.5) if args.quick else Limits(repeats=9, budget=6, max_seconds=90)
    widths = [64, 128] if args.quick else [256, 512, 768, 1024, 2048]
    first, batch = shapes[0]

    suite.section("By image size", lambda: suite.sizes(widths, BY_SIZE, few))
    suite.section(
        f"Every kind at {first} px, batch {batch}", lambda: suite.layer(first, batch, list(ALL_KINDS), Limits(9, 12))
    )
    for width, count in shapes if args.full or args.quick else shapes[:-1]:
        limits = Limits(repeats=7, budget=6, max_seconds=400)
        suite.section(
            f"Forward and backward at {width} px, batch {count}",
            lambda width=width, count=count, limits=limits: suite.layer(width, count, BRIEF, limits, backward=True),
        )
    suite.section(f"The bundled model at {image} px", lambda: whole_image(suite, image))
    suite.section("In short", lambda: summary(suite, shapes), first=True)
    for failure in suite.failures:
        print(failure, file=sys.stderr)
    return 1 if suite.failures else 0


def whole_image(suite: Suite, width: int) -> str:
    """The bundled model with untrained layers at its finest level: they cost what trained ones do."""
    settings = ImageSettings(
        model="demo", target="high", width=width, height=width, steps=4, repeats=2, dtype="float32", device="cpu"
    )
    pipe, entries, generate = prepare(settings)
    rows = measure_image(pipe, entries, generate, (width, width), settings.steps, settings.repeats, 1, suite.say)
    title = f"the bundled model, {width}x{width} px, {settings.steps} steps, guidance, float32"
    return suite.image("image", title, rows)


def summary(suite: Suite, shapes: tuple[tuple[int, int], ...]) -> str:
    """The ratios that matter, from the rows above."""
    rows = {(row.width, row.batch, row.kind, row.backward): row for row in suite.rows if row.timing}
    best = {(row.width, row.batch, row.backward): row for row in rows.values() if row.best}

    def cell(width: int, batch: int, kind: str, other: str, backward: bool, what: str) -> str:
        ours = rows.get((width, batch, kind, backward))
        rival = rows.get((width, batch, other, backward)) if other else best.get((width, batch, backward))
        if ours is None or rival is None:
            return "-"
        if what == "memory":
            return f"{ours.peak_bytes / rival.peak_bytes:.2f}"
        return f"{rival.timing.median / ours.timing.median:.1f}x"

    lines = [
        [label, *(cell(width, batch, kind, other, backward, what) for width, batch in shapes)]
        for label, kind, other, backward, what in (
            (f"{OURS} (the default), forward: times faster than the best SDPA", OURS, "", False, "time"),
            (f"... than the published operator ({PUBLISHED})", OURS, PUBLISHED, False, "time"),
            ("... its peak memory / the best SDPA's", OURS, "", False, "memory"),
            ("... forward + backward: times faster than the best SDPA", OURS, "", True, "time"),
            ("... its peak memory / the best SDPA's", OURS, "", True, "memory"),
            (f"{PLAINER}, forward: times faster than the best SDPA", PLAINER, "", False, "time"),
            ("... its peak memory / the best SDPA's", PLAINER, "", False, "memory"),
        )
    ]
    return report.markdown_table(["", *(f"{width} px b{batch}" for width, batch in shapes)], lines)


if __name__ == "__main__":
    raise SystemExit(main())
