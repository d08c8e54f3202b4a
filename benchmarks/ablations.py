"""What matters, measured on the bundled teacher: one student a row, each differing from the default in one thing.

    python benchmarks/ablations.py                   # all rows that are not there yet
    python benchmarks/ablations.py --rows "default;causal"
    python benchmarks/ablations.py --list

Every row is trained on the same pictures for the same number of steps; errors are on held-out latents, pictures
on held-out prompts. Results are kept in STEM.json row by row, so that an interrupted run goes on with the next
one; STEM.md is written from it. A row is measured again if it was measured with other settings
or another teacher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sd_hyena import patch
from sd_hyena.benchmark.timing import interleaved
from sd_hyena.demo.scenes import held_out_scenes
from sd_hyena.distill.prepare import training_data
from sd_hyena.distill.settings import TrainSettings
from sd_hyena.distill.trainer import Trainer
from sd_hyena.evaluate.pictures import Distances, Drawing, compare, draw
from sd_hyena.files import write_file
from sd_hyena.fingerprint import fingerprint
from sd_hyena.machine import describe, machine
from sd_hyena.models import DEMO, load_pipeline, locate
from sd_hyena.nn import Operator
from sd_hyena.nn.teacher import projections_of
from sd_hyena.targets import find_targets

SIZE, GUIDANCE, FIRST_SEED = 256, 5.0, 1000
TIMED = "IN01"  # the layer whose parameters, operations and time are given


@dataclass
class Row:
    """One student: settings that differ from the default's, and what is changed beyond settings."""

    name: str
    group: str
    settings: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None
    longer: float = 1.0  # stage 1, in steps of the default


LINEAR = {"operator": "linear", "feature_map": "elu"}
ALL = {"target": "all"}
ROWS = [
    Row("default", "default"),
    Row("default, seed 2", "default", {"seed": 2}),
    Row("default, seed 3", "default", {"seed": 3}),
    Row("near filter and linear attention", "operator", {"operator": "near"}),
    Row("linear attention", "operator", {"operator": "linear"}),
    Row("linear attention (elu + 1)", "operator", LINEAR),
    Row("linear attention (elu + 1), a third of the rate", "operator", LINEAR | {"lr": 3e-3}),
    Row("linear attention (elu + 1), three times the rate", "operator", LINEAR | {"lr": 3e-2}),
    Row("windows (softmax in blocks, the rival)", "operator", {"operator": "windows"}),
    Row("long", "operator", {"operator": "long"}),
    Row("causal", "operator", {"operator": "causal"}),
    Row("blocks of 4", "blocks", {"block": 4}),
    Row("blocks of 16", "blocks", {"block": 16}),
    Row("near: none", "near filter", {"near": 0}),
    Row("near: 1 tap", "near filter", {"near": 1}),
    Row("near: 7 x 7", "near filter", {"near": 7}),
    Row("features: squared ReLU", "features", {"feature_map": "squared_relu"}),
    Row("features: exp", "features", {"feature_map": "exp"}),
    Row("features: elu + 1", "features", {"feature_map": "elu"}),
    Row("start: projections alone", "start", {"init": "projections"}),
    Row("start: random", "start", {"init": "random"}),
    Row("branch dropout 0.1", "start", {"branch_dropout": 0.1}),
    Row("noise as data", "data", {"data": "noise"}),
    Row("causal, noise, random start (as in 2024)", "data", {"operator": "causal", "data": "noise", "init": "random"}),
    Row("a quarter of the pictures", "data", {"n_images": 16}),
    Row("learning rate 3e-3", "learning rate", {"lr": 3e-3}),
    Row("learning rate 3e-2", "learning rate", {"lr": 3e-2}),
    Row("one rate for all", "learning rate", change=lambda operator: operator.__dict__.update(rates={})),
    Row("a teacher pass for every step", "learning rate", {"reuse": 1}),
    Row("form: core", "form", {"form": "core"}),
    Row("all layers", "layers", ALL),
    Row("all layers, linear attention (elu + 1)", "layers", ALL | LINEAR),
    Row("all, + stage 2: prediction, features", "stage 2", ALL | {"finetune_steps": 40}),
    Row("all, stage 1 for as long as both", "stage 2", ALL, longer=2.2),
]  # fmt: skip


class RowTrainer(Trainer):
    """Changes each operator as a row says before its optimiser is made."""

    row: Row

    def _make_students(self, started_from: dict[str, Any] | None) -> Any:
        students = super()._make_students(started_from)
        for _, operator in students.items():
            if self.row.change is not None:
                self.row.change(operator)
        return students


@dataclass
class Bench:
    """What all rows share: the teacher, its pictures, and how long a row is trained."""

    args: argparse.Namespace
    pipe: Any
    teacher: dict[str, str]
    prompts: list[str]
    drawing: Drawing | None = None

    def settings(self, row: Row) -> TrainSettings:
        a = self.args
        common = {
            "teacher_model": DEMO, "target": "high", "width": SIZE, "height": SIZE,
            "n_steps": round(a.steps * row.longer), "batch_size": a.batch_size, "reuse": 4,
            "n_images": a.n_images, "n_held_out": 16, "draw_steps": 10,
            "save_every_n_steps": 0, "seed": 1, "out_dir": str(Path(a.work) / "run"), "device": "cpu",
        }  # fmt: skip
        return TrainSettings(**(common | row.settings))

    def identity(self, row: Row) -> dict[str, Any]:
        """What a stored row is compared with."""
        own = {
            "pictures": self.args.pictures, "picture_steps": self.args.picture_steps,
            "teacher": self.teacher["attention_sha256"],
        }  # fmt: skip
        # As it comes back from JSON, so that it can be compared.
        return json.loads(json.dumps(asdict(self.settings(row)) | own))

    def measure(self, row: Row) -> dict[str, Any]:
        settings = self.settings(row)
        settings.validate()
        Path(settings.out_dir).mkdir(parents=True, exist_ok=True)
        # Drawing the pictures is not a row's own time.
        training_data(settings, self.pipe, self.teacher, is_demo=True)
        trainer = RowTrainer(settings, self.pipe, self.teacher, Accelerator(cpu=True), is_demo=True, on_phase=_say)
        trainer.row = row
        result = trainer.run()
        if result.interrupted:
            raise KeyboardInterrupt
        with trainer.average.in_place():
            operators = dict(trainer.students.items())
            drawn = self.pictures(operators)
            psnr = drawn.psnr
            times = self.times(operators[TIMED])
            without = self.without(trainer)
        config = trainer.configs[TIMED]
        return {
            "error": statistics.mean(f["relative_error"] for f in result.figures.values()),
            "errors": {name: f["relative_error"] for name, f in result.figures.items()},
            "psnr": statistics.mean(psnr),
            "psnr_each": psnr,
            "detail": statistics.mean(drawn.detail),
            "without": without,
            "parameters": sum(p.numel() for p in operators[TIMED].parameters()),
            "flops": flops(operators[TIMED], (config.height, config.width)),
            "ms": times["student"].median,
            "attention_ms": times["teacher"].median,
            "seconds": result.seconds,
        }

    def pictures(self, operators: dict[str, Operator]) -> Distances:
        options = {
            "num_inference_steps": self.args.picture_steps, "guidance_scale": GUIDANCE, "width": SIZE, "height": SIZE
        }  # fmt: skip
        seeds = [FIRST_SEED + i for i in range(len(self.prompts))]
        if self.drawing is None:
            self.drawing = draw(self.pipe, self.prompts, seeds, **options)
        patch.attach(self.pipe.unet, operators)
        try:
            return compare(self.drawing, draw(self.pipe, self.prompts, seeds, **options))
        finally:
            patch.detach(self.pipe.unet)

    @torch.no_grad()
    def without(self, trainer: Trainer) -> dict[str, float]:
        """The mean error with each branch left out in turn."""
        operators, errors = [operator for _, operator in trainer.students.items()], {}
        for branch in operators[0].branches:
            for operator in operators:
                operator.off = branch
            figures = trainer._measure(trainer.students.eval())
            errors[branch] = statistics.mean(f["relative_error"] for f in figures.values())
        for operator in operators:
            operator.off = ""
        return errors

    @torch.no_grad()
    def times(self, operator: Operator) -> dict[str, Any]:
        """One call of the layer and of the attention it stands for: two images, one with and one without prompt."""
        target = find_targets(self.pipe.unet)[TIMED]
        attention = self.pipe.unet.get_submodule(target.path)
        grid = target.grid((SIZE // 8, SIZE // 8))
        x = torch.randn(2, grid[0] * grid[1], target.dim)
        given = (projections_of(attention),) if operator.core else ()
        operator.eval()
        calls = {"student": lambda: operator(x, grid, *given), "teacher": lambda: attention(x)}
        return interleaved(calls, torch.device("cpu"), 30, 3.0)


def flops(operator: Operator, size: tuple[int, int]) -> int:
    """Of one image through a layer, projections included."""
    c = operator.config
    parts = 4 if c.operator != "causal" else c.hyena_order + 2
    return 2 * size[0] * size[1] * c.dim * c.inner * parts + operator.flops(size)


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def table(rows: list[Row], stored: dict[str, Any], head: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# What matters", "",
        f"{head['machine']}; {head['date']}. `{head['command']}`",
        "",
        f"The bundled teacher at {SIZE} px; `high` (5 layers) unless a row says all (16). {head['setup']}",
        "",
        "Error: mean relative error of the layers on held-out latents, as `train` reports it: all timesteps together "
        "(`evaluate` takes the mean of five bands of them, which is higher); 1 is a constant's. PSNR: to the teacher's "
        f"pictures. Parameters, operations (an image) and time (two) are {TIMED}'s; attention has 16,448 parameters "
        f"and takes {(8 * 1024 * 64**2 + 4 * 1024**2 * 64) / 1e6:.0f} MFLOP.",
        "Detail: of the pictures' finest Laplacian band, over the teacher's. Without: the error without a branch. "
        "Parameters and time are of layers as they learn, before q's and k's maps are folded.",
        "",
        "| student | error | / default | PSNR dB, worst | detail | without near / long | states / softmax "
        "| global / mean | parameters | MFLOP | ms | attention ms | training s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    seeds = [stored[r.name]["error"] for r in rows if r.group == "default" and r.name in stored]
    reference = statistics.mean(seeds) if seeds else float("nan")
    group = ""
    for row in rows:
        if row.name not in stored:
            continue
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** |" + " |" * 12)
        r = stored[row.name]
        every = "all" in row.settings.get("target", "")
        ratio = "-" if every else f"{r['error'] / reference:.2f}"
        lines.append(
            f"| {row.name} | {r['error']:.4f} | {ratio} | {r['psnr']:.1f}, {min(r['psnr_each']):.1f} "
            f"| {r['detail']:.3f} "
            f"| {_off(r, 'near', 'long')} | {_off(r, 'states', 'softmax')} | {_off(r, 'global', 'mean')} "
            f"| {r['parameters']:,} "
            f"| {r['flops'] / 1e6:.1f} | {r['ms']:.1f} | {r['attention_ms']:.1f} | {r['seconds']:.0f} |"
        )
    if len(seeds) > 1:
        spread = (max(seeds) - min(seeds)) / reference
        pictures = [stored[r.name]["psnr"] for r in rows if r.group == "default" and r.name in stored]
        lines += [
            "",
            f"Spread over {len(seeds)} seeds of the default: error {min(seeds):.4f} to {max(seeds):.4f} "
            f"({spread:.0%} of the mean), PSNR {min(pictures):.1f} to {max(pictures):.1f} dB. "
            "Smaller differences say nothing.",
        ]
    return "\n".join(lines) + "\n"


def _off(row: dict[str, Any], *branches: str) -> str:
    return next((f"{row['without'][branch]:.3f}" for branch in branches if branch in row["without"]), "-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="names or groups, separated by ; (default: all)")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "ablations"), help="STEM of the files")
    parser.add_argument("--work", default="out/ablations", help="folder for files on the way")
    parser.add_argument("--steps", type=int, default=80, help="training steps a row (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--n_images", type=int, default=64, help="pictures to learn from (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=8, help="held-out prompts to draw (default: %(default)s)")
    parser.add_argument("--picture_steps", type=int, default=12, help="diffusion steps (default: %(default)s)")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{row.group}: {row.name}" for row in ROWS))
        return 0
    asked = [word.strip() for word in args.rows.split(";") if word.strip()]
    unknown = [word for word in asked if word not in {r.name for r in ROWS} | {r.group for r in ROWS}]
    if unknown:
        print(f"ablations: no row or group {unknown[0]!r}; --list names them", file=sys.stderr)
        return 2
    chosen = [row for row in ROWS if not asked or row.name in asked or row.group in asked]
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".json")
    document = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    pipe = load_pipeline(locate(DEMO))
    prompts = [scene.caption for scene in held_out_scenes(args.pictures)]
    bench = Bench(args, pipe, fingerprint(pipe), prompts)
    command = "python benchmarks/ablations.py"
    for name in ("steps", "batch_size", "n_images", "pictures", "picture_steps"):
        if getattr(args, name) != parser.get_default(name):
            command += f" --{name} {getattr(args, name)}"
    setup = (
        f"{args.steps} steps of batch {args.batch_size}, a teacher pass for every fourth, {args.n_images} pictures; "
        f"stage 2 adds 40. {args.pictures} held-out prompts, guidance {GUIDANCE:g}, {args.picture_steps} steps."
    )
    for row in chosen:
        identity = bench.identity(row)
        if document["rows"].get(row.name, {}).get("identity") != identity:
            print(row.name, flush=True)
            document["rows"][row.name] = measured = bench.measure(row) | {"identity": identity}
            document["machine"] = machine("cpu")
            print(
                f"  error {measured['error']:.4f}, {measured['psnr']:.1f} dB, {measured['seconds']:.0f} s", flush=True
            )
            _write(path, json.dumps(document, indent=1))
        facts = document["machine"]
        head = {"machine": describe(facts), "date": facts["date"], "command": command, "setup": setup}
        # Rows that were measured with other settings do not stand in the same table.
        valid = {r.name: document["rows"][r.name] for r in ROWS if _is_valid(document, bench, r)}
        _write(out.with_suffix(".md"), table(ROWS, valid, head))
    return 0


def _is_valid(document: dict[str, Any], bench: Bench, row: Row) -> bool:
    return document["rows"].get(row.name, {}).get("identity") == bench.identity(row)


def _write(path: Path, text: str) -> None:
    write_file(path, text)


if __name__ == "__main__":
    raise SystemExit(main())
