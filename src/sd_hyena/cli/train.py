"""``sd-hyena train``."""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Any

from ..distill.settings import TrainSettings
from ..errors import SdHyenaError, UsageError
from ..models import check_size, locate, size_defaults, unet_skeleton
from ..settings import add_arguments as add_settings
from ..settings import resolve, to_toml
from ..targets import find_targets, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, TrainSettings)
    parser.add_argument(
        "--config", metavar="RECIPE", help="TOML file with settings by their long names; flags go before it"
    )
    parser.add_argument("--print_config", action="store_true", help="print the settings as a recipe and stop")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out_dir exactly where it stopped"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace Hyena files of an earlier run in --out_dir")


def run(args: dict[str, Any]) -> int:
    resume, overwrite = args.pop("resume"), args.pop("overwrite")
    print_config, recipe = args.pop("print_config"), args.pop("config")
    settings = resolve(TrainSettings, args, recipe, defaults=lambda given: size_defaults(given["teacher_model"]))
    settings.validate()
    if print_config:
        print(to_toml(settings))
        return 0
    source = locate(settings.teacher_model)
    check_size(source.name, settings.width, settings.height)
    skeleton = unet_skeleton(source)
    if skeleton is not None:
        from ..distill.students import configure

        grid = (settings.height // 8, settings.width // 8)
        for target in select(find_targets(skeleton), settings.target):
            configure(target, grid, skeleton, **settings.operator_choices())
    if not resume and not overwrite:
        _refuse_overwriting(settings)
    from ..distill.state import locked

    try:
        os.makedirs(settings.log_dir, exist_ok=True)
    except OSError as error:
        raise SdHyenaError(f"log folder {settings.log_dir}: {error.strerror}") from None
    with locked(Path(settings.out_dir)):
        return _train(settings, source, resume)


def _refuse_overwriting(settings: TrainSettings) -> None:
    """A run writes steps 1 to n_steps; a file of any of them that is already there is somebody's."""
    pattern = settings.name_format
    for existing in sorted(Path(settings.out_dir).glob("*.safetensors")):
        for step in _steps_saved(settings):
            prefix, _, suffix = pattern.format(s=step, t="\0").partition("\0")
            if existing.stem.startswith(prefix) and existing.stem.endswith(suffix):
                raise UsageError(
                    f"{existing} exists: choose another --out_dir or --name_format, or give --resume or --overwrite"
                )


def _steps_saved(settings: TrainSettings) -> set[int]:
    every = settings.save_every_n_steps
    return set(range(every, settings.n_steps, every) if every else ()) | {settings.n_steps}


def _train(settings: TrainSettings, source: Any, resume: bool) -> int:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from ..distill.data import default_prompts, read_prompts
    from ..distill.logbook import Logbook
    from ..distill.trainer import Trainer
    from ..models import fingerprint, load_pipeline
    from .display import console, layer_table, phase, training_progress

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with="tensorboard",
        project_dir=settings.log_dir,
        cpu=choose_device(settings.device) == "cpu",
    )
    if settings.device not in ("auto", "cpu") and ":" in settings.device:
        torch.cuda.set_device(settings.device)
    set_seed(0)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.mixed_precision]
    phase(f"loading {source.name}")
    pipe = load_pipeline(source, str(accelerator.device), dtype)
    accelerator.init_trackers(
        f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(settings.out_dir).name}", config=_plain(settings)
    )
    prompts = read_prompts(settings.prompts) if settings.prompts else default_prompts(source.is_demo)
    logbook = Logbook(
        accelerator, pipe, prompts[:: max(1, len(prompts) // 2)], (settings.height, settings.width), settings.draw_steps
    )
    with training_progress(settings.n_steps, show=accelerator.is_main_process) as advance:

        def on_progress(progress: Any) -> None:
            logbook.scalars(progress)
            advance(progress)

        trainer = Trainer(
            settings,
            pipe,
            fingerprint(pipe),
            accelerator,
            is_demo=source.is_demo,
            on_phase=phase,
            on_progress=on_progress,
            on_save=logbook.pictures,
        )
        result = trainer.run(resume)
    accelerator.end_training()
    if accelerator.is_main_process:
        if result.interrupted:
            console.print(f"stopped at step {result.step}; saved {result.files[-1]}; go on with --resume")
        else:
            layer_table(result)
        console.print(f"seed {result.seed}; files: {', '.join(map(str, result.files))}", soft_wrap=True)
    return 128 + result.interrupted if result.interrupted else 0


def choose_device(name: str) -> str:
    """ "auto" -> "cuda" if there is one, else "cpu". Raises UsageError for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UsageError(f"--device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this machine has no usable CUDA device")
    return name


def _plain(settings: TrainSettings) -> dict[str, Any]:
    return {k: v for k, v in vars(settings).items() if isinstance(v, int | float | str | bool)}
