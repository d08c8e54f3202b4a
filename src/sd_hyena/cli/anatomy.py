"""``sd-hyena anatomy``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..anatomy.settings import AnatomySettings
from ..files import Claim
from ..models import check_size, locate, size_defaults, unet_skeleton
from ..settings import add_arguments as add_settings
from ..settings import resolve
from ..targets import find_targets, select
from .device import choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, AnatomySettings)


def run(args: dict[str, Any]) -> int:
    settings = resolve(AnatomySettings, args, defaults=lambda given: size_defaults(given.get("model", "")))
    settings.validate()
    device = choose_device(settings.device)
    claim = Claim(settings.outputs())
    settings.read_prompts()
    check_size(settings.name, settings.width, settings.height)
    source = locate(settings.model, settings.variant) if settings.model else None
    skeleton = unet_skeleton(source) if source else None
    if skeleton is not None:
        select(find_targets(skeleton), settings.target)

    from ..anatomy.report import tables, write
    from ..anatomy.run import examine
    from ..generate.samplers import with_usable_scheduler
    from ..models import load_pipeline, random_pipeline
    from .display import console, counting_progress, phase, print_tables

    phase(f"loading {settings.name}")
    if source:
        pipe, texts = with_usable_scheduler(load_pipeline(source, device, choices=settings)), None
    else:
        pipe, texts = random_pipeline(settings.random_weights, device)
    with counting_progress() as progress:
        result = examine(pipe, settings, texts, phase, progress)
    print_tables(tables(result)[::-1])  # the layers last, where they are seen
    if settings.out:
        for path in write(Path(settings.out), result, claim):
            console.print(str(path), soft_wrap=True)
    return 0
