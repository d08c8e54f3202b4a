"""``sd-hyena generate``."""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path
from typing import Any

from ..benchmark.settings import ImageSettings
from ..demo.scenes import held_out_scenes
from ..errors import UsageError
from ..files import Claim
from ..generate.samplers import check_steps, known_schedule, use_scheduler
from ..generate.settings import GRID_NAME, GenerateSettings
from ..generate.stages import stages
from ..interrupts import Interrupted
from ..models import DEMO, ModelSource, check_size, locate, size_defaults, unet_skeleton
from ..processes import Group, here
from ..settings import add_arguments as add_settings
from ..settings import resolve
from ..texts import warn_of_syntax
from .device import choose_device

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, GenerateSettings)


def run(args: dict[str, Any]) -> int:
    settings = resolve(GenerateSettings, args, defaults=lambda given: _defaults(given.get("model", "")))
    settings.validate()
    device = choose_device(settings.device)
    claim = Claim(settings.outputs())
    source = locate(settings.model, settings.variant)
    for stage in stages(settings):
        check_size(source.name, stage.width, stage.height)
        option = "--steps" if stage.strength == 1 else "--hires_steps at --hires_strength"
        check_steps(settings.scheduler, stage.schedule, known_schedule(source), option)
    warn_of_syntax("prompt", (settings.prompt, settings.negative_prompt))
    if settings.hires:
        _check_hires(source)
    check_files(settings, source)
    return _draw(settings, source, device, claim)


def _defaults(model: str) -> dict[str, Any]:
    """What only the bundled model has: a size, and something that it can draw."""
    return size_defaults(model) | ({"prompt": held_out_scenes(1)[0].caption} if model == DEMO else {})


def _check_hires(source: ModelSource) -> None:
    skeleton: Any = unet_skeleton(source)
    if skeleton is not None and skeleton.config.in_channels != skeleton.config.out_channels:
        raise UsageError(f"--hires: {source.name} is an inpainting model, which has no form that draws over a picture")


def check_files(settings: GenerateSettings | ImageSettings, source: ModelSource) -> None:
    """Reads every Hyena file of the sweep and, where the model's configuration is at hand, checks that all fit. Raises
    CheckpointError or UsageError."""
    from .. import checkpoint
    from ..generate.draw import check_stack
    from ..layer_choice import choose_layers
    from ..targets import find_targets

    files = {file: checkpoint.load(file) for entry in settings.entries() for file in entry}
    skeleton = unet_skeleton(source) if files else None
    if skeleton is None:
        return
    there = find_targets(skeleton)
    for entry in settings.entries():
        check_stack(entry, [list(choose_layers(there, files[f], settings.target or None).values()) for f in entry])


def _draw(settings: GenerateSettings, source: Any, device: str, claim: Claim) -> int:
    import torch

    from ..fingerprint import HASH, fingerprint
    from ..generate.draw import contact_sheet, draw_sweep, read_png, to_png
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
    group = Group(here())
    seed = group.agree(lambda: settings.seed if settings.seed >= 0 else random.SystemRandom().randrange(2**31))
    entries, count = settings.entries(), group.place.count
    if len(entries) * settings.iteration < count:
        logger.warning("%d processes have fewer iterations than that to share: give more (-i) of fewer pictures", count)
    rows: list[dict[int, str]] = [{} for _ in entries]  # paths by seed: other processes' pictures come between
    total = len(rows) * settings.num_images * settings.iteration
    own = draw_sweep(pipe, settings, seed, model_hash, claim, group.place)
    done = 0
    try:
        for entry, path, number, seconds in group.gather((d.entry, str(d.path), d.seed, d.seconds) for d in own):
            rows[entry][number] = path
            done += 1
            console.print(f"{done}/{total} {path} seed {number}, {seconds:.2f} s", soft_wrap=True)
    except Interrupted as wish:
        wish.kept = f"{done} of {total} pictures are kept in {settings.out_dir}"
        raise
    if settings.grid and group.place.is_main:
        labels = [" + ".join(files) or f"{settings.model} (attention)" for files in entries]
        sheet = contact_sheet([[read_png(row[number]) for number in sorted(row)] for row in rows], labels)
        written = claim.write(Path(settings.out_dir) / GRID_NAME, to_png(sheet))
        console.print(str(written), soft_wrap=True)
    return 0
