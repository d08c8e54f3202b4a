"""Students at sizes they were not taught at: the same prompts and seeds, against the teacher at the same size.

    python benchmarks/resolutions.py demo                         # the bundled student
    python benchmarks/resolutions.py a.safetensors b.safetensors  # any students of the bundled model

Writes STEM.md and STEM.json. Each file is measured with its filters stretched over the picture and extended to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from sd_hyena import patch
from sd_hyena.api import load_hyena
from sd_hyena.config import SCALINGS
from sd_hyena.demo.scenes import held_out_scenes
from sd_hyena.evaluate.pictures import compare, draw
from sd_hyena.evaluate.settings import labels
from sd_hyena.files import write_file
from sd_hyena.machine import describe, machine
from sd_hyena.models import DEMO, load_pipeline, locate

SIZES = "128x128,256x256,384x384,512x512,384x192,512x256"
GUIDANCE, FIRST_SEED = 5.0, 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="Hyena files of the bundled model; demo: its own")
    parser.add_argument("--sizes", default=SIZES, help="WIDTHxHEIGHT in px (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=6, help="held-out prompts at each size (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="diffusion steps (default: %(default)s)")
    parser.add_argument(
        "--out", default=str(Path(__file__).parent / "results" / "resolutions"), help="STEM of the files"
    )
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    pipe = load_pipeline(locate(DEMO))
    prompts = [scene.caption for scene in held_out_scenes(args.pictures)]
    seeds = [FIRST_SEED + i for i in range(args.pictures)]
    names = dict(zip(args.files, labels([[file] for file in args.files]), strict=True))
    rows: dict[str, dict[str, Any]] = {f"{names[f]}, {scaling}": {} for f in args.files for scaling in SCALINGS}
    for width, height in sizes:
        options = {
            "width": width, "height": height, "num_inference_steps": args.steps, "guidance_scale": GUIDANCE
        }  # fmt: skip
        teacher = draw(pipe, prompts, seeds, **options)
        for file in args.files:
            for scaling in SCALINGS:
                load_hyena(pipe, file, scaling=scaling)
                drawing = draw(pipe, prompts, seeds, **options)
                patch.detach(pipe.unet)
                psnr = compare(teacher, drawing).psnr
                rows[f"{names[file]}, {scaling}"][f"{width}x{height}"] = {
                    "psnr": statistics.mean(psnr), "psnr_each": psnr, "speedup": teacher.seconds / drawing.seconds
                }  # fmt: skip
                print(f"{width}x{height} {names[file]} {scaling}: {statistics.mean(psnr):.1f} dB", flush=True)
    facts = machine("cpu")
    command = f"python benchmarks/resolutions.py {' '.join(args.files)}"
    for name in ("sizes", "pictures", "steps"):
        if getattr(args, name) != parser.get_default(name):
            command += f" --{name} {getattr(args, name)}"
    columns = [f"{w}x{h}" for w, h in sizes]
    lines = [
        "# Students at sizes they were not taught at", "",
        f"{describe(facts)}; {facts['date']}. `{command}`", "",
        f"PSNR in dB to the teacher's pictures at the same size, mean of {args.pictures} held-out prompts (guidance "
        f"{GUIDANCE:g}, {args.steps} steps), and how many times faster the picture was drawn.", "",
        "| student | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns),
    ]  # fmt: skip
    for label, cells in rows.items():
        values = [f"{cells[n]['psnr']:.1f} ({cells[n]['speedup']:.2f}x)" for n in columns]
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    document = {"machine": facts, "command": command, "rows": rows}
    for suffix, text in ((".json", json.dumps(document, indent=1)), (".md", "\n".join(lines) + "\n")):
        write_file(Path(args.out).with_suffix(suffix), text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
