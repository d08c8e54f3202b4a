"""``sd-hyena prepare``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..distill.prepare_settings import PrepareSettings, check_images, parse_sizes
from ..distill.prompts import default_prompts, list_images, read_prompts
from ..interrupts import Interrupted
from ..models import check_size, locate, size_defaults
from ..processes import here
from ..settings import add_arguments as add_settings
from ..settings import resolve
from .device import choose_device, choose_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, PrepareSettings)
    parser.add_argument("--overwrite", action="store_true", help="start over where --out_dir holds other data")


def run(args: dict[str, Any]) -> int:
    overwrite = args.pop("overwrite")
    settings = resolve(PrepareSettings, args, defaults=_defaults)
    settings.validate()
    device = choose_device(settings.device)
    source = locate(settings.teacher_model, settings.variant)
    for width, height in parse_sizes(settings.sizes):
        check_size(source.name, width, height)
    folder = Path(settings.out_dir)
    images = list_images(Path(settings.images)) if settings.images else []
    if settings.images:
        check_images(settings, images)

    from ..distill.plan import plan_drawings, plan_images
    from ..distill.prepare import prepare
    from ..distill.shards import read_manifest
    from ..fingerprint import fingerprint
    from ..generate.samplers import with_usable_scheduler
    from ..models import load_pipeline
    from .display import console, phase, preparing_progress

    read_manifest(folder)  # a folder that cannot be used is told before the model is loaded
    phase(f"loading {source.name}")
    dtype = choose_dtype(settings.mixed_precision)
    pipe = with_usable_scheduler(load_pipeline(source, device, dtype, settings))
    teacher = fingerprint(pipe)
    if images:
        plan = plan_images(settings, pipe, teacher, images)
    else:
        prompts = read_prompts(settings.prompts) if settings.prompts else default_prompts(source.is_demo)
        plan = plan_drawings(settings, pipe, teacher, prompts)
    try:
        with preparing_progress() as advance:
            prepare(plan, folder, pipe, settings.batch_size, overwrite, advance, place=here())
    except Interrupted as wish:
        wish.kept = f"finished shards are kept in {folder}: the same command goes on"
        raise
    command = f"sd-hyena train --data_dir {shlex.quote(str(folder))}"
    console.print(f"{plan.n_items} pictures in {folder}: {command}", soft_wrap=True)
    return 0


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    size = size_defaults(given.get("teacher_model", ""))
    return {"sizes": f"{size['width']}x{size['height']}"} if size else {}
