"""From the settings of ``sd-hyena benchmark image`` to a pipeline, its entries, and a way to draw with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import patch
from ..api import load_hyena
from ..checkpoint import load
from ..errors import UsageError
from ..families import from_text
from ..generate.samplers import with_usable_scheduler
from ..models import load_pipeline, locate, random_pipeline
from ..targets import find_targets, select
from .image import Entry, attention_entry, hyena_entry, untrained
from .settings import ImageSettings

PROMPT = "a photograph of a lighthouse on a cliff, evening light"


def prepare(settings: ImageSettings) -> tuple[Any, list[Entry], Callable[[int], object]]:
    """(pipeline, entries, generate(steps)). Raises UsageError or SdHyenaError for what does not fit."""
    for files in settings.entries():  # unusable files are reported before anything heavy is loaded
        for file in files:
            load(file)
    dtype = getattr(torch, settings.dtype)
    text: dict[str, Any]
    if settings.random_weights:
        pipe, one = random_pipeline(settings.random_weights, settings.device, dtype)
        text = {name: t.repeat_interleave(settings.num_images, 0) for name, t in one.items()}
        if settings.cfg_scale == 0:
            text = {name: t for name, t in text.items() if not name.startswith("negative")}
    else:
        source = locate(settings.model, settings.variant)
        pipe = with_usable_scheduler(load_pipeline(source, settings.device, dtype, settings))
        text = {"prompt": [PROMPT] * settings.num_images}
    entries = [attention_entry(name) for name in settings.attentions()]
    entries += [_from_files(files, settings) for files in settings.entries()]
    if not settings.entries():
        entries.append(_untrained(pipe, settings))
    for entry in entries:  # all of them fit before the first is timed
        if entry.family == "hyena":
            entry.prepare(pipe)
            patch.check_grid(pipe.unet, tuple(n // pipe.vae_scale_factor for n in (settings.height, settings.width)))

    def generate(steps: int) -> object:
        seeds = [torch.Generator().manual_seed(i) for i in range(settings.num_images)]
        return pipe(
            **text,
            generator=seeds,
            width=settings.width,
            height=settings.height,
            num_inference_steps=steps,
            guidance_scale=settings.cfg_scale,
            **from_text(pipe, settings.width, settings.height),
        )

    return pipe, entries, generate


def _from_files(files: list[str], settings: ImageSettings) -> Entry:
    def attach(pipe: Any) -> list[str]:
        replaced: list[str] = []
        for file in files:
            replaced += load_hyena(pipe, file, settings.target or None)
        if len(set(replaced)) < len(replaced):
            raise UsageError(f"{'+'.join(files)}: a layer is in more than one of the stacked files")
        return replaced

    return hyena_entry("+".join(Path(file).stem for file in files), attach)


def _untrained(pipe: Any, settings: ImageSettings) -> Entry:
    """Untrained layers at ``settings.target``: their time is that of trained ones."""
    targets = select(find_targets(pipe.unet), settings.target or "high")
    torch.manual_seed(0)
    operators = untrained(targets, pipe.unet.config.sample_size, settings)

    def attach(pipe: Any) -> list[str]:
        patch.attach(pipe.unet, operators)
        return list(operators)

    chosen = settings.target or "high"
    return hyena_entry(f"{settings.operator} ({chosen})", attach)
