"""What ``make demo`` shows: teach five layers, draw with them, measure, time, and write it all down."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import strict_json
from ..benchmark.figures import plot_sizes
from ..benchmark.kinds import Shape, latent_cells
from ..benchmark.measure import Limits, Row, crossover, measure_sizes
from ..benchmark.report import size_lines
from ..benchmark.settings import GROUPS
from ..distill.results import Progress, Result
from ..distill.settings import TrainSettings
from ..distill.trainer import Trainer
from ..evaluate import page
from ..evaluate.report import write_report
from ..evaluate.run import Evaluation, evaluate
from ..evaluate.settings import FILES, EvaluateSettings
from ..families import DEMO
from ..figures import rendered
from ..files import Claim, locked
from ..fingerprint import fingerprint
from ..generate.draw import contact_sheet, to_png
from ..interrupts import Interrupted
from ..machine import describe
from ..models import load_pipeline, locate, size_defaults
from ..recipes import recipe_path
from ..settings import resolve

logger = logging.getLogger(__name__)
STUDENT = "five Hyena layers"
MARK = ".sd-hyena-demo"  # in folders of demonstrations
SHEET_COLUMNS = 8
KINDS = (
    "sdp-flash",
    "sdp-cudnn",
    "sdp-efficient",
    "causal",
    "linear-elu",
    "states",
)


@dataclass
class DemoSettings:
    """How long the demonstration takes, mostly."""

    out_dir: str
    n_steps: int
    prompts: int
    steps: int
    widths: tuple[int, ...]
    n_images: int = 24
    device: str = "cpu"

    def outputs(self) -> list[Path]:
        """The files to write, but those of the training run."""
        pictures = [f"{number:02d}_{who}.png" for number in range(self.prompts) for who in ("teacher", "student")]
        others = ("side_by_side.png", "times.png", "times.svg", "figures.json")
        return [Path(self.out_dir) / name for name in (*FILES, *pictures, *others)]


@dataclass
class Demonstration:
    """Everything the report shows."""

    training: Result
    evaluation: Evaluation
    rows: list[Row]
    seconds: float

    def figures(self) -> dict[str, Any]:
        """The measured numbers, as they are written to figures.json."""
        kinds = dict.fromkeys(row.kind for row in self.rows)
        return {
            "layers": self.training.figures,
            "evaluation": self.evaluation.figures(),
            "times": [row.record() for row in self.rows],
            "crossover_px": {kind: crossover(self.rows, kind) for kind in kinds if kind in GROUPS["hyena"]},
            "training_seconds": self.training.seconds,
            "seconds": self.seconds,
        }


def training_settings(settings: DemoSettings) -> TrainSettings:
    """The demonstration's training run: ``sd-hyena train -m demo --recipe quick``."""
    own = {
        "teacher_model": DEMO,
        "n_steps": settings.n_steps,
        "n_images": settings.n_images,
        "n_held_out": max(4, settings.n_images // 3),
        "seed": 1,
        "out_dir": settings.out_dir,
        "device": settings.device,
    }
    return resolve(TrainSettings, own | size_defaults(DEMO), recipe_path("quick"))


def demonstrate(
    settings: DemoSettings,
    phase: Callable[[str], None] = logger.info,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Demonstration:
    """Runs the demonstration and writes pictures, figures and report.html to ``settings.out_dir``."""
    from accelerate import Accelerator

    started, out = time.time(), Path(settings.out_dir)
    with locked(out):
        claim = Claim(settings.outputs())
        (out / MARK).touch()
        phase("loading the bundled model")
        pipe = load_pipeline(locate(DEMO), settings.device)
        accelerator = Accelerator(cpu=settings.device == "cpu")
        choices = training_settings(settings)
        trainer = Trainer(choices, pipe, fingerprint(pipe), accelerator, True, phase, on_progress)
        training = trainer.run()
        if training.interrupted:
            raise Interrupted(training.interrupted)
        measuring = EvaluateSettings(
            model=DEMO,
            hyena=str(training.files[-1]),
            num_prompts=settings.prompts,
            width=choices.width,
            height=choices.height,
            steps=settings.steps,
            layer_samples=2,
            no_yardstick=True,
        )
        evaluation = evaluate(pipe, {STUDENT: training.files[-1:]}, measuring, phase=phase)
        phase("timing one layer of Stable Diffusion 1.x's size, attention against Hyena")
        rows = measure_sizes(partial(_layer, settings.device), settings.widths, KINDS, Limits(budget=5))
        rows = [row for row in rows if row.timing]
        result = Demonstration(training, evaluation, rows, time.time() - started)
        _write(out, result, claim)
    return result


def _layer(device: str, width: int) -> Shape:
    """IN01 of Stable Diffusion 1.x for one square picture: what the times are taken on."""
    cells = latent_cells(width)
    return Shape(320, 8, cells, cells, 1, torch.float32, torch.device(device), (64, 64))


def _write(out: Path, result: Demonstration, claim: Claim) -> None:
    prompts = result.evaluation.prompts
    teacher, student = (row.drawing.images for row in result.evaluation.rows)
    for number, prompt in enumerate(prompts):
        claim.write(out / f"{number:02d}_teacher.png", to_png(teacher[number], prompt))
        claim.write(out / f"{number:02d}_student.png", to_png(student[number], prompt))
    shown = slice(0, SHEET_COLUMNS)
    labels = ["attention (teacher)", "five attn1 layers replaced by Hyena (student)"]
    claim.write(out / "side_by_side.png", to_png(contact_sheet([teacher[shown], student[shown]], labels)))
    title = f"one layer, 320 channels, batch 1, float32\n{describe(result.evaluation.machine)}"
    png, svg = (rendered(plot_sizes(result.rows, title), form, dpi=150) for form in ("png", "svg"))
    claim.write(out / "times.png", png)
    claim.write(out / "times.svg", svg)
    claim.write(out / "figures.json", strict_json.dumps(result.figures(), str(out / "figures.json"), 2))
    write_report(out, result.evaluation, _times(svg, result), claim)


def _times(plot: bytes, result: Demonstration) -> str:
    """The page's section on speed, with times.svg in it."""
    return f"""<h2>Time of one layer</h2>
<p>A whole layer of Stable Diffusion 1.x's finest level (320 channels, 8 heads, projections included), float32, batch 1.
In brackets the best attention's time over this one's. Losses are shown too.</p>
<img class="plot" alt="time per layer against image width" src="{page.inline(plot, "image/svg+xml")}">
{page.table(*size_lines(result.rows))}
<p>Made by <code>sd-hyena demo</code> in {result.seconds:.0f} s: the bundled model drew its own training data, and the
layers learned from its attention in {result.training.seconds:.0f} s. More or fewer diffusion steps than
{result.evaluation.settings.steps} hardly change the PSNR: docs/results.md has a table.</p>"""
