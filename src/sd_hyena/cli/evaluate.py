"""``sd-hyena evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluate.settings import EvaluateSettings, labels
from ..files import Claim
from ..models import ModelSource, check_size, locate, size_defaults
from ..settings import add_arguments as add_settings
from ..settings import resolve
from .device import choose_device
from .generate import check_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, EvaluateSettings)


def run(args: dict[str, Any]) -> int:
    settings = resolve(EvaluateSettings, args, defaults=lambda given: size_defaults(given.get("model", "")))
    settings.validate()
    device = choose_device(settings.device)
    claim = Claim(settings.outputs())
    source = locate(settings.model, settings.variant)
    check_size(source.name, settings.width, settings.height)
    prompts = settings.read_prompts()
    check_files(settings.drawing(), source)
    return _evaluate(settings, source, prompts, device, claim)


def _evaluate(settings: EvaluateSettings, source: ModelSource, prompts: list[str], device: str, claim: Claim) -> int:
    from ..evaluate.report import write_report
    from ..evaluate.run import evaluate
    from ..evaluate.scores import make_scores
    from ..evaluate.tables import all_tables
    from ..generate.samplers import with_usable_scheduler
    from ..models import load_pipeline
    from .display import console, counting_progress, phase, print_tables

    scores = make_scores(settings, prompts, device)
    phase(f"loading {source.name}")
    pipe = with_usable_scheduler(load_pipeline(source, device, choices=settings))
    entries = settings.entries()
    students = dict(zip(labels(entries), entries, strict=True))
    with counting_progress() as progress:
        result = evaluate(pipe, students, settings, prompts, scores, phase, progress)
    print_tables(all_tables(result))
    if settings.out_dir:
        for path in write_report(Path(settings.out_dir), result, claim=claim):
            console.print(str(path), soft_wrap=True)
    return 0
