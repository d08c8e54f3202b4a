"""``sd-hyena generate``."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from ..benchmark.settings import ImageSettings
from ..errors import UsageError
from ..generate.samplers import check_steps, known_schedule, use_scheduler
from ..generate.settings import GRID_NAME, GenerateSettings
from ..generate.stages import stages
from ..models import ModelSource, check_size, locate, size_defaults, unet_skeleton
from ..settings import add_arguments as add_settings
from ..settings import resolve
from ..texts import warn_of_syntax
from .device import choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, GenerateSettings)


def run(args: dict[str, Any]) -> int:
    settings = resolve(GenerateSettings, args, defaults=lambda given: size_defaults(given["model"]))
    settings.validate()
    device = choose_device(settings.device)
    source = locate(settings.model, settings.variant)
    for stage in stages(settings):
        check_size(source.name, stage.width, stage.height)
        option = "--steps" if stage.strength == 1 else "--hires_steps at --hires_strength"
        check_steps(settings.scheduler, stage.schedule, known_schedule(source), option)
    warn_of_syntax("prompt", (settings.prompt, settings.negative_prompt))
    if settings.hires:
        _check_hires(source)
    check_files(settings, source)
    return _draw(settings, source, device)


def _check_hires(source: ModelSource) -> None:
    skeleton: Any = unet_skeleton(source)
    if skeleton is not None and skeleton.config.in_channels != skeleton.config.out_channels:
        raise UsageError(f"--hires: {source.name} is an inpainting model, which has no form that draws over a picture")


def check_files(settings: GenerateSettings | ImageSettings, source: ModelSource) -> None:
    """Reads every Hyena file of the sweep and, where the model's configuration is at hand, checks that all fit. Raises
    CheckpointError or UsageError."""
    from .. import checkpoint
    from ..api import choose_layers
    from ..generate.draw import check_stack

    files = {file: checkpoint.load(file) for entry in settings.entries() for file in entry}
    skeleton = unet_skeleton(source) if files else None
    if skeleton is None:
        return
    for entry in settings.entries():
        check_stack(entry, [list(choose_layers(skeleton, files[f], settings.target or None).values()) for f in entry])


def _draw(settings: GenerateSettings, source: Any, device: str) -> int:
    import torch

    from ..fingerprint import HASH, fingerprint
    from ..generate.draw import contact_sheet, draw_sweep, save_png
    from ..generate.memory import check_offload, place, spare_vae
    from ..models import load_pipeline
    from .display import console, phase

    check_offload(settings.offload, device)
    dtype = settings.dtype if settings.dtype != "auto" else "float32" if device == "cpu" else "float16"
    phase(f"loading {source.name}")
    pipe = load_pipeline(source, "cpu", getattr(torch, dtype), settings)
    use_scheduler(pipe, settings.scheduler, settings.steps)
    model_hash = fingerprint(pipe)[HASH][:10]
    drawn_at = stages(settings)
    place(pipe, device, settings.offload, drawn_at, settings.num_images)
    spare_vae(pipe, device, settings.vae_tiling, drawn_at, settings.num_images)
    seed = settings.seed if settings.seed >= 0 else random.SystemRandom().randrange(2**31)
    rows: list[list[Any]] = [[] for _ in settings.entries()]
    total = len(rows) * settings.num_images * settings.iteration
    for drawn in draw_sweep(pipe, settings, seed, model_hash):
        rows[drawn.entry].append(drawn.image)
        done = sum(map(len, rows))
        console.print(f"{done}/{total} {drawn.path} seed {drawn.seed}, {drawn.seconds:.2f} s", soft_wrap=True)
    if settings.grid:
        labels = [" + ".join(files) or f"{settings.model} (attention)" for files in settings.entries()]
        path = save_png(contact_sheet(rows, labels), Path(settings.out_dir) / GRID_NAME, overwrite=settings.overwrite)
        console.print(str(path), soft_wrap=True)
    return 0
