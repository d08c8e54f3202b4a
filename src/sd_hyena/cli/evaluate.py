"""``sd-hyena evaluate``."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SdHyenaError, UsageError
from ..files import atomic_path
from ..generate.settings import GenerateSettings
from ..models import check_size, locate, size_defaults
from ..settings import add_arguments as add_settings
from ..settings import option, resolve
from .generate import check_files
from .train import choose_device


@dataclass
class EvaluateSettings:
    """Settings of ``sd-hyena evaluate``; those it shares with ``generate`` mean the same."""

    model: str = option(help="demo, a diffusers folder, a single file, a hub id", short="-m")
    hyena: str = option(help="Hyena file; a+b stacks files", short="-y")
    target: str = option("", "which layers to replace; unless given, all that the file holds", short="-t")
    prompts: str = option("", "file with one prompt a line; unless given, the bundled model's held-out prompts")
    num_prompts: int = option(16, "how many prompts to draw", short="-n")
    width: int = option(512, "image width in px; demo: 256 unless given", short="-W")
    height: int = option(512, "image height in px; demo: 256 unless given", short="-H")
    steps: int = option(25, "diffusion steps", short="-s")
    cfg_scale: float = option(5.0, "classifier-free guidance scale", short="-c")
    seed: int = option(1000, "of the first prompt; the next ones count up", short="-k")
    scaling: str = option("file", "how filters grow to larger images", choices=("file", "extend", "stretch"))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    out_dir: str = option("", "folder for evaluation.json and evaluation.png; unless given, only print", short="-o")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, EvaluateSettings)


def run(args: dict[str, Any]) -> int:
    settings = resolve(EvaluateSettings, args, defaults=lambda given: size_defaults(given["model"]))
    if settings.num_prompts < 1:
        raise UsageError(f"--num_prompts is {settings.num_prompts}, but must be at least 1")
    drawing = GenerateSettings(
        model=settings.model,
        prompt="-",
        hyena=settings.hyena,
        target=settings.target,
        width=settings.width,
        height=settings.height,
        steps=settings.steps,
        cfg_scale=settings.cfg_scale,
        seed=settings.seed,
        scaling=settings.scaling,
        overwrite=True,
    )
    drawing.validate()
    if len(drawing.entries()) != 1 or not drawing.entries()[0]:
        raise UsageError("--hyena must name one file, or files stacked with +")
    source = locate(settings.model)
    check_size(source.name, settings.width, settings.height)
    prompts = _prompts(settings, source.is_demo)
    check_files(drawing, source)
    return _evaluate(settings, drawing, source, prompts)


def _prompts(settings: EvaluateSettings, is_demo: bool) -> list[str]:
    if settings.prompts:
        from ..distill.prompts import read_prompts

        lines = read_prompts(settings.prompts)
        return [lines[i % len(lines)] for i in range(settings.num_prompts)]
    if not is_demo:
        raise UsageError("--prompts is required: a file with one prompt a line, none of which was trained on")
    from ..demo.scenes import held_out_scenes

    return [scene.caption for scene in held_out_scenes(settings.num_prompts)]


def _evaluate(settings: EvaluateSettings, drawing: GenerateSettings, source: Any, prompts: list[str]) -> int:
    from ..evaluate import add_fidelity, compare
    from ..generate.draw import attach_entry, contact_sheet, save_png, use_scheduler
    from ..models import load_pipeline
    from .display import comparison_table, phase

    phase(f"loading {source.name}")
    pipe = load_pipeline(source, choose_device(settings.device))
    use_scheduler(pipe, drawing.scheduler)
    layers = attach_entry(pipe, drawing.entries()[0], drawing)
    phase(f"drawing {len(prompts)} prompts twice; replaced: {', '.join(layers)}")
    seeds = [settings.seed + i for i in range(len(prompts))]
    result = compare(pipe, prompts, seeds, **drawing.sampling_options())
    if source.is_demo and not settings.prompts:
        add_fidelity(result)
    comparison_table(result)
    if settings.out_dir:
        folder = Path(settings.out_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(folder / "evaluation.json") as temporary:
                temporary.write_text(json.dumps({"settings": vars(settings)} | result.figures(), indent=2))
        except OSError as error:
            raise SdHyenaError(f"output folder {folder}: {error.strerror}") from None
        save_png(contact_sheet([result.teacher, result.student], ["teacher", "student"]), folder / "evaluation.png")
        phase(f"written to {folder}")
    return 0
