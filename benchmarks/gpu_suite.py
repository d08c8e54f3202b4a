"""Everything worth measuring on a machine with a GPU, in ten minutes at most.

    python benchmarks/gpu_suite.py                         # all of it: benchmarks/results/<device>.md
    python benchmarks/gpu_suite.py --only image,training --out more    # some sections, by their words
    python benchmarks/gpu_suite.py --device cpu --quick    # every code path that can run without a GPU

Sections, in this order: the kernels' own tests, compiled and at full sizes ("tests"); every kind of layer against its
definition ("kinds"); the layer at the original's settings, float16, against every attention there is, at 512 px with
batch 8 ("layer") and from 256 to 4096 px ("sizes"); the layer by every backend, with low memory and by plain torch.fft
("variants"); whole generations at 2048 and 4096 px on random SD 1.5 weights ("image"); the speed of stage 1 at that
size ("training"); forward and backward ("backward"); the layer's parts against the machine's measured ceilings
("parts"); layers in CUDA graphs ("graphs").

Needs torch; without diffusers the generations and the training are left out, without matplotlib the figures, without
pytest the kernels' tests. Where sd-hyena is not installed: ``PYTHONPATH=src python benchmarks/gpu_suite.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
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

ROOT = Path(__file__).parents[1]
if any(
    word.endswith("cpu") for word in sys.argv
):  # read when Triton is imported: without a GPU its interpreter runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402

from sd_hyena.benchmark import report, roofline, ways  # noqa: E402
from sd_hyena.benchmark.kinds import KINDS, Kind  # noqa: E402
from sd_hyena.benchmark.measure import Limits, Row  # noqa: E402
from sd_hyena.benchmark.settings import ALL_KINDS, ImageSettings  # noqa: E402
from sd_hyena.benchmark.suite import Suite  # noqa: E402
from sd_hyena.errors import SdHyenaError  # noqa: E402
from sd_hyena.ops import dispatch, environment  # noqa: E402

BY_SIZE = [kind for kind in ALL_KINDS if not kind.startswith("hyena2d-core") and kind not in ("naive", "sdp-math")]
ATTENTION = [
    kind.name for kind in KINDS.values() if kind.family == "attention" and kind.name not in ("naive", "sdp-math")
]
OURS = ("hyena2d-full-mean", "hyena2d-full-linear")
TESTS = ("tests/ops/kernels", "tests/ops/test_gemm_conv.py", "tests/nn/test_fused.py", "tests/nn/test_compiled.py")


class Plan:
    """What is measured: at full size, or tiny to try the script."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.grids = [(8, 8), (13, 7)] if quick else [(8, 8), (13, 7), (31, 31), (40, 24)]
        self.layer = (64, 2) if quick else (512, 8)  # px, batch
        self.widths = [64, 128] if quick else [256, 512, 768, 1024, 1280, 2048, 4096]
        self.some_widths = [64] if quick else [256, 1024, 2048, 4096]
        self.graph_widths = [64] if quick else [256, 512, 1024]
        self.parts = [((8, 8), 1)] if quick else [((64, 64), 8), ((128, 128), 1), ((256, 256), 1), ((512, 512), 1)]
        self.images = [(64, 2, 1)] if quick else [(2048, 10, 2), (4096, 2, 1)]  # px, steps, generations
        self.training = (64, 2, 3) if quick else (512, 16, 25)  # px, batch, updates


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
    suite = Suite(
        stem,
        f"{name}: one layer, and a whole generation",
        command,
        args.device,
        torch.float16 if cuda else torch.float32,
        lambda line: print(line, flush=True),
    )
    found = sections(suite, Plan(args.quick))
    wanted = [word for word in args.only.split(",") if word]
    if unknown := set(wanted) - {word for word, _, _ in found}:
        print(f"gpu_suite: no section {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    for word, heading, run in found:
        if wanted and word not in wanted:
            continue
        if time.perf_counter() - started > 60 * args.minutes:
            suite.section(heading, lambda: "Not run: its time was up.\n")
            continue
        suite.section(heading, run)
    suite.section("In short", lambda: summary(suite), first=True)
    for failure in suite.failures:
        print(failure, file=sys.stderr)
    return 1 if suite.failures else 0


def sections(suite: Suite, plan: Plan) -> list[tuple[str, str, Callable[[], str]]]:
    """(word, heading, what it does). What captures graphs comes last: a capture that fails can leave CUDA unusable."""
    cuda, teacher = suite.device.type == "cuda", "the bundled model" if plan.quick else "random SD 1.5 weights"
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if cuda else [])
    width, batch = plan.layer
    at = f"at {width} px, batch {batch}"
    usual = Limits(repeats=2, budget=0.5) if plan.quick else Limits(repeats=50, budget=20)
    brief = usual if plan.quick else Limits(repeats=30, budget=12, max_seconds=20)
    others: list[str | Kind] = [*ATTENTION, *OURS, *variations()]
    graphs: list[str | Kind] = [ways.graphed(kind) for kind in (*ATTENTION, *OURS)]
    px, size, steps = plan.training
    return [
        ("tests", "The kernels' own tests", lambda: kernel_tests(suite, plan.quick)),
        ("kinds", "Every kind against its definition", lambda: definitions(suite, plan, dtypes)),
        (
            "layer",
            f"Every kind {at}",
            lambda: suite.layer(width, batch, list(ALL_KINDS), usual),
        ),
        ("sizes", "By image size", lambda: suite.sizes(plan.widths, BY_SIZE, brief)),
        ("variants", f"The layer's variants {at}", lambda: suite.layer(width, batch, others, brief, name="variants")),
        (
            "variants",
            "The layer's variants by image size",
            lambda: suite.sizes(plan.some_widths, others, brief, figure=False),
        ),
        *(
            (
                "image",
                f"A {case[0]} px generation, {teacher}",
                lambda case=case: whole_image(suite, *case, plan.quick),
            )
            for case in plan.images
        ),
        ("training", f"Stage 1 at {px} px, batch {size}", lambda: training(suite, px, size, steps, plan.quick)),
        (
            "backward",
            f"Forward and backward {at}",
            lambda: suite.layer(width, batch, BY_SIZE, brief, backward=True),
        ),
        ("parts", "The layer's parts against the machine's ceilings", lambda: against_ceilings(suite, plan)),
        ("graphs", f"In CUDA graphs {at}", lambda: suite.layer(width, batch, graphs, brief, name="graphs")),
        (
            "graphs",
            "In CUDA graphs, by image size",
            lambda: suite.sizes(plan.graph_widths, graphs, brief, figure=False),
        ),
    ]


def variations() -> list[Kind]:
    """Ours by each backend, by plain torch.fft and with low memory."""
    made = []
    for kind in OURS:
        made += [ways.by_backend(kind, backend) for backend in dispatch.BACKENDS]
        made += [ways.plain_fft(kind), ways.low_memory(kind)]
    return made


def kernel_tests(suite: Suite, quick: bool) -> str:
    """pytest in a process of its own; compiled kernels take their first candidate untried."""
    cuda = suite.device.type == "cuda"
    how = {environment.TUNE: "0"} | ({"SD_HYENA_TEST_DEVICE": str(suite.device)} if cuda else {})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS]
    if quick:
        command += ["-k", "tuning or test_gate"]
    elif importlib.util.find_spec("xdist"):  # kernels compile side by side
        command += ["-n", "8"]
    try:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **how}, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        raise SdHyenaError("not done after 240 s") from None
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if "No module named pytest" in done.stderr:
        return "Not run: pytest is not installed.\n"
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
        raise SdHyenaError(f"{last}: the log above has them all")
    where = "compiled for the device" if cuda else "in Triton's interpreter"
    return f"`pytest {' '.join(TESTS)}`, {where}: {last}.\n"


def definitions(suite: Suite, plan: Plan, dtypes: list[torch.dtype]) -> str:
    with environment.variables_set({environment.TUNE: "0"}):
        return suite.correctness(list(KINDS), plan.grids, dtypes)


def against_ceilings(suite: Suite, plan: Plan) -> str:
    """What each part reaches of a large copy's bytes and of a large product's operations in a second."""
    # What interprets kernels on a CPU runs them in float16 too, as a GPU does, on few channels.
    dtype, dim = (torch.float16, 16) if plan.quick else (suite.dtype, 320)
    most = roofline.ceilings(suite.device, suite.dtype, plan.quick)
    text = (
        f"A large copy reads and writes {most.copy / 1e9:.0f} GB/s, a large product of matrices "
        f"makes {most.product / 1e12:.3g} TFLOP/s. Floor: the time that bytes or operations take at those rates, "
        f"whichever is longer. {dim} channels, 8 heads; one call, of several with inputs of their own.\n"
    )
    for (h, w), batch in plan.parts:
        found = list(roofline.parts((h, w), batch, dtype, suite.device, dim))
        roofline.time_parts(found, suite.device, *((2, 0.5) if plan.quick else ()))
        for part in found:
            suite.records.append(
                {"section": "parts", "kind": part.name, "width": 8 * w, "height": 8 * h, "batch": batch,
                 "bytes": part.bytes_, "flops": part.flops, "ms": part.timing.median if part.timing else None}
            )  # fmt: skip
        table = report.markdown_table(roofline.HEADINGS, roofline.lines(found, most))
        text += f"\n{8 * w} px, batch {batch}:\n\n{table}"
    return text


def whole_image(suite: Suite, width: int, steps: int, repeats: int, quick: bool) -> str:
    """The finest five layers of a whole generation; the bundled model stands in for SD 1.5 in a trial."""
    if not has_diffusers():
        return "Not measured: diffusers is not installed.\n"
    from sd_hyena.benchmark.image import measure_image
    from sd_hyena.benchmark.pipelines import prepare

    settings = ImageSettings(
        **({"model": "demo"} if quick else {"random_weights": "sd15"}),  # type: ignore[arg-type]
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
    if not has_diffusers():
        return "Not measured: diffusers is not installed.\n"
    from accelerate import Accelerator

    from sd_hyena.distill.settings import TrainSettings
    from sd_hyena.distill.trainer import Trainer
    from sd_hyena.models import DEMO, fingerprint, load_pipeline, locate, random_pipeline

    dtype = torch.float32 if quick else torch.bfloat16
    device = str(suite.device)
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
                mixed_precision="no" if quick else "bf16",
                device=device,
            )
            marks: list[float] = []
            accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=suite.device.type == "cpu")
            trainer = Trainer(
                settings, pipe, teacher, accelerator, on_progress=lambda _, m=marks: m.append(time.perf_counter())
            )
            if suite.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(suite.device)
            began = time.perf_counter()
            trainer.run()
            seconds = time.perf_counter() - began
        each = statistics.median(b - a for a, b in itertools.pairwise(marks))
        peak = torch.cuda.max_memory_allocated(suite.device) / 2**30 if suite.device.type == "cuda" else None
        suite.records.append({"section": "training", "kind": target, "width": width, "batch": batch, "ms": 1000 * each})
        memory, around = f"{peak:.1f}" if peak else "-", f"{seconds - each * updates:.0f}"
        lines.append([target, f"{each:.3g}", f"{batch / each:.1f}", memory, around])
    headings = ["layers", "s an update", "pictures/s", "peak GiB", "start and evaluation, s"]
    what = "The bundled model" if quick else "SD 1.5, random weights"
    intro = f"{what}, {width} px, batch {batch}, {settings.mixed_precision}, {updates} updates: median.\n\n"
    return intro + report.markdown_table(headings, lines)


def random_data(folder: Path, pipe: Any, teacher: dict[str, str], width: int) -> None:
    """A prepared folder of random latents: speed does not depend on what they show."""
    from sd_hyena.distill.shards import SHARDS, Manifest, write_manifest, write_shard

    (folder / SHARDS).mkdir(parents=True)
    side, tokens = width // pipe.vae_scale_factor, 77
    tensors = {
        "latents": torch.randn(16, pipe.unet.config.in_channels, side, side),
        "states": torch.randn(2, tokens, pipe.unet.config.cross_attention_dim, dtype=pipe.unet.dtype),
        "prompt": torch.ones(16, dtype=torch.int64),
    }
    identity = {"teacher": teacher, "dtype": str(pipe.unet.dtype), "sizes": [[width, width]]}
    shard = write_shard(folder, 0, (width, width), tensors, ["", "random"], [14, 15])
    write_manifest(folder, Manifest(identity, 1, [shard]))


def has_diffusers() -> bool:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return False
    return True


def summary(suite: Suite) -> str:
    """Ours against the best attention and against plain torch.fft, each at its fastest and at its leanest."""
    lines = []
    shapes = sorted({(row.width, row.batch) for row in suite.rows if not row.backward}, key=lambda s: (s[0], -s[1]))
    for width, batch in shapes:
        rows = [r for r in suite.rows if (r.width, r.batch, r.backward) == (width, batch, False) and r.timing]
        attention = fastest([r for r in rows if r.family == "attention"])
        eager = fastest([r for r in rows if r.family == "attention" and not r.kind.endswith("graph")])
        for ours in OURS:
            own = [r for r in rows if r.kind == ours or r.kind.startswith(ours + ",")]
            plain = next((r for r in own if r.kind.endswith("plain torch.fft")), None)
            own = [r for r in own if r is not plain]
            best, usual = fastest(own), next((r for r in own if r.kind == ours), None)
            if attention is None or eager is None or best is None or usual is None:
                continue
            lean = min((r for r in own if not r.kind.endswith("graph")), key=lambda r: r.peak_bytes)
            lines.append(
                [
                    f"{width} px b{batch}",
                    ours,
                    best.kind.removeprefix(ours).strip(", ") or "as it comes",
                    f"{best.timing.median:.3g}",
                    f"{ratio(attention, best):.2f}x ({attention.kind})",
                    f"{ratio(eager, usual):.2f}x",
                    f"{ratio(plain, usual):.2f}x" if plain else "-",
                    f"{usual.peak_bytes / eager.peak_bytes:.2f}",
                    f"{lean.peak_bytes / eager.peak_bytes:.2f}",
                ]
            )
    headings = [
        "", "layer", "fastest way", "ms", "faster than the best attention", "as it comes, without graphs",
        "than plain torch.fft", "memory / attention's", "at its leanest",
    ]  # fmt: skip
    return report.markdown_table(headings, lines) if lines else "Nothing was measured.\n"


def fastest(rows: list[Row]) -> Any:
    return min(rows, key=lambda row: row.timing.median if row.timing else float("inf"), default=None)


def ratio(one: Any, other: Any) -> float:
    return one.timing.median / other.timing.median


if __name__ == "__main__":
    raise SystemExit(main())
