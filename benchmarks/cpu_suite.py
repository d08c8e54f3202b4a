"""The CPU benchmarks in five to ten minutes: ``make bench``. Writes benchmarks/results/cpu.md, .json and figures.

``--full`` adds what takes attention minutes: forward and backward at 2048 px.

The time and memory of one layer by image size, at 512 px with batch 2, and with backward; a whole generation of the
bundled model at 1024 px; and how much slower a layer gets while others use the machine too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from suite import Suite

from sd_hyena.benchmark import report
from sd_hyena.benchmark.image import measure_image
from sd_hyena.benchmark.kinds import KINDS
from sd_hyena.benchmark.measure import Limits
from sd_hyena.benchmark.pipelines import prepare
from sd_hyena.benchmark.settings import ALL_KINDS, GROUPS, ImageSettings
from sd_hyena.benchmark.timing import interleaved

OURS, PLAINER, PUBLISHED = "states", "near", "causal"
RIVALS = ("linear-elu", "linear", "windows")  # the first as anyone would write it in PyTorch
BRIEF = [k for k in ALL_KINDS if k in (*GROUPS["sdp"][1:], *RIVALS, OURS, PLAINER, PUBLISHED, "projections")]
BY_SIZE = [kind for kind in ALL_KINDS if kind in (*BRIEF, "hypertile")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "cpu"), help="STEM of the files")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--full", action="store_true", help="forward and backward at 2048 px too: four minutes more")
    args = parser.parse_args()
    command = "python benchmarks/cpu_suite.py" + (" --quick" if args.quick else "") + (" --full" if args.full else "")
    suite = Suite(args.out, "CPU: one layer, and a whole generation", command, "cpu", torch.float32, print)
    if args.quick:
        widths, first, batch, image, crowd = [64, 128], 64, 2, 128, (64, 5)
        few, usual = Limits(repeats=2, budget=0.5), Limits(repeats=3, budget=1)
    else:
        widths, first, batch, image, crowd = [256, 512, 768, 1024, 2048], 512, 2, 1024, (256, 50)
        few, usual = Limits(repeats=9, budget=12, max_seconds=90), Limits(repeats=9, budget=12, max_seconds=400)
    taught = [(first, batch), *((width, 1) for width in widths[-2:])]
    if not (args.full or args.quick):
        taught.pop()

    suite.section("By image size", lambda: suite.sizes(widths, BY_SIZE, few))
    suite.section(f"Every kind at {first} px, batch {batch}", lambda: suite.layer(first, batch, list(ALL_KINDS), usual))
    for width, count in taught:
        suite.section(
            f"Forward and backward at {width} px, batch {count}",
            partial(suite.layer, width, count, BRIEF, usual, backward=True),
        )
    suite.section(f"The bundled model at {image} px", lambda: whole_image(suite, image))
    suite.section("On a busy machine", lambda: on_a_busy_machine(suite, *crowd))
    shapes = [(first, batch), (first, 1), *((width, 1) for width in widths[-2:] if width != first)]
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


def on_a_busy_machine(suite: Suite, width: int, repeats: int) -> str:
    """Layers on two threads, idle and with every core kept busy by others."""
    shape, threads = suite.shape(width, 2), torch.get_num_threads()
    attention = next(kind for kind in GROUPS["sdp"][1:] if not KINDS[kind].missing(shape))
    x = torch.randn(shape.batch, shape.tokens, shape.dim)
    layers = {kind: KINDS[kind].build(shape).eval() for kind in (OURS, PLAINER, "linear-elu", attention)}
    calls = {kind: partial(layer, x, shape.size) for kind, layer in layers.items()}
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            interleaved(calls, suite.device, 3, 5)
            idle = interleaved(calls, suite.device, repeats, 10)
            with busy_cores():
                busy = interleaved(calls, suite.device, repeats, 20)
    finally:
        torch.set_num_threads(threads)
    lines = []
    for kind in calls:
        before, after = idle[kind].median, busy[kind].median
        record = {"kind": kind, "width": width, "batch": shape.batch, "ms": after, "ms_idle": before}
        suite.records.append({"section": "busy"} | record)
        lines.append([kind, f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}"])
    intro = f"{width} px, batch 2, two threads, milliseconds; busy: another process on each core.\n\n"
    return intro + report.markdown_table(["kind", "idle", "busy", "busy / idle"], lines)


@contextmanager
def busy_cores() -> Iterator[None]:
    """Within, as many processes as there are cores do nothing as fast as they can."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def summary(suite: Suite, shapes: list[tuple[int, int]]) -> str:
    """The ratios that matter, from the rows above."""
    rows = {(row.width, row.batch, row.kind, row.backward): row for row in suite.rows if row.timing}
    best = {(row.width, row.batch, row.backward): row for row in rows.values() if row.best}

    def line(label: str, kind: str, backward: bool, other: str, of: Callable[[Any, Any], str]) -> list[str]:
        cells = []
        for width, batch in shapes:
            ours = rows.get((width, batch, kind, backward))
            rival = rows.get((width, batch, other, backward)) if other else best.get((width, batch, backward))
            cells.append(of(ours, rival) if ours and rival else "-")
        return [label, *cells]

    def faster(ours: Any, rival: Any) -> str:
        return f"{rival.timing.median / ours.timing.median:.1f}x"

    def share(ours: Any, rival: Any) -> str:
        return f"{ours.timing.median / rival.timing.median:.2f}"

    def memory(ours: Any, rival: Any) -> str:
        return f"{ours.peak_bytes / rival.peak_bytes:.2f}"

    lines = []
    for kind in (OURS, PLAINER):
        for backward in (False, True):
            how = f"{kind}, {'forward + backward' if backward else 'forward'}"
            lines += [
                line(f"{how}: time / the four projections' alone", kind, backward, "projections", share),
                line("... times faster than the best SDPA", kind, backward, "", faster),
                line("... than the published operator", kind, backward, PUBLISHED, faster),
                line("... time / linear-elu's", kind, backward, "linear-elu", share),
                line("... peak memory / the best SDPA's", kind, backward, "", memory),
            ]
    text = report.markdown_table(["", *(f"{width} px b{batch}" for width, batch in shapes)], lines)
    busy = [record for record in suite.records if record.get("section") == "busy"]
    if busy:
        at = f"{busy[0]['width']} px b{busy[0]['batch']}, two threads"
        cells = [f"{record['ms'] / record['ms_idle']:.2f}" for record in busy]
        label = f"what a busy machine does: time / the idle machine's, {at}"
        text += "\n" + report.markdown_table(["", *(record["kind"] for record in busy)], [[label, *cells]])
    return text


if __name__ == "__main__":
    raise SystemExit(main())
