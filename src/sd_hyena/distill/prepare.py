"""Making prepared data: the teacher draws pictures, or its VAE encodes captioned ones, shard by shard.

A run that was cut off goes on with the first shard that is missing or damaged, and ends with the same bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SdHyenaError, UsageError
from ..families import from_text
from ..fingerprint import HASH, SAMPLE, distance, exact
from ..generate.sampling import why_not_finite
from ..machine import Batches
from .data import Dataset, open_prepared
from .encode import encode, prompt_states
from .plan import SHARD, Item, Plan, plan_drawings
from .prepare_settings import PrepareSettings, parse_sizes
from .prompts import default_prompts, read_prompts
from .settings import TrainSettings
from .shards import (
    MANIFEST,
    SHARDS,
    Manifest,
    damage,
    finished_manifest,
    identity_key,
    read_manifest,
    shard_name,
    write_manifest,
    write_shard,
)
from .state import locked

LOCK = ".prepare-lock"
logger = logging.getLogger(__name__)


def prepare(
    plan: Plan,
    folder: Path,
    pipe: Any,
    batch_size: int = SHARD,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    wait: Callable[[str], None] | None = None,
) -> None:
    """Makes what is missing of ``folder``; ``on_progress`` is told how many pictures are there, of how many.

    Raises UsageError if the folder holds other data (``overwrite`` starts over) or another run is writing it
    (``wait`` says so in a line and waits), SdHyenaError if something cannot be written or read.
    """
    with locked(folder, LOCK, "prepare", wait):
        manifest = _manifest(plan, folder, overwrite)
        done = 0
        batches = Batches(batch_size, "while making pictures", "--width and --height, or --sizes")

        def make(size: tuple[int, int], items: Sequence[Item]) -> Tensor:
            nonlocal done
            latents = _make(pipe, plan, size, items)
            done += len(items)
            on_progress(done, plan.n_items)
            return latents

        for number, (size, items) in enumerate(plan.shards):
            if number < len(manifest.shards):
                wrong = damage(folder, manifest.shards[number])
                if not wrong:
                    done += len(items)
                    continue
                logger.warning("%s: %s: making it anew", folder / shard_name(number), wrong)
            on_progress(done, plan.n_items)
            latents = torch.cat(batches.run(partial(make, size), items)).float().cpu()
            if not latents.isfinite().all():
                raise SdHyenaError(f"{shard_name(number)}: latents are not finite: {why_not_finite(pipe)}")
            prompts = list(dict.fromkeys(["", *(item.prompt for item in items)]))
            rows = torch.tensor([prompts.index(item.prompt) for item in items])
            tensors = {"latents": latents, "prompt": rows} | prompt_states(pipe, prompts)
            held_out = [row for row, item in enumerate(items) if item.held_out]
            manifest.shards[number : number + 1] = [write_shard(folder, number, size, tensors, prompts, held_out)]
            write_manifest(folder, manifest)
        on_progress(plan.n_items, plan.n_items)


def cache_root() -> Path:
    """``$SD_HYENA_CACHE``, else ``sd-hyena`` in the user's cache folder."""
    if os.environ.get("SD_HYENA_CACHE"):
        return Path(os.path.expanduser(os.environ["SD_HYENA_CACHE"]))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-hyena"


def preparation(settings: TrainSettings) -> PrepareSettings:
    """What a training run without ``data_dir`` prepares for itself."""
    sizes = settings.sizes or f"{settings.width}x{settings.height}"
    return PrepareSettings(
        teacher_model=settings.teacher_model,
        prompts=settings.prompts,
        sizes=sizes,
        # Layers taught on noise need pictures too, but only to be measured on.
        n_images=settings.n_images if settings.learns_from_pictures else len(parse_sizes(sizes)),
        n_held_out=settings.n_held_out,
        draw_steps=settings.draw_steps,
        batch_size=min(settings.batch_size, SHARD),
        mixed_precision=settings.mixed_precision,
    )


def training_data(
    settings: TrainSettings,
    pipe: Any,
    teacher: dict[str, Any],
    is_demo: bool,
    on_phase: Callable[[str], None] = logger.info,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """The prepared folder that the settings name, or one prepared in the cache, opened.

    Raises UsageError for a folder made by another teacher, and what ``prepare`` and ``open_prepared`` raise.
    """
    if settings.data_dir:
        folder = Path(settings.data_dir)
        check_teacher(finished_manifest(folder), folder, teacher, str(pipe.unet.dtype))
        return open_prepared(folder)
    choices = preparation(settings)
    prompts = read_prompts(settings.prompts) if settings.prompts else default_prompts(is_demo)
    plan = plan_drawings(choices, pipe, teacher, prompts)
    folder = cache_root() / "prepared" / identity_key(plan.identity)
    on_phase(f"the teacher draws {plan.n_items} pictures ({plan.draw_steps} steps each; kept for later runs)")
    prepare(plan, folder, pipe, choices.batch_size, on_progress=on_progress, wait=on_phase)
    return open_prepared(folder, check=False)  # prepare has just checked it


def check_teacher(manifest: Manifest, folder: Path, teacher: dict[str, Any], dtype: str) -> None:
    """Raises UsageError if a prepared folder is another teacher's."""
    made_by, made_in, ours = manifest.identity["teacher"], manifest.identity["dtype"], exact(teacher)
    if made_by == ours:
        return
    if made_in != dtype and {**made_by, HASH: ""} == {**ours, HASH: ""}:  # rounded weights have another hash
        if not manifest.teacher_sample:
            logger.warning(
                "data folder %s was made in %s, this teacher is %s: only class and widths are compared",
                folder,
                made_in.removeprefix("torch."),
                dtype.removeprefix("torch."),
            )
            return
        if not distance(manifest.teacher_sample, teacher[SAMPLE]):
            return
    theirs, own = (", ".join(t.get(k, "?") for k in ours) for t in (made_by, ours))
    raise UsageError(f"data folder {folder} was made by another teacher ({theirs}), not by this one ({own})")


def _manifest(plan: Plan, folder: Path, overwrite: bool) -> Manifest:
    """The folder's manifest if it fits the plan, else a new one; stray temporary files go."""
    found = read_manifest(folder)
    try:
        (folder / SHARDS).mkdir(exist_ok=True)
        for stray in (folder / SHARDS).glob(".*.tmp"):
            stray.unlink(missing_ok=True)
        if found is not None and overwrite:
            (folder / MANIFEST).unlink()
            for number in range(found.n_shards):
                (folder / shard_name(number)).unlink(missing_ok=True)
            found = None
    except OSError as error:
        raise SdHyenaError(f"data folder {folder}: {error.strerror}") from None
    if found is None:
        found = Manifest(plan.identity, len(plan.shards), teacher_sample=plan.teacher_sample)
        write_manifest(folder, found)
        return found
    differences = [
        _difference(name, found.identity.get(name), plan.identity.get(name))
        for name in dict.fromkeys([*plan.identity, *found.identity])
        if found.identity.get(name) != plan.identity.get(name)
    ]
    if differences:
        raise UsageError(
            f"data folder {folder} holds other data: {', '.join(differences)}; choose another, or "
            "--overwrite starts over"
        )
    return found


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "sizes":
        before, now = (",".join(f"{w}x{h}" for w, h in sizes) for sizes in (before or [], now))
    if isinstance(before, dict) or isinstance(now, dict):
        return f"another {name}"
    if name == "weights" or name.endswith("_sha256"):
        return f"other {name.removesuffix('_sha256')}"
    return f"{name} was {before}, is {now}"


def _make(pipe: Any, plan: Plan, size: tuple[int, int], items: Sequence[Item]) -> Tensor:
    """Latents (B, C, h, w) of one batch."""
    if items[0].image is not None:
        return encode(pipe, [item.image.path for item in items if item.image], size)
    result = pipe(
        [item.prompt for item in items],
        width=size[0],
        height=size[1],
        num_inference_steps=plan.draw_steps,
        guidance_scale=plan.guidance,
        generator=[torch.Generator().manual_seed(item.seed) for item in items],
        output_type="latent",
        **from_text(pipe, *size),
    )
    return result.images
