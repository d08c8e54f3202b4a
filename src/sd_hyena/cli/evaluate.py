"""``sd-hyena evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluate.settings import EvaluateSettings, labels
from ..models import ModelSource, check_size, locate, size_defaults
from ..settings import add_arguments as add_settings
from ..settings import resolve
from .generate import check_files
from .train import choose_device, choose_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, EvaluateSettings)


def run(args: dict[str, Any]) -> int:
    settings = resolve(EvaluateSettings, args, defaults=lambda given: size_defaults(given["model"]))
    settings.validate()
    source = locate(settings.model)
    check_size(source.name, settings.width, settings.height)
    prompts = settings.read_prompts()
    check_files(settings.drawing(), source)
    device = choose_device(settings.device)
    baseline = _plan_baseline(settings, device)
    return _evaluate(settings, source, prompts, device, baseline)


def _plan_baseline(settings: EvaluateSettings, device: str) -> Any:
    if settings.baseline == "none":
        return None
    from ..evaluate.baseline import Baseline

    folder = Path(settings.out_dir) / f"baseline-{settings.baseline}"
    plan = Baseline(settings.entries()[0][0], settings.baseline, folder, device)
    plan.finished()  # what is in the folder is checked before anything is loaded
    return plan


def _evaluate(settings: EvaluateSettings, source: ModelSource, prompts: list[str], device: str, baseline: Any) -> int:
    from ..evaluate.report import write_report
    from ..evaluate.run import evaluate
    from ..evaluate.scores import make_scores
    from ..evaluate.tables import all_tables, ratio_line
    from ..models import load_pipeline
    from .display import console, counting_progress, phase, preparing_progress, print_tables, training_progress

    scores = make_scores(settings, prompts, device)
    phase(f"loading {source.name}")
    pipe = load_pipeline(source, device)
    if baseline is not None:
        dtype = choose_dtype(baseline.settings.mixed_precision)
        teacher = pipe if dtype == pipe.unet.dtype else load_pipeline(source, device, dtype)
        with preparing_progress() as on_prepare, training_progress(baseline.settings.total_steps) as advance:
            baseline.train(teacher, phase, advance, on_prepare)
        del teacher
    entries = settings.entries()
    students = dict(zip(labels(entries), entries, strict=True))
    with counting_progress() as progress:
        result = evaluate(pipe, students, settings, prompts, baseline, scores, phase, progress)
    print_tables(all_tables(result), ratio_line(result))
    if settings.out_dir:
        for path in write_report(Path(settings.out_dir), result):
            console.print(str(path), soft_wrap=True)
    return 0
