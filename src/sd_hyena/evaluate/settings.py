"""What ``sd-hyena evaluate`` can be told. Light: imports no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..families import DEMO
from ..files import refuse_existing
from ..generate.settings import GenerateSettings, split_entries
from ..models.choices import ModelChoices
from ..settings import SEEDS, SIDE, STEPS, check_bounds, option
from ..sources import is_remote

FILES = ("report.html", "evaluation.md", "evaluation.json", "sheet.png", "errors.png")
MAX_BANDS = 100
MIN_SIDE = 16  # px: the window of the structural similarity is 11 px wide


@dataclass
class EvaluateSettings(ModelChoices):
    """Settings of one evaluation; those it shares with ``generate`` mean the same. ``validate`` checks what needs
    no model."""

    model: str = option(help="demo, a diffusers folder, a single file, a hub id", short="-m", path=True)
    hyena: str = option(
        "",
        "Hyena file(s), folders, hub ids to measure: comma-separated entries are rows of the table, a+b stacks files",
        short="-y",
    )
    target: str = option("", "which layers to replace; unless given, all that the file holds", short="-t")
    prompts: str = option(
        "", "file with one prompt a line; unless given, held-out ones of ours: no recipe trains on them", path=True
    )
    num_prompts: int = option(16, "how many prompts to draw", short="-n", within=(1, 100000))
    width: int = option(512, "image width in px; demo: 256 unless given", short="-W", within=(1, SIDE))
    height: int = option(512, "image height in px; demo: 256 unless given", short="-H", within=(1, SIDE))
    steps: int = option(30, "diffusion steps", short="-s", within=(1, STEPS))
    cfg_scale: float = option(5.0, "classifier-free guidance scale", short="-c", within=(0, 100))
    seed: int = option(1000, "of the first prompt; the next ones count up", short="-k", within=(0, SEEDS))
    scaling: str = option(
        "file", "how blocks grow with larger images; file: as trained", choices=("file", "extend", "stretch")
    )
    bands: int = option(5, "timestep bands of the error figures", within=(1, MAX_BANDS))
    layer_samples: int = option(
        8, "noised latents in each band that errors are measured on; 0: pictures only", within=(0, 10000)
    )
    no_yardstick: bool = option(False, "leave out the teacher with another attention backend and in bfloat16")
    clip_model: str = option("", "CLIP model for a CLIP score: a transformers folder or a hub id", path=True)
    fid: bool = option(False, "Frechet distance to the teacher's pictures (torch-fidelity and its weights)")
    lpips: bool = option(False, "LPIPS to the teacher's pictures (torchvision and its AlexNet weights)")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    out_dir: str = option(
        "",
        "folder for evaluation.json and .md, sheet.png, report.html; unless given, only print",
        short="-o",
        folder=True,
    )
    overwrite: bool = option(False, "replace files that are already there")

    def validate(self) -> None:
        """Raises UsageError for the first setting that cannot work."""
        check_bounds(self)
        if min(self.width, self.height) < MIN_SIDE:
            raise UsageError(f"{self.width}x{self.height} px is too small to compare pictures: {MIN_SIDE} px or more")
        self.drawing().validate()
        if self.clip_model and not os.path.isdir(self.clip_model) and not is_remote(self.clip_model):
            raise UsageError(f"--clip_model {self.clip_model} not found: give a transformers folder or a hub id")
        entries = self.entries()
        if not all(entries):
            raise UsageError("--hyena: every entry must name a file, or files stacked with +")
        if self.fid and self.num_prompts < 2:
            raise UsageError("--fid compares sets of pictures: --num_prompts must be at least 2")
        labels(entries)
        refuse_existing(self.outputs(), self.overwrite)

    def outputs(self) -> list[Path]:
        """The files this run will write."""
        return [Path(self.out_dir) / name for name in FILES] if self.out_dir else []

    def entries(self) -> list[list[str]]:
        """For each student, the files stacked in it."""
        return split_entries(self.hyena)

    def drawing(self) -> GenerateSettings:
        """What the pictures are drawn with."""
        return GenerateSettings(
            model=self.model,
            prompt="-",
            hyena=self.hyena,
            target=self.target,
            width=self.width,
            height=self.height,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            seed=self.seed,
            scaling=self.scaling,
            overwrite=True,
            **self.model_choices(),
        )

    def read_prompts(self) -> list[str]:
        """``num_prompts`` prompts of the file, or else held-out ones, over again where there are fewer. Raises
        UsageError."""
        from ..distill.prompts import held_out_prompts, read_prompts

        lines = read_prompts(self.prompts) if self.prompts else held_out_prompts(self.model == DEMO, self.num_prompts)
        return [lines[i % len(lines)] for i in range(self.num_prompts)]


def labels(entries: Sequence[Sequence[str]]) -> list[str]:
    """A short name for each entry: its files' names, with as much of their folders as tells all entries apart.
    Raises UsageError if an entry is given twice."""
    depth = max((len(Path(file).parts) for entry in entries for file in entry), default=1)
    for parts in range(1, depth + 1):
        names = ["+".join("/".join(Path(f).with_suffix("").parts[-parts:]) for f in entry) for entry in entries]
        if len(set(names)) == len(names):
            return names
    twice = next(name for name, count in Counter(names).items() if count > 1)
    raise UsageError(f"--hyena: {twice} is given twice")
