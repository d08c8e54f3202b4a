"""Drawing pictures: sweeps over Hyena files, seeds per picture, file names, PNG metadata, contact sheets."""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .. import interrupts, patch
from ..api import load_hyena
from ..errors import SdHyenaError, UsageError
from ..files import Claim, make_folder
from ..processes import ALONE, Place
from ..sources import hyena_path
from .hires import draw_stages, pipelines
from .sampling import NotFiniteError
from .settings import GenerateSettings
from .sparing import Sparing
from .stages import hires_fields, hyena_fields

logger = logging.getLogger(__name__)


@dataclass
class Drawn:
    """One finished picture."""

    image: Image.Image
    path: Path
    entry: int
    seed: int
    seconds: float


def attach_entry(pipe: Any, files: Sequence[str], settings: GenerateSettings) -> list[str]:
    """Makes ``files`` the only Hyena layers in the pipeline; returns the layers replaced.

    Raises UsageError if two stacked files hold the same layer.
    """
    patch.detach(pipe.unet)
    scaling = None if settings.scaling == "file" else settings.scaling
    replaced = [load_hyena(pipe, file, settings.target or None, scaling) for file in files]
    check_stack(files, replaced)
    return [name for names in replaced for name in names]


def check_stack(files: Sequence[str], layers: Sequence[Sequence[str]]) -> None:
    """Raises UsageError if two of the stacked files hold the same of their ``layers``."""
    held = Counter(name for names in layers for name in names)
    twice = sorted(name for name, count in held.items() if count > 1)
    if twice:
        raise UsageError(f"{'+'.join(files)}: layer {twice[0]} is in more than one of the stacked files")


def draw_sweep(
    pipe: Any,
    settings: GenerateSettings,
    seed: int,
    model_hash: str,
    claim: Claim | None = None,
    place: Place = ALONE,
) -> Iterator[Drawn]:
    """Draws and saves every image of the sweep, entry by entry; the same seeds for every entry. ``claim``: the files
    that may be replaced, unless given none. One of several processes draws the iterations that are its own: whole
    batches, as rounding depends on what is in one."""
    claim = claim or Claim()
    paths, entries, plan = settings.plan(), settings.entries(), pipelines(pipe, settings)
    sparing = Sparing(pipe)  # what is done to save memory stays
    with_hyena = [stage for stage, _ in plan if stage.hyena]
    for files in entries:  # every file is checked against the model before the first picture is drawn
        attach_entry(pipe, files, settings)
        for stage in with_hyena:
            patch.check_grid(pipe.unet, (stage.height // pipe.vae_scale_factor, stage.width // pipe.vae_scale_factor))
    if any(entries) and not with_hyena:
        logger.warning("no picture is larger than %d px: attention draws them all", settings.hyena_above)
    make_folder(settings.out_dir)
    for h, files in enumerate(entries):
        layers = attach_entry(pipe, files, settings)
        for b in range(settings.iteration):
            if not place.has(h * settings.iteration + b):
                continue
            first = b * settings.num_images
            seeds = [seed + first + i for i in range(settings.num_images)]
            with interrupts.unit("picture" if len(seeds) == 1 else "batch of pictures"):
                started = time.perf_counter()
                try:
                    images = draw_stages(plan, settings, [settings.prompt] * len(seeds), seeds, sparing)
                except NotFiniteError as error:
                    raise SdHyenaError(f"{'+'.join(files) or 'plain model'}, seed {seeds[0]}: {error}") from None
                seconds = (time.perf_counter() - started) / len(seeds)
                for i, image in enumerate(images):
                    text = parameters_text(pipe, settings, seeds[i], model_hash, files, layers)
                    path = claim.write(paths[h][first + i], to_png(image, text))
                    yield Drawn(image, path, h, seeds[i], seconds)
    patch.detach(pipe.unet)


def parameters_text(
    pipe: Any, settings: GenerateSettings, seed: int, model_hash: str, files: Sequence[str], layers: Sequence[str]
) -> str:
    """The ``parameters`` chunk as A1111's web UI writes it, plus Hyena fields."""
    fields = {
        "Steps": settings.steps,
        "Sampler": type(pipe.scheduler).__name__.removesuffix("Scheduler"),
        "CFG scale": f"{settings.cfg_scale:g}",
        "Seed": seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": model_hash,
        "Model": Path(settings.model).stem,
    }
    if pipe.scheduler.config.get("use_karras_sigmas"):
        fields["Schedule type"] = "Karras"
    if getattr(pipe.vae, "use_tiling", False):
        fields["VAE tiles"] = f"{pipe.vae.tile_sample_min_size} px"
    fields |= hires_fields(settings)
    if files:
        fields["Hyena"] = "+".join(Path(f).name for f in files)
        fields["Hyena hash"] = "+".join(map(file_hash, files))
        fields |= hyena_fields(settings)
        fields["Hyena layers"] = " ".join(layers)
    lines = [
        settings.prompt,
        f"Negative prompt: {settings.negative_prompt}",
        ", ".join(f"{k}: {v}" for k, v in fields.items()),
    ]
    return "\n".join(lines)


def file_hash(file: str) -> str:
    """What tells a Hyena file from another of its name."""
    return hashlib.sha256(hyena_path(file).read_bytes()).hexdigest()[:10]


def to_png(image: Image.Image, parameters: str = "") -> bytes:
    """A picture as a PNG file's contents, with ``parameters`` as A1111's web UI writes them."""
    info = PngInfo()
    if parameters:
        info.add_itxt("parameters", parameters) if not parameters.isascii() else info.add_text("parameters", parameters)
    image.save(data := io.BytesIO(), "PNG", pnginfo=info)
    return data.getvalue()


def read_png(path: str) -> Image.Image:
    """A picture of this run, maybe another process's. Raises SdHyenaError if it is not there any more."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.copy()
    except OSError as error:
        raise SdHyenaError(f"{path}: not there for the contact sheet: {error.strerror or error}") from None


def contact_sheet(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str | Sequence[str]]) -> Image.Image:
    """One row of pictures per entry, all of one size. A label stands over its row, or over each picture."""
    width, height = rows[0][0].size
    gap, bar = 6, 26
    sheet = Image.new("RGB", (gap + max(map(len, rows)) * (width + gap), len(rows) * (bar + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = r * (bar + height + gap)
        if isinstance(label, str):
            _write(draw, label, gap, top + bar / 2, sheet.width - 2 * gap)
        for c, image in enumerate(row):
            left = gap + c * (width + gap)
            sheet.paste(image, (left, top + bar))
            if not isinstance(label, str):
                _write(draw, label[c], left, top + bar / 2, width)
    return sheet


def _write(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, width: float) -> None:
    """One line, in the largest type that fits; where none does, its end."""
    for size in range(16, 8, -1):
        font = ImageFont.load_default(size)
        if draw.textlength(text, font) <= width:
            break
    else:
        while text and draw.textlength(f"...{text}", font) > width:
            text = text[1:]
        text = f"...{text}"
    draw.text((x, y), text, "black", font, anchor="lm")
