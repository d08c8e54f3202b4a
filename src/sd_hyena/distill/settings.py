"""What ``sd-hyena train`` can be told."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path

from ..config import OperatorChoices
from ..errors import UsageError
from ..models.choices import ModelChoices
from ..names import check_format, used_fields
from ..settings import BATCH, MANY, SIDE, STEPS, check_bounds, option
from ..sources import hyena_path
from ..targets import parse_names
from .prepare_settings import MIXED_PRECISION, check_spread, parse_sizes
from .prompts import read_prompts

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
INITS = ("teacher", "projections", "random")
DATA = ("teacher", "noise")
MAX_FILES = 100_000
MEASURE_ON = ("auto", *DATA)
STAGE_2 = (
    "finetune_lr", "finetune_batch_size", "prediction_weight", "feature_weight", "ema_decay", "gradient_checkpointing",
)  # fmt: skip
DRAWN = ("prompts", "sizes", "n_images", "n_held_out")
OF_PICTURES = (
    "prompts", "n_images", "n_held_out", "draw_steps", "unconditional", "prediction_type", "zero_snr",
)  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass
class TrainSettings(ModelChoices, OperatorChoices):
    """Settings of one training run. ``validate`` checks what can be checked before anything is loaded."""

    teacher_model: str = option(
        help="the model to learn from: demo, a diffusers folder, a single file, a hub id",
        short="-m",
        path=True,
    )
    target: str = option("IN01", "layer(s) to train: names, a comma list, 'high' or 'all'", short="-t")
    batch_size: int = option(16, "images per step and process", short="-b", within=(1, BATCH))
    lr: float = option(0.0, "learning rate of AdamW; 0: 0.64 over the layer's channels", short="-r", within=(0, 10))
    n_steps: int = option(
        200, "training steps, each layer on its teacher's inputs (stage 1)", short="-n", within=(0, MANY)
    )
    finetune_steps: int = option(0, "further steps with all layers in the UNet (stage 2)", within=(0, MANY))
    width: int = option(
        512, "image width in px; demo: 256 unless given; else the first of the sizes", short="-W", within=(1, SIDE)
    )
    height: int = option(
        512, "image height in px; demo: 256 unless given; else the first of the sizes", short="-H", within=(1, SIDE)
    )
    save_every_n_steps: int = option(
        40, "steps between saved files; 0: only the last step", short="-s", within=(0, MANY)
    )
    log_dir: str = option("logs", "TensorBoard folder", short="-l", folder=True)
    out_dir: str = option("out", "folder for the trained files", short="-o", folder=True)
    name_format: str = option(
        "Hyena-{s:05d}", "file name; {s}: updates applied, {t}: layer, for one file each", short="-f"
    )
    seed: int = option(-1, "-1 draws one and records it", short="-d", within=(-1, 2**63 - 1))
    pretrained_weight: str = option("", "Hyena file to start from (also the original's)", short="-p", path=True)
    init: str = option(
        "teacher",
        "start: teacher: its projections, the rest fitted to its attention on the data; projections: those alone",
        choices=INITS,
    )
    data: str = option(
        "teacher",
        "learn from pictures the teacher draws, or from noise as the original did, for which only its layers are read",
        choices=DATA,
    )
    measure_on: str = option(
        "auto",
        "held-out data to measure on: the teacher's pictures, or noise; auto: noise if nothing else needs pictures",
        choices=MEASURE_ON,
    )
    data_dir: str = option(
        "", "folder made by sd-hyena prepare; none: the teacher draws first, and keeps the pictures", path=True
    )
    prompts: str = option("", "file with one prompt a line; none: a built-in list", path=True)
    sizes: str = option("", "sizes to learn from, WIDTHxHEIGHT in px, a comma list; none: width and height alone")
    n_images: int = option(96, "pictures the teacher draws to learn from (cached)", within=(1, 1000000))
    n_held_out: int = option(32, "further pictures, for measuring only", within=(1, 1000000))
    draw_steps: int = option(12, "diffusion steps for drawing them", within=(1, STEPS))
    # Guidance runs half its passes on the empty prompt.
    unconditional: float = option(0.3, "share of the inputs without their prompt", within=(0, 1))
    lr_scheduler: str = option("cosine", "learning rate schedule", choices=SCHEDULERS)
    lr_warmup_steps: int = option(20, "steps of linear warm-up", within=(0, MANY))
    weight_decay: float = option(0.01, "of the projections; filters have none", within=(0, 100))
    max_grad_norm: float = option(1.0, "gradient norm limit per layer; 0: none", within=(0, 1e6))
    branch_dropout: float = option(
        0.0, "share of the updates in which one of an operator's branches is left out", within=(0, 1)
    )
    reuse: int = option(
        1, "stage 1: updates made from each pass of the teacher, which stays in memory so long", within=(1, 1000)
    )
    finetune_lr: float = option(0.0, "stage 2: learning rate; 0: a tenth of stage 1's", within=(0, 10))
    finetune_batch_size: int = option(
        0, "stage 2: UNet samples per step and process; 0: as in stage 1", within=(0, BATCH)
    )
    prediction_weight: float = option(
        1.0, "stage 2: weight of the distance to the teacher's prediction", within=(0, 1e6)
    )
    feature_weight: float = option(0.1, "stage 2: weight of the layers' mean relative error", within=(0, 1e6))
    ema_decay: float = option(
        0.99, "stage 2: moving average of the weights, which is what is saved; 0: none", within=(0, 0.999999)
    )
    gradient_checkpointing: bool = option(False, "stage 2: less memory for a second forward pass")
    mixed_precision: str = option("no", "autocast type for the optimisation", choices=MIXED_PRECISION)
    gradient_accumulation_steps: int = option(1, "batches per update", within=(1, 100000))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def validate(self) -> None:
        """Raises UsageError for the first setting that cannot work."""
        self.check_model_choices(self.teacher_model)
        check_bounds(self)
        if not self.total_steps:
            raise UsageError("--n_steps is 0, but must be at least 1, or --finetune_steps")
        if self.save_every_n_steps and self.total_steps // self.save_every_n_steps > MAX_FILES:
            raise UsageError(
                f"--save_every_n_steps {self.save_every_n_steps} of {self.total_steps} steps are more than {MAX_FILES} "
                "files: save more seldom"
            )
        if self.finetune_steps and not (self.prediction_weight or self.feature_weight):
            raise UsageError("--finetune_steps needs a loss: give one of its weights a value above 0")
        parse_names(self.target)
        check_format(self.name_format, {"s": int, "t": str})
        if len(self.saved_steps()) > 1 and "s" not in used_fields(self.name_format):
            raise UsageError(f"--name_format {self.name_format!r} repeats names: use {{s}}, or --save_every_n_steps 0")
        self.check_choices()
        self._warn_of_idle()
        if self.prompts:
            read_prompts(self.prompts)
        if self.sizes and not self.data_dir:
            check_spread(self, parse_sizes(self.sizes))
        if self.pretrained_weight and not hyena_path(self.pretrained_weight).is_file():
            raise UsageError(f"--pretrained_weight is {self.pretrained_weight}, but must be an existing Hyena file")

    def _warn_of_idle(self) -> None:
        """One line for each reason why settings that are not the default change nothing."""
        defaults = {f.name: f.default for f in fields(self)}
        for idle, names, reason in (
            (not self.finetune_steps, STAGE_2, "of stage 2, which --finetune_steps asks for"),
            (True, self.unused(), f"not for the {self.operator} operator"),
            (bool(self.data_dir), DRAWN, "of pictures that a run draws itself; --data_dir names some that are there"),
            (not self.needs_pictures, OF_PICTURES, "of pictures, and this run learns from and measures on noise alone"),
        ):
            given = [f"--{name}" for name in names if idle and getattr(self, name) != defaults[name]]
            if given:
                logger.warning("%s: ignored, being %s", ", ".join(given), reason)

    @property
    def total_steps(self) -> int:
        """Updates of both stages."""
        return self.n_steps + self.finetune_steps

    @property
    def learns_from_noise(self) -> bool:
        """Whether stage 1 does."""
        return self.data == "noise" and self.n_steps > 0

    @property
    def learns_from_pictures(self) -> bool:
        """Whether pictures are trained on, and not only measured on."""
        return not self.learns_from_noise or self.finetune_steps > 0

    @property
    def measured_on(self) -> str:
        """What the figures are on: "teacher" for its pictures, or "noise"."""
        if self.measure_on != "auto":
            return self.measure_on
        return "teacher" if self.learns_from_pictures or self.data_dir else "noise"

    @property
    def needs_pictures(self) -> bool:
        """Whether pictures are trained or measured on; what needs none needs no more of the teacher than its layers."""
        return self.learns_from_pictures or self.measured_on == "teacher"

    def training_sizes(self) -> list[tuple[int, int]]:
        """Sizes to learn from, (width, height) in px."""
        return chosen_sizes(self.data_dir, self.sizes) or [(self.width, self.height)]

    def saved_steps(self) -> list[int]:
        """After how many updates files are written: every so many, and at the end of each stage."""
        every = self.save_every_n_steps
        regular = range(every, self.total_steps, every) if every else ()
        return sorted({*regular, self.n_steps, self.total_steps} - {0})


def chosen_sizes(data_dir: str, sizes: str) -> list[tuple[int, int]]:
    """What a run learns from, (width, height) in px, unless that is its own width and height."""
    if data_dir:
        from .shards import finished_manifest

        return finished_manifest(Path(data_dir)).sizes
    return parse_sizes(sizes) if sizes else []
