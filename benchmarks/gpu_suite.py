"""Everything worth measuring on a machine with a GPU. In two calls, of ten minutes at most each:

    python benchmarks/gpu_suite.py --only tests,kinds --out gpu-tests    # is it right?
    python benchmarks/gpu_suite.py --only layer,sizes,paths,image,training,backward,graphs    # is it fast?

The second writes benchmarks/results/<device>.md, .json and figures. Without ``--only`` it does all of it.

    python benchmarks/gpu_suite.py --device cpu --quick    # everything that can run without a GPU

Sections, in this order: the kernels' own tests, compiled for the device ("tests"); every kind of layer against its
definition ("kinds"); one layer in float16 against every attention there is, at 512 px with batch 8 ("layer") and from
256 to 4096 px ("sizes"); ours by each path, and the default compiled, at both ("paths"); whole generations at 2048 and
4096 px on random SD 1.5 weights ("image"); the speed of stage 1 at 512 px ("training"); forward and backward
("backward"); layers in CUDA graphs ("graphs"), last because a capture that fails can leave CUDA unusable.

Needs torch; without diffusers the generations and the training are left out, without matplotlib the figures, without
pytest the kernels' tests. Where sd-hyena is not installed: ``PYTHONPATH=src python benchmarks/gpu_suite.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if any(word.endswith("cpu") for word in sys.argv):  # before Triton is imported, whose interpreter runs the kernels then
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import ways
from suite import Suite

from sd_hyena.benchmark import report
from sd_hyena.benchmark.kinds import KINDS, Kind
from sd_hyena.benchmark.measure import Limits
from sd_hyena.benchmark.settings import ALL_KINDS, GROUPS, ImageSettings
from sd_hyena.errors import SdHyenaError

ROOT = Path(__file__).parents[1]
OURS = ("states", "near")
SLOW = ("naive", "sdp-math")  # attention that keeps whole matrices
BY_SIZE = [kind for kind in ALL_KINDS if kind not in (*SLOW, "states-core")]
ATTENTION = [kind for kind in GROUPS["attention"] if kind not in SLOW]
TESTS = ("tests/ops/test_mix.py", "tests/nn/test_operators.py")


class Plan:
    """What is measured: at full size, or tiny to try the script."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.grids = [(8, 8), (13, 7)] if quick else [(8, 8), (13, 7), (31, 31), (40, 24)]
        self.layer = (32, 2) if quick else (512, 8)  # px, batch
        self.widths = [64, 128] if quick else [256, 512, 768, 1024, 1280, 2048, 4096]
        self.some_widths = [32] if quick else [256, 1024, 2048, 4096]
        self.graph_widths = [64] if quick else [256, 512, 1024]
        self.images = [(64, 2, 1)] if quick else [(2048, 10, 2), (4096, 2, 1)]  # px, steps, generations
        self.training = (64, 2, 3) if quick else (512, 16, 25)  # px, batch, updates
        self.limits = Limits(repeats=2, budget=0.5) if quick else Limits(repeats=30, budget=8, max_seconds=20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--out", default="", help="STEM of the files (default: benchmarks/results/<device>)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--only", default="", help="comma list of sections by their words; none: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section starts later than this")
    args = parser.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        print("gpu_suite: no usable CUDA device; --device cpu --quick tries the script without one", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(args.device) if cuda else "cpu-dry-run"
    stem = args.out or str(ROOT / "benchmarks/results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
    command = f"python benchmarks/gpu_suite.py --device {args.device}"
    command += (" --quick" if args.quick else "") + (f" --only {args.only}" if args.only else "")
    dtype = torch.float16 if cuda else torch.float32
    suite = Suite(
        stem, f"{name}: one layer, and a whole generation", command, args.device, dtype, lambda s: print(s, flush=True)
    )
    found = sections(suite, Plan(args.quick))
    wanted = [word for word in args.only.split(",") if word]
    if unknown := set(wanted) - {word for word, _, _ in found}:
        print(f"gpu_suite: no section {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    logging.getLogger("sd_hyena.ops.mix").addHandler(Warnings(suite.failures))
    started = time.perf_counter()
    for word, heading, run in found:
        if wanted and word not in wanted:
            continue
        late = time.perf_counter() - started > 60 * args.minutes
        suite.section(heading, (lambda: "Not run: its time was up.\n") if late else run)
    suite.section("In short", lambda: summary(suite), first=True)
    for failure in suite.failures:
        print(failure, file=sys.stderr)
    return 1 if suite.failures else 0


class Warnings(logging.Handler):
    """Kernels that are not believed are passed over with a warning: here that is a failure."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.failures = failures

    def emit(self, record: logging.LogRecord) -> None:
        self.failures.append(record.getMessage())


def sections(suite: Suite, plan: Plan) -> list[tuple[str, str, Callable[[], str]]]:
    """(word, heading, what it does)"""
    width, batch = plan.layer
    at, limits = f"at {width} px, batch {batch}", plan.limits
    teacher = "the bundled model" if plan.quick else "random SD 1.5 weights"
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if suite.device.type == "cuda" else [])
    paths: list[str | Kind] = [*ATTENTION]
    for kind in OURS:
        paths += [ways.by_path(kind, "triton"), ways.by_path(kind, "plain")]
    paths.append(ways.compiled(OURS[0]))  # each takes a while
    graphs: list[str | Kind] = [ways.graphed(kind) for kind in (*ATTENTION, "linear-elu", *OURS)]
    px, size, updates = plan.training

    def image(case: tuple[int, int, int]) -> tuple[str, str, Callable[[], str]]:
        return "image", f"A {case[0]} px generation, {teacher}", lambda: whole_image(suite, *case, plan.quick)

    def layer(kinds: list[str | Kind], **more: Any) -> Callable[[], str]:
        return lambda: suite.layer(width, batch, kinds, limits, **more)

    def sizes(widths: list[int], kinds: list[str | Kind], figure: bool = False) -> Callable[[], str]:
        return lambda: suite.sizes(widths, kinds, limits, figure=figure)

    return [
        ("tests", "The kernels' own tests", lambda: kernel_tests(suite, plan.quick)),
        ("kinds", "Every kind against its definition", lambda: suite.correctness(list(KINDS), plan.grids, dtypes)),
        ("layer", f"Every kind {at}", layer([*ALL_KINDS])),
        ("sizes", "By image size", sizes(plan.widths, [*BY_SIZE], figure=True)),
        ("paths", f"By path {at}", layer(paths, name="paths")),
        ("paths", "By path and image size", sizes(plan.some_widths, paths)),
        *map(image, plan.images),
        ("training", f"Stage 1 at {px} px, batch {size}", lambda: training(suite, px, size, updates, plan.quick)),
        ("backward", f"Forward and backward {at}", layer([*BY_SIZE], backward=True)),
        ("graphs", f"In CUDA graphs {at} (memory: without the graph's own)", layer(graphs, name="graphs")),
        ("graphs", "In CUDA graphs, by image size", sizes(plan.graph_widths, graphs)),
    ]


def kernel_tests(suite: Suite, quick: bool) -> str:
    """pytest in a process of its own."""
    cuda = suite.device.type == "cuda"
    device = {"SD_HYENA_TEST_DEVICE": str(suite.device)} if cuda else {}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS]
    if quick:
        command += ["-k", "kernels_gets_them or equal_weights"]
    elif importlib.util.find_spec("xdist"):  # kernels compile side by side
        command += ["-n", "8"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | device, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired:
        raise SdHyenaError("not done after 400 s") from None
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if "No module named pytest" in done.stderr:
        return "Not run: pytest is not installed.\n"
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
        raise SdHyenaError(f"{last}: the log above has them all")
    where = "compiled for the device" if cuda else "in Triton's interpreter"
    return f"`pytest {' '.join(TESTS)}`, {where}: {last}.\n"


def whole_image(suite: Suite, width: int, steps: int, repeats: int, quick: bool) -> str:
    """The finest layers of a whole generation; the bundled model stands in for SD 1.5 in a trial."""
    if not importlib.util.find_spec("diffusers"):
        return "Not measured: diffusers is not installed.\n"
    from sd_hyena.benchmark.image import measure_image
    from sd_hyena.benchmark.pipelines import prepare

    settings = ImageSettings(
        model="demo" if quick else "",
        random_weights="" if quick else "sd15",
        target="high",
        width=width,
        height=width,
        steps=steps,
        repeats=repeats,
        attention="sdpa,xformers",
        dtype=str(suite.dtype).removeprefix("torch."),
        device=str(suite.device),
    )
    pipe, entries, generate = prepare(settings)
    rows = measure_image(pipe, entries, generate, (width, width), steps, repeats, 1, suite.say)
    what = "the bundled model" if quick else "SD 1.5, random weights"
    title = f"{what}, {width}x{width} px, {steps} steps, guidance, {settings.dtype}"
    return suite.image(f"image-{width}", title, rows)


def training(suite: Suite, width: int, batch: int, updates: int, quick: bool) -> str:
    """Updates a second of stage 1 with the real trainer, on random weights and random latents."""
    if not importlib.util.find_spec("diffusers"):
        return "Not measured: diffusers is not installed.\n"
    from accelerate import Accelerator

    from sd_hyena.distill.settings import TrainSettings
    from sd_hyena.distill.trainer import Trainer
    from sd_hyena.fingerprint import fingerprint
    from sd_hyena.models import DEMO, load_pipeline, locate, random_pipeline

    device, cuda = str(suite.device), suite.device.type == "cuda"
    dtype, precision = (torch.float32, "no") if quick else (torch.bfloat16, "bf16")
    pipe = load_pipeline(locate(DEMO), device, dtype) if quick else random_pipeline("sd15", device, dtype)[0]
    teacher, lines = fingerprint(pipe), []
    for target in ("high", "all"):
        with tempfile.TemporaryDirectory() as folder:
            random_data(Path(folder) / "data", pipe, teacher, width)
            (Path(folder) / "out").mkdir()
            settings = TrainSettings(
                teacher_model="random",
                target=target,
                batch_size=batch,
                n_steps=updates,
                save_every_n_steps=0,
                lr_warmup_steps=0,
                seed=0,
                data_dir=f"{folder}/data",
                out_dir=f"{folder}/out",
                log_dir=f"{folder}/logs",
                mixed_precision=precision,
                device=device,
            )
            marks: list[float] = []
            trainer = Trainer(
                settings,
                pipe,
                teacher,
                Accelerator(mixed_precision=precision, cpu=not cuda),
                on_progress=lambda _, marks=marks: marks.append(time.perf_counter()),
            )
            if cuda:
                torch.cuda.reset_peak_memory_stats(suite.device)
            began = time.perf_counter()
            trainer.run()
            seconds = time.perf_counter() - began
        each = statistics.median(b - a for a, b in itertools.pairwise(marks))
        peak = f"{torch.cuda.max_memory_allocated(suite.device) / 2**30:.1f}" if cuda else "-"
        suite.records.append({"section": "training", "kind": target, "width": width, "batch": batch, "ms": 1000 * each})
        lines.append([target, f"{each:.3g}", f"{batch / each:.1f}", peak, f"{seconds - each * updates:.0f}"])
    headings = ["layers", "s an update", "pictures/s", "peak GiB", "start and evaluation, s"]
    what = "The bundled model" if quick else "SD 1.5, random weights"
    intro = f"{what}, {width} px, batch {batch}, mixed precision {precision}, {updates} updates: median.\n\n"
    return intro + report.markdown_table(headings, lines)


def random_data(folder: Path, pipe: Any, teacher: dict[str, Any], width: int) -> None:
    """A prepared folder of random latents: speed does not depend on what they show."""
    from sd_hyena.distill.manifest import SHARDS, Manifest
    from sd_hyena.distill.shards import write_manifest, write_shard
    from sd_hyena.fingerprint import exact

    (folder / SHARDS).mkdir(parents=True)
    side, tokens = width // pipe.vae_scale_factor, 77
    tensors = {
        "latents": torch.randn(16, pipe.unet.config.in_channels, side, side),
        "states": torch.randn(2, tokens, pipe.unet.config.cross_attention_dim, dtype=pipe.unet.dtype),
        "prompt": torch.ones(16, dtype=torch.int64),
    }
    identity = {"kind": "images", "teacher": exact(teacher), "weights": "", "dtype": str(pipe.unet.dtype)}
    identity |= {"sizes": [[width, width]], "prompts_sha256": "", "images_sha256": ""}
    identity |= {"n_images": 14, "n_held_out": 2, "seed": 0}
    shard = write_shard(folder, 0, (width, width), tensors, ["", "random"], [14, 15])
    write_manifest(folder, Manifest(identity, 1, [shard]))


def summary(suite: Suite) -> str:
    """Ours against the best attention, as it comes, in CUDA graphs and by path."""
    rows = {}
    for row in suite.rows:
        if row.timing and not row.backward:
            rows.setdefault((row.width, row.batch, row.kind), row)
    attention = {(r.width, r.batch): r for r in rows.values() if r.best and not r.kind.endswith("graph")}

    def over(one: Any, other: Any) -> str:
        """How many times faster: by each one's ratio to the best attention that was measured in turns with it."""
        return f"{one.ratio / other.ratio:.2f}x" if one and other and one.ratio and other.ratio else "-"

    lines = []
    for width, batch in sorted(attention, key=lambda s: (s[0], -s[1])):
        best = attention[width, batch]
        for kind in OURS:
            names = kind, "linear-elu", *(f"{kind}, {way}" for way in ("triton", "plain", "compiled", "graph"))
            own, elu, triton, plain, compiled, graph = (rows.get((width, batch, name)) for name in names)
            usual = own or triton
            if usual is None:
                continue
            lines.append(
                [
                    f"{width} px b{batch}",
                    kind,
                    f"{usual.timing.median:.3g}",
                    f"{usual.ratio:.2f}x",
                    f"{graph.ratio:.2f}x" if graph and graph.ratio else "-",
                    over(own, elu),
                    over(triton, plain),
                    over(triton, compiled),
                    f"{usual.peak_bytes / best.peak_bytes:.2f}",
                ]
            )
    headings = [
        "", "layer", "ms", "faster than the best attention", "both in graphs", "than linear-elu",
        "by triton, than plain", "than compiled", "memory / attention's",
    ]  # fmt: skip
    return report.markdown_table(headings, lines) if lines else "No layer was measured.\n"


if __name__ == "__main__":
    raise SystemExit(main())
