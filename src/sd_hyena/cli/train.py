"""``sd-hyena train``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
import warnings
from pathlib import Path
from typing import Any

from ..distill.settings import TrainSettings, chosen_sizes
from ..errors import UsageError
from ..files import cannot_write, locked
from ..interrupts import Interrupted
from ..models import ModelSource, check_size, locate, size_defaults, unet_skeleton
from ..recipes import RECIPES, recipe_path
from ..settings import add_arguments as add_settings
from ..settings import resolve, to_toml
from ..targets import find_targets, select
from ..texts import printable
from .device import choose_device, choose_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, TrainSettings)
    parser.add_argument(
        "--config", metavar="RECIPE", help="TOML file of settings by their long names; options given here win"
    )
    parser.add_argument("--recipe", choices=RECIPES, help="a recipe that comes with sd-hyena, instead of --config")
    parser.add_argument("--print_config", action="store_true", help="print the settings as a recipe and stop")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out_dir exactly where it stopped"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace Hyena files of an earlier run in --out_dir")


def run(args: dict[str, Any]) -> int:
    resume, overwrite = args.pop("resume"), args.pop("overwrite")
    print_config = args.pop("print_config")
    recipe = _recipe(args.pop("recipe"), args.pop("config"))
    settings = resolve(TrainSettings, args, recipe, defaults=_defaults)
    settings.validate()
    if print_config:
        print(printable(to_toml(settings), lines=True))
        return 0
    device = choose_device(settings.device)
    if settings.mixed_precision == "fp16" and device == "cpu":
        raise UsageError("--mixed_precision fp16 trains on a GPU alone: on a CPU take bf16 or no")
    source = locate(settings.teacher_model, settings.variant, whole=settings.needs_pictures)
    _check_sizes(settings, source)
    _check_targets(settings, source)
    if not overwrite:
        _refuse_overwriting(settings, resume)

    accelerator, folder = _accelerator(settings, device), Path(settings.out_dir)

    def hold() -> contextlib.AbstractContextManager[None]:
        # The other processes of a distributed run write nothing: the main one holds the folder for all.
        return locked(folder) if accelerator.is_main_process else contextlib.nullcontext()

    with contextlib.ExitStack() as held:
        there = folder.exists()
        if there:
            held.enter_context(hold())
        teacher = _teacher(settings, source, str(accelerator.device), _say(accelerator))
        if not there:  # a model that cannot be had leaves no folder behind
            held.enter_context(hold())
        return _train(settings, source, teacher, accelerator, resume)


def _recipe(name: str | None, path: str | None) -> str | Path | None:
    if name and path is not None:
        raise UsageError("--recipe and --config both give a recipe: choose one")
    return recipe_path(name) if name else path


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    """A run that names no width and height takes the first of its sizes, or the model's own."""
    sizes = chosen_sizes(given.get("data_dir", ""), given.get("sizes", ""))
    own = size_defaults(given.get("teacher_model", ""))
    return dict(zip(("width", "height"), sizes[0], strict=True)) if sizes else own


def _check_sizes(settings: TrainSettings, source: ModelSource) -> None:
    check_size(source.name, settings.width, settings.height)
    for width, height in settings.training_sizes():
        check_size(source.name, width, height)
        if settings.operator == "causal" and width * height > settings.width * settings.height:
            raise UsageError(
                f"--operator causal takes no more than it is built for, {settings.width}x{settings.height} px, "
                f"and the data have {width}x{height}: raise --width and --height"
            )


def _check_targets(settings: TrainSettings, source: ModelSource) -> None:
    """Whether the layers exist and their operators can be built, wherever that can be told without weights."""
    from .. import checkpoint

    start = checkpoint.load(settings.pretrained_weight) if settings.pretrained_weight else None
    skeleton = unet_skeleton(source)
    if skeleton is None:
        return

    from ..distill.students import configure
    from ..layer_choice import choose_layers

    there = find_targets(skeleton)
    targets = select(there, settings.target)
    if start is not None:
        choose_layers(there, start, settings.target)
        return
    grid = (settings.height // 8, settings.width // 8)
    for target in targets:
        configure(target, grid, skeleton, **settings.choices())


def _refuse_overwriting(settings: TrainSettings, resume: bool) -> None:
    """A run writes its saved steps; a file of any of them that is already there is somebody's."""
    from ..distill.state import STATE

    folder, pattern = Path(settings.out_dir), settings.name_format
    if (folder / STATE).exists():
        if resume:
            return
        raise UsageError(f"{folder} holds a training run: --resume goes on with it, --overwrite starts over")
    for existing in sorted(folder.glob("*.safetensors")):
        for step in settings.saved_steps():
            prefix, _, suffix = pattern.format(s=step, t="\0").partition("\0")
            if existing.stem.startswith(prefix) and existing.stem.endswith(suffix):
                raise UsageError(f"{existing} exists: choose another --out_dir or --name_format, or give --overwrite")


def _accelerator(settings: TrainSettings, device: str) -> Any:
    import torch
    from accelerate import Accelerator

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of several processes
    if ":" in device:
        torch.cuda.set_device(device)
    return Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with="tensorboard",
        project_dir=settings.log_dir,
        cpu=device == "cpu",
    )


def _say(accelerator: Any) -> Any:
    """What says in which phase a run is: in the main process alone."""
    from .display import phase

    return phase if accelerator.is_main_process else logging.getLogger(__name__).debug


def _train(
    settings: TrainSettings,
    source: ModelSource,
    loaded: tuple[Any, dict[str, Any], bool],
    accelerator: Any,
    resume: bool,
) -> int:
    from ..distill.logbook import Logbook
    from ..distill.trainer import Trainer
    from .display import console, layer_table, preparing_progress, training_progress

    main = accelerator.is_main_process
    teacher, record, whole = loaded
    run_name = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(settings.out_dir).name}"
    try:
        accelerator.init_trackers(run_name, config=vars(settings))
    except OSError as error:
        raise cannot_write(error.filename or Path(settings.log_dir) / run_name, error) from None
    prompts = _prompts(settings, source)
    shown = prompts[:: max(1, len(prompts) // 2)]
    logbook = Logbook(
        accelerator, teacher if whole else None, shown, (settings.height, settings.width), settings.draw_steps
    )
    with preparing_progress(main) as on_prepare, training_progress(settings.total_steps, main) as advance:

        def on_progress(progress: Any) -> None:
            logbook.scalars(progress)
            advance(progress)

        trainer = Trainer(
            settings,
            teacher,
            record,
            accelerator,
            is_demo=source.is_demo,
            on_phase=_say(accelerator),
            on_progress=on_progress,
            on_save=logbook.pictures,
            on_prepare=on_prepare,
        )
        try:
            result = trainer.run(resume)
        except Interrupted as wish:
            if trainer.files:
                wish.kept = f"{trainer.files[-1]} is saved; --resume goes on from there"
            raise
    logbook.figures(result)
    logbook.close()
    if main:
        if result.interrupted:
            saved = f"saved {result.files[-1]}" if result.files else "nothing new to save"
            console.print(f"stopped at step {result.step}; {saved}; go on with --resume", soft_wrap=True)
        else:
            layer_table(result)
        console.print(f"seed {result.seed}; files: {', '.join(map(str, result.files)) or 'none'}", soft_wrap=True)
    return 128 + result.interrupted if result.interrupted else 0


def _teacher(settings: TrainSettings, source: ModelSource, device: str, say: Any) -> tuple[Any, dict[str, Any], bool]:
    """The teacher, its record, and whether all of it was read: a run that needs no pictures needs its layers alone."""
    from ..fingerprint import fingerprint
    from ..generate.samplers import with_usable_scheduler
    from ..models import load_pipeline
    from ..models.layers import read_layers

    dtype = choose_dtype(settings.mixed_precision)
    if not settings.needs_pictures:
        part = read_layers(source, settings.target, device, dtype)
        if part is not None:
            say(f"read {settings.target} of {source.name}, and no more: figures are on noise, the log has no pictures")
            return part, part.record, False
    say(f"loading {source.name}")
    pipe = with_usable_scheduler(load_pipeline(source, device, dtype, settings))
    return pipe, fingerprint(pipe), True


def _prompts(settings: TrainSettings, source: ModelSource) -> list[str]:
    """Prompts of the pictures in the log: the bundled model's held-out ones, else some that are learned from."""
    from ..distill.prompts import default_prompts, read_prompts
    from ..distill.shards import finished_manifest, read_shard

    if source.is_demo and not settings.prompts and not settings.data_dir:
        from ..demo.scenes import held_out_scenes

        return [scene.caption for scene in held_out_scenes(2)]
    if settings.data_dir:
        folder = Path(settings.data_dir)
        _, prompts = read_shard(folder, finished_manifest(folder).shards[0])
        return prompts[1:] or prompts  # the first is the empty one
    return read_prompts(settings.prompts) if settings.prompts else default_prompts(source.is_demo)
