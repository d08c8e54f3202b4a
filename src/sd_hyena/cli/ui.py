"""``sd-hyena ui``."""

from __future__ import annotations

import argparse
import threading
from typing import Any

from ..interrupts import Interrupted
from ..models import locate
from ..settings import add_arguments as add_settings
from ..settings import resolve
from ..ui.settings import UiSettings
from .device import choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, UiSettings)


def run(args: dict[str, Any]) -> int:
    settings = resolve(UiSettings, args)
    settings.validate()
    source = locate(settings.model, settings.variant)
    return _serve(settings, source, choose_device(settings.device))


def _serve(settings: UiSettings, source: Any, device: str) -> int:
    import torch

    from ..compare import Studio
    from ..generate.memory import place
    from ..generate.settings import GenerateSettings
    from ..generate.stages import stages
    from ..machine import settle
    from ..models import load_pipeline, size_defaults
    from .display import console, phase

    dtype = settings.dtype if settings.dtype != "auto" else "float32" if device == "cpu" else "float16"
    phase(f"loading {source.name}")
    settle(device)
    pipe = load_pipeline(source, "cpu", getattr(torch, dtype), settings)
    size: dict[str, Any] = size_defaults(settings.model)
    usual = GenerateSettings(model=settings.model, prompt="", **size)
    place(pipe, device, "auto", stages(usual), 1)
    phase("opening the page")
    from ..ui.serve import serving

    try:
        with serving(Studio(pipe, settings.model, device), settings) as address:
            console.print(f"{address} (Ctrl-C ends it)", soft_wrap=True)
            threading.Event().wait()
    except Interrupted as wish:
        wish.kept = "the page is closed"
        raise
    return 0
