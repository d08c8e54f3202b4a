"""What ``sd-hyena anatomy`` can be told. Light: imports no torch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from ..distill.prompts import default_prompts, read_prompts
from ..errors import UsageError
from ..families import ARCHITECTURES, DEMO
from ..files import refuse_existing
from ..generate.settings import check_guidance
from ..models.choices import ModelChoices
from ..settings import SEEDS, SIDE, check_bounds, option
from ..targets import parse_names

FILES = ("anatomy.md", "anatomy.json", "anatomy.png", "displacement.png")


@dataclass
class AnatomySettings(ModelChoices):
    """Settings of one examination. ``validate`` checks what needs no model."""

    model: str = option("", "demo, a diffusers folder, a single file, a hub id", short="-m", path=True)
    random_weights: str = option("", "instead of a model: this architecture, untrained", choices=("", *ARCHITECTURES))
    target: str = option("all", "which layers to look at", short="-t")
    prompts: str = option(
        "", "file with one prompt a line; unless given, the bundled model's or a short general list", path=True
    )
    num_prompts: int = option(4, "how many pictures of its own the model is looked at on", short="-n", within=(1, 1000))
    width: int = option(512, "image width in px; demo: 256 unless given", short="-W", within=(1, SIDE))
    height: int = option(512, "image height in px; demo: 256 unless given", short="-H", within=(1, SIDE))
    steps: int = option(20, "diffusion steps of those pictures", short="-s", within=(1, 1000))
    cfg_scale: float = option(5.0, "classifier-free guidance scale of those pictures", short="-c", within=(0, 100))
    seed: int = option(0, "seed of the first picture, and of the choice of prompts", short="-k", within=(0, SEEDS))
    bands: int = option(3, "timestep bands", within=(1, 100))
    samples: int = option(2, "noised latents in each band", within=(1, 1000))
    rank: int = option(16, "of the low-rank oracles; an eighth of the cells on small grids", within=(1, 256))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    out: str = option("", f"folder for {', '.join(FILES)}; unless given, only print", short="-o", folder=True)
    overwrite: bool = option(False, "replace files that are already there")

    def validate(self) -> None:
        """Raises UsageError for the first setting that cannot work."""
        if bool(self.model) == bool(self.random_weights):
            raise UsageError("give either -m/--model or --random_weights")
        self.check_model_choices(self.model)
        parse_names(self.target)
        check_bounds(self)
        check_guidance(self.cfg_scale)
        refuse_existing(self.outputs(), self.overwrite, "--out")

    def outputs(self) -> list[Path]:
        """The files this run will write."""
        return [Path(self.out) / name for name in FILES] if self.out else []

    @property
    def name(self) -> str:
        """What is looked at, for titles."""
        return self.model or f"{self.random_weights} (random weights)"

    def read_prompts(self) -> list[str]:
        """``num_prompts`` prompts: the first of the file, or some of the default list. Raises UsageError."""
        if self.prompts:
            lines = read_prompts(self.prompts)
        else:
            lines = list(default_prompts(self.model == DEMO))
            random.Random(self.seed).shuffle(lines)
        return [lines[i % len(lines)] for i in range(self.num_prompts)]
