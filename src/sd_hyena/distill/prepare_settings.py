"""What ``sd-hyena prepare`` can be told. Light: imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..models.choices import ModelChoices
from ..settings import BATCH, STEPS, check_bounds, option
from ..texts import size_in
from .prompts import read_prompts

MIXED_PRECISION = ("no", "fp16", "bf16")
MAX_SIZES = 1000
GUIDANCE, UNCONDITIONAL = 3.0, 0.1
logger = logging.getLogger(__name__)


@dataclass
class PrepareSettings(ModelChoices):
    """Settings of one prepared folder. ``validate`` checks what can be checked before anything is loaded."""

    teacher_model: str = option(
        help="model that makes the data: demo, a diffusers folder, a single file, a hub id", short="-m", path=True
    )
    out_dir: str = option("data", "folder for the data", short="-o", folder=True)
    prompts: str = option("", "file with one prompt a line for the teacher to draw; none: a built-in list", path=True)
    images: str = option(
        "", "folder of images with captions (x.png and x.txt) to use in place of drawn pictures", path=True
    )
    sizes: str = option("512x512", "WIDTHxHEIGHT in px, a comma list; demo: 256x256 unless given")
    n_images: int = option(96, "pictures to learn from, spread evenly over the sizes", short="-n", within=(1, 1000000))
    n_held_out: int = option(32, "further pictures, for measuring only, spread alike", within=(1, 1000000))
    draw_steps: int = option(12, "diffusion steps for drawing one", within=(1, STEPS))
    guidance: float = option(GUIDANCE, "classifier-free guidance scale for drawing", within=(0, 100))
    unconditional: float = option(UNCONDITIONAL, "share of the pictures drawn for the empty prompt", within=(0, 1))
    batch_size: int = option(16, "pictures at a time", short="-b", within=(1, BATCH))
    seed: int = option(0, "of the first picture; the next ones count up", short="-d", within=(0, 2**62 - 1))
    mixed_precision: str = option("no", "type the teacher runs in; no: float32", choices=MIXED_PRECISION)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def validate(self) -> None:
        """Raises UsageError for the first setting that cannot work."""
        self.check_model_choices(self.teacher_model)
        check_bounds(self)
        sizes = parse_sizes(self.sizes)
        if not self.images:  # an image's shape decides where it goes
            check_spread(self, sizes)
        if self.prompts and self.images:
            raise UsageError("--prompts and --images exclude each other: the images' captions are their prompts")
        if self.prompts:
            read_prompts(self.prompts)
        if self.images:
            usual = {"draw_steps": 12, "guidance": GUIDANCE, "unconditional": UNCONDITIONAL}
            idle = [f"--{name}" for name, value in usual.items() if getattr(self, name) != value]
            if idle:
                logger.warning("%s: for drawn pictures only; --images ignores it", ", ".join(idle))


def check_images(settings: PrepareSettings, images: Sequence[object]) -> None:
    """Raises UsageError if there are too few images to hold some out and learn from the others."""
    if len(images) <= settings.n_held_out:
        raise UsageError(
            f"images folder {settings.images}: of {len(images)} images, --n_held_out {settings.n_held_out} leaves none "
            "to learn from"
        )


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """``"256x256,384x256"`` -> [(256, 256), (384, 256)]: width and height in px. Raises UsageError."""
    sizes: list[tuple[int, int]] = []
    for word in text.split(",")[: MAX_SIZES + 1]:
        size = size_in(word)
        if size is None:
            raise UsageError(f"--sizes {text!r}: give WIDTHxHEIGHT in px, a comma list such as 256x256,384x256")
        if size in sizes:
            raise UsageError(f"--sizes {text!r}: {word.strip()} is there twice")
        sizes.append(size)
    if len(sizes) > MAX_SIZES:
        raise UsageError(f"--sizes: gives more than {MAX_SIZES} sizes")
    return sizes


def check_spread(settings: Any, sizes: list[tuple[int, int]]) -> None:
    """Raises UsageError if a size would get no drawn picture to learn from, or none to measure on."""
    for name in ("n_images", "n_held_out"):
        if getattr(settings, name) < len(sizes):
            raise UsageError(
                f"--{name} is {getattr(settings, name)}, but must be at least {len(sizes)}: one for each size"
            )
