"""What ``sd-hyena train`` can be told."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..names import check_format, used_fields
from ..settings import option
from ..targets import parse_names
from .prepare_settings import MIXED_PRECISION, check_share, check_spread, parse_sizes
from .prompts import read_prompts

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
INITS = ("teacher", "random")
DATA = ("teacher", "noise")
logger = logging.getLogger(__name__)


@dataclass
class TrainSettings:
    """Settings of one training run. ``validate`` checks what can be checked before anything is loaded."""

    teacher_model: str = option(
        help="model that makes the training data: demo, a diffusers folder, a single file, a hub id", short="-m"
    )
    target: str = option("IN01", "layer(s) to train: names, a comma list, 'high' or 'all'", short="-t")
    batch_size: int = option(16, "images per step and process", short="-b")
    lr: float = option(1e-5, "learning rate of AdamW", short="-r")
    n_steps: int = option(200, "training steps", short="-n")
    width: int = option(512, "image width in px; demo: 256 unless given; else the first of the sizes", short="-W")
    height: int = option(512, "image height in px; demo: 256 unless given; else the first of the sizes", short="-H")
    save_every_n_steps: int = option(40, "steps between saved files; 0: only the last step", short="-s")
    log_dir: str = option("logs", "TensorBoard folder", short="-l")
    out_dir: str = option("out", "folder for the trained files", short="-o")
    name_format: str = option(
        "Hyena-{s:05d}", "file name; {s}: updates applied, {t}: layer, for one file each", short="-f"
    )
    seed: int = option(-1, "-1 draws one and records it", short="-d")
    pretrained_weight: str = option("", "Hyena file to start from (also the original's)", short="-p")
    operator: str = option(
        "hyena2d", "hyena2d: two-dimensional, non-causal; causal: as published", choices=("hyena2d", "causal")
    )
    hyena_order: int = option(2, "order of the recurrence")
    hyena_filter_order: int = option(64, "width of the filter's MLP")
    hyena_num_blocks: int = option(1, "blocks the sequence is cut into (causal operator only)")
    hyena_num_heads: int = option(1, "groups of channels that share filters")
    hyena_short_filter_order: int = option(3, "taps of the short filter (per axis for hyena2d)")
    form: str = option("full", "full: own projections; core: the teacher's", choices=("full", "core"))
    global_branch: str = option("linear", "what carries the flat part of attention", choices=("none", "mean", "linear"))
    scaling: str = option("stretch", "how filters grow to larger images", choices=("extend", "stretch"))
    init: str = option("teacher", "start from the teacher's attention, or at random", choices=INITS)
    data: str = option(
        "teacher", "learn from pictures the teacher draws, or from noise as the original did", choices=DATA
    )
    data_dir: str = option("", "folder made by sd-hyena prepare; none: the teacher draws first, and keeps the pictures")
    prompts: str = option("", "file with one prompt a line; none: a built-in list")
    sizes: str = option("", "sizes to learn from, WIDTHxHEIGHT in px, a comma list; none: width and height alone")
    n_images: int = option(96, "pictures the teacher draws to learn from (cached)")
    n_held_out: int = option(32, "further pictures, for measuring only")
    draw_steps: int = option(12, "diffusion steps for drawing them")
    # Guidance runs half its passes on the empty prompt.
    unconditional: float = option(0.3, "share of the inputs whose prompt is replaced by the empty one")
    lr_scheduler: str = option("cosine", "learning rate schedule", choices=SCHEDULERS)
    lr_warmup_steps: int = option(20, "steps of linear warm-up")
    weight_decay: float = option(0.01, "of the projections; filters have none")
    max_grad_norm: float = option(1.0, "gradient norm limit per layer; 0: none")
    mixed_precision: str = option("no", "autocast type for the optimisation", choices=MIXED_PRECISION)
    gradient_accumulation_steps: int = option(1, "batches per update")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def validate(self) -> None:
        """Raises UsageError for the first setting that cannot work."""
        for name in ("batch_size", "n_steps", "gradient_accumulation_steps", "n_images", "n_held_out", "draw_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("save_every_n_steps", "lr_warmup_steps", "weight_decay", "max_grad_norm"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(0 < self.lr < 10, "lr", self.lr, "a positive number such as 1e-4")
        _require(-1 <= self.seed < 2**63, "seed", self.seed, "-1 or a whole number from 0")
        parse_names(self.target)
        check_format(self.name_format, {"s": int, "t": str})
        if 0 < self.save_every_n_steps < self.n_steps and "s" not in used_fields(self.name_format):
            raise UsageError(f"--name_format {self.name_format!r} repeats names: use {{s}}, or --save_every_n_steps 0")
        if self.operator == "causal":
            for name, usual in (("global_branch", "linear"), ("scaling", "stretch")):
                if getattr(self, name) != usual:
                    logger.warning("--%s belongs to hyena2d; the causal operator ignores it", name)
        if self.prompts:
            read_prompts(self.prompts)
        check_share("unconditional", self.unconditional)
        if self.data_dir:
            drawn = {"prompts": "", "sizes": "", "n_images": 96, "n_held_out": 32}
            idle = [f"--{name}" for name, value in drawn.items() if getattr(self, name) != value]
            if idle:
                logger.warning("%s: for pictures drawn by this run only; --data_dir ignores it", ", ".join(idle))
        elif self.sizes:
            check_spread(self, parse_sizes(self.sizes))
        if self.pretrained_weight:
            _require(
                Path(self.pretrained_weight).is_file(),
                "pretrained_weight",
                self.pretrained_weight,
                "an existing Hyena file",
            )
        from ..nn import OperatorConfig

        try:
            OperatorConfig(dim=self.hyena_num_heads, height=1, width=1, **self.operator_choices())
        except ValueError as error:
            raise UsageError(f"hyena settings: {error}") from None

    def operator_choices(self) -> dict[str, Any]:
        """The OperatorConfig fields that the user chooses."""
        return {
            "operator": self.operator,
            "order": self.hyena_order,
            "filter_order": self.hyena_filter_order,
            "num_blocks": self.hyena_num_blocks,
            "num_heads": self.hyena_num_heads,
            "short_filter_order": self.hyena_short_filter_order,
            "form": self.form,
            "global_branch": self.global_branch,
            "scaling": self.scaling,
        }


def _require(condition: bool, name: str, value: object, needed: str) -> None:
    if not condition:
        raise UsageError(f"--{name} is {value}, but must be {needed}")
