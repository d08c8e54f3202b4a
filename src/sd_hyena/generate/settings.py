"""What ``sd-hyena generate`` can be told, and the file names that follow from it. Light: imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import refuse_existing
from ..models.choices import ModelChoices
from ..names import check_format, used_fields
from ..processes import here
from ..settings import BATCH, SEEDS, SIDE, STEPS, check_bounds, option
from ..sources import hyena_path
from ..targets import parse_names
from ..texts import check_prompt
from .samplers import SCHEDULERS
from .stages import HIRES_STRENGTH, check_stages

NAME_FIELDS = {"h": int, "n": int, "b": int, "i": int}
MAX_PICTURES = 100_000  # whose names are planned before the first is drawn
MAX_ENTRIES = 1000
GRID_NAME = "grid.png"


@dataclass
class GenerateSettings(ModelChoices):
    """Settings of one ``sd-hyena generate``. ``validate`` checks what needs no model."""

    model: str = option(help="demo, a diffusers folder, a single file, a hub id", short="-m", path=True)
    prompt: str = option(help="what to draw; demo has an example", short="-p")
    hyena: str = option(
        "",
        "Hyena files or folders: entries between commas are drawn in turn, a+b stacks two, an empty entry is the plain "
        "model; a file that exists may have , or + in its name",
        short="-y",
    )
    target: str = option("", "which layers to replace; unless given, all that the file holds", short="-t")
    negative_prompt: str = option("", "what not to draw", short="-q")
    width: int = option(512, "image width in px; demo: 256 unless given", short="-W", within=(1, SIDE))
    height: int = option(512, "image height in px; demo: 256 unless given", short="-H", within=(1, SIDE))
    num_images: int = option(4, "images per iteration", short="-n", within=(1, BATCH))
    steps: int = option(30, "diffusion steps", short="-s", within=(1, STEPS))
    cfg_scale: float = option(7.0, "classifier-free guidance scale; 0 disables guidance", short="-c", within=(0, 100))
    iteration: int = option(
        1, "iterations; num_images * iterations images in all", short="-i", within=(1, MAX_PICTURES)
    )
    seed: int = option(-1, "of the first image, the next ones count up; -1 draws one", short="-k", within=(-1, SEEDS))
    out_dir: str = option("./", "folder for the images", short="-o", folder=True)
    name_format: str = option(
        "image_{n:03d}",
        "file name; {h}: entry, {b}: iteration, {i}: image in it, {n}: image of the entry (of the sweep without {h})",
        short="-f",
    )
    scaling: str = option(
        "file", "how blocks grow with larger images; file: as trained", choices=("file", "extend", "stretch")
    )
    scheduler: str = option("model", "sampler; model: the model's own", choices=("model", *SCHEDULERS))
    hires: str = option(
        "", "WxH in px: the picture, drawn at its native size (-W -H), is enlarged to this and drawn over again"
    )
    hires_strength: float = option(
        HIRES_STRENGTH, "how much noise the enlarged picture gets, of all there is", within=(0.01, 1)
    )
    hires_steps: int = option(0, "steps at the high size; 0: as close together as the native ones", within=(0, STEPS))
    hires_hyena: str = option("hires", "with --hires, where Hyena layers are", choices=("hires", "both"))
    hyena_above: int = option(0, "px: Hyena only where the picture's longer side is above this", within=(0, SIDE))
    hyena_range: str = option("0-1", "share of the steps, of each stage, in which Hyena is: 0.2-1.0 spares the first")
    offload: str = option(
        "auto",
        "what waits in system memory while not in use: nothing, models or layers; auto: by the GPU's free memory",
        choices=("auto", "none", "model", "sequential"),
    )
    vae_tiling: str = option(
        "auto",
        "whether the VAE works in tiles; auto: on large pictures when memory is short",
        choices=("auto", "on", "off"),
    )
    dtype: str = option(
        "auto", "auto: float16 on a GPU, float32 on the CPU", choices=("auto", "float32", "float16", "bfloat16")
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    grid: bool = option(False, "also save a contact sheet of the sweep, grid.png")
    overwrite: bool = option(False, "replace files that are already there")

    def validate(self) -> None:
        """Raises UsageError for the first setting that cannot work."""
        self.check_model_choices(self.model)
        check_bounds(self)
        check_guidance(self.cfg_scale)
        check_prompt("--prompt", self.prompt)
        check_prompt("--negative_prompt", self.negative_prompt)
        check_stages(self)
        if self.target:
            parse_names(self.target)
        check_format(self.name_format, NAME_FIELDS)
        for entry in self.entries():
            for file in entry:
                if not hyena_path(file).is_file():
                    raise UsageError(f"--hyena: no file {file}")
        if here().is_main:  # the others may come when it has begun
            refuse_existing(self.outputs(), self.overwrite, "--out_dir or --name_format")

    def outputs(self) -> list[Path]:
        """The files this run will write. Raises UsageError where two collide."""
        paths = [path for row in self.plan() for path in row] + [Path(self.out_dir) / GRID_NAME] * self.grid
        if len(set(paths)) < len(paths):
            raise UsageError(
                f"--name_format {self.name_format!r} repeats names: use {{n}}, or {{h}} with {{b}} and {{i}}"
            )
        return paths

    def entries(self) -> list[list[str]]:
        """The sweep: for each entry, the files stacked in it."""
        return split_entries(self.hyena)

    def plan(self) -> list[list[Path]]:
        """The path of every image, by entry. Raises UsageError for too many."""
        per_entry, folder = self.num_images * self.iteration, Path(self.out_dir)
        if per_entry * len(self.entries()) > MAX_PICTURES:
            raise UsageError(
                f"--num_images and --iteration ask for more than {MAX_PICTURES} pictures: take several runs"
            )
        restart = "h" in used_fields(self.name_format)
        paths = []
        for h in range(len(self.entries())):
            row = []
            for j in range(per_entry):
                n = j if restart else h * per_entry + j
                stem = self.name_format.format(h=h, n=n, b=j // self.num_images, i=j % self.num_images)
                row.append(folder / f"{stem}.png")
            paths.append(row)
        return paths

    def sampling_options(self) -> dict[str, Any]:
        """The pipeline's keyword arguments for size, steps and guidance."""
        return {
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.cfg_scale,
        }


def check_guidance(scale: float) -> None:
    """Raises UsageError for a guidance scale between none and that of the prompt alone."""
    if 0 < scale < 1:
        raise UsageError(f"--cfg_scale is {scale:g}, but must be 0 (no guidance) or from 1 to 100")


def split_entries(files: str) -> list[list[str]]:
    """``a,b+c,`` -> [[a], [b, c], []]: comma-separated entries of files, stacked with +. Where a name has one of
    these in it, the longest part of the text that exists is that name; ``~`` is the home folder. Raises UsageError for
    too many."""
    if len(re.findall("[,+]", files)) > MAX_ENTRIES:
        raise UsageError(f"--hyena: names more than {MAX_ENTRIES} files")
    entries: list[list[str]] = [[]]
    sign = ","
    while sign:
        name, sign, files = _first_file(files)
        if name:
            entries[-1].append(os.path.expanduser(name))
        if sign == ",":
            entries.append([])
    return entries


def _first_file(text: str) -> tuple[str, str, str]:
    """The first file's name, the sign after it, and what follows that."""
    ends = [match.start() for match in re.finditer(r"[,+]|\Z", text)]
    for end in reversed(ends):
        for name in (text[:end], text[:end].strip()):
            if os.path.exists(os.path.expanduser(name)):
                return name, text[end : end + 1], text[end + 1 :]
    return text[: ends[0]].strip(), text[ends[0] : ends[0] + 1], text[ends[0] + 1 :]
