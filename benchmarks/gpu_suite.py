"""Everything worth measuring on a machine with a GPU, in ten minutes at most.

Checks every kind against its definition, runs the layer, size and image benchmarks at the original's
settings (batch 8 at 512 px in fp16; batch 1 from 256 to 4096 px; the 2048 px generation on random SD 1.5
weights), and writes STEM.md, STEM.json and figures. Needs torch; without diffusers the generation is left out,
without matplotlib the figures are. Where sd-hyena is not installed: ``PYTHONPATH=src python benchmarks/gpu_suite.py``.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from sd_hyena.benchmark.kinds import KINDS
from sd_hyena.benchmark.measure import Limits
from sd_hyena.benchmark.settings import ALL_KINDS, ImageSettings
from sd_hyena.benchmark.suite import Suite

BY_SIZE = [kind for kind in ALL_KINDS if not kind.startswith("hyena2d-core") and kind not in ("naive", "sdp-math")]
GRIDS = [(8, 8), (13, 7), (31, 31), (40, 24)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--out", default="", help="STEM of the files (default: benchmarks/results/<device>)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    args = parser.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        print("gpu_suite: no usable CUDA device; --device cpu --quick tries the script without one", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(args.device) if cuda else "cpu-dry-run"
    stem = args.out or str(Path(__file__).parent / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
    dtype = torch.float16 if cuda else torch.float32
    command = f"python benchmarks/gpu_suite.py --device {args.device}" + (" --quick" if args.quick else "")
    suite = Suite(stem, f"{name}: one layer, and a whole generation", command, args.device, dtype, print)

    dtypes = [torch.float32, torch.float16, torch.bfloat16] if cuda else [torch.float32, torch.bfloat16]
    grids, layer, widths, image = GRIDS, (512, 8), [256, 512, 768, 1024, 1280, 2048, 4096], 2048
    if args.quick:
        grids, layer, widths, image = GRIDS[:2], (64, 2), [64, 128], 64
    suite.section("Every kind against its definition", lambda: suite.correctness(list(KINDS), grids, dtypes))
    suite.section(
        f"Every kind at {layer[0]} px, batch {layer[1]}",
        lambda: suite.layer(*layer, list(ALL_KINDS), Limits(repeats=50, budget=30)),
    )
    suite.section(
        f"Forward and backward at {layer[0]} px, batch {layer[1]}",
        lambda: suite.layer(*layer, BY_SIZE, Limits(repeats=30, budget=20), backward=True),
    )
    suite.section("By image size", lambda: suite.sizes(widths, BY_SIZE, Limits(repeats=30, budget=20, max_seconds=20)))
    suite.section(f"A {image} px generation, random SD 1.5 weights", lambda: whole_image(suite, image, args.quick))
    for failure in suite.failures:
        print(failure, file=sys.stderr)
    return 1 if suite.failures else 0


def whole_image(suite: Suite, width: int, quick: bool) -> str:
    """The finest five layers of a whole generation; the bundled model stands in for SD 1.5 in a trial."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return "Not measured: diffusers is not installed.\n"
    from sd_hyena.benchmark.image import measure_image
    from sd_hyena.benchmark.pipelines import prepare

    model = {"model": "demo"} if quick else {"random_weights": "sd15"}
    settings = ImageSettings(
        **model,
        target="high",
        width=width,
        height=width,
        steps=2 if quick else 10,
        repeats=1 if quick else 2,
        attention="sdpa,xformers",
        dtype=str(suite.dtype).removeprefix("torch."),
        device=str(suite.device),
    )
    pipe, entries, generate = prepare(settings)
    rows = measure_image(pipe, entries, generate, (width, width), settings.steps, settings.repeats, 1, suite.say)
    what = "the bundled model" if quick else "SD 1.5, random weights"
    return suite.image("image", f"{what}, {width}x{width} px, {settings.steps} steps, guidance, {settings.dtype}", rows)


if __name__ == "__main__":
    raise SystemExit(main())
