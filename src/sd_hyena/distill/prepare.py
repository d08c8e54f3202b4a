"""Making prepared data: the teacher draws pictures, or its VAE encodes captioned ones, shard by shard.

A run that was cut off goes on with the first shard that is missing or damaged, and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import interrupts
from ..errors import SdHyenaError, UsageError
from ..families import from_text
from ..files import locked, make_folder
from ..fingerprint import HASH, SAMPLE, distance, exact
from ..finite import is_finite, why_not_finite
from ..machine import Batches
from ..processes import ALONE, Group, Place
from .data import Dataset, check_fits, open_prepared
from .encode import encode, prompt_states
from .manifest import SHARDS, Manifest, Shard, identity_key, shard_name
from .plan import SHARD, Item, Plan, plan_drawings
from .prepare_settings import PrepareSettings, parse_sizes
from .prompts import default_prompts, read_prompts
from .settings import TrainSettings
from .shards import MANIFEST, damage, finished_manifest, read_manifest, write_manifest, write_shard

logger = logging.getLogger(__name__)


def prepare(
    plan: Plan,
    folder: Path,
    pipe: Any,
    batch_size: int = SHARD,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    wait: Callable[[str], None] | None = None,
    place: Place = ALONE,
) -> None:
    """Makes what is missing of ``folder``; ``on_progress`` is told how many pictures are there, of how many.

    Several processes, each at its own ``place``, take turns at the shards; the main one holds the folder and writes the
    manifest. Raises UsageError if the folder holds other data (``overwrite`` starts over) or another run is writing
    it (``wait`` says so in a line and waits), SdHyenaError if something cannot be written or read.
    """
    group = Group(place)
    with locked(folder, wait) if place.is_main else contextlib.nullcontext():
        manifest = _manifest(plan, folder, overwrite) if place.is_main else Manifest({}, 0)
        known = group.agree(lambda: [asdict(shard) for shard in manifest.shards])
        done, new = 0, {}
        batches = Batches(batch_size, "while making pictures", "--width and --height, or --sizes")

        def report(further: int) -> None:
            on_progress(done + further, plan.n_items)

        def own() -> Iterator[tuple[int, dict[str, Any]]]:
            """This process's shards, by number, as they are there."""
            for number in filter(place.has, range(len(plan.shards))):
                if number < len(known):
                    wrong = damage(folder, _entry(known[number]))
                    if not wrong:
                        yield number, known[number]
                        continue
                    logger.warning("%s: %s: making it anew", folder / shard_name(number), wrong)
                report(0)
                with interrupts.unit("set of pictures"):  # until the manifest has it
                    yield number, asdict(_make_shard(pipe, plan, folder, number, batches, report))

        for number, entry in group.gather(own()):
            done += len(plan.shards[number][1])
            report(0)
            new[number] = _entry(entry)
            wrong = "" if place.has(number) else damage(folder, new[number])
            if wrong:
                raise SdHyenaError(f"{folder}: what another process made is not there: all must have the same folder")
            if new[number] in manifest.shards:
                continue
            if number < len(manifest.shards):
                manifest.shards[number] = new[number]
            while len(manifest.shards) in new:
                manifest.shards.append(new[len(manifest.shards)])
            write_manifest(folder, manifest)
        group.agree(lambda: None, last=True)  # the manifest is whole


def _entry(fields: dict[str, Any]) -> Shard:
    return Shard(**fields | {"size": tuple(fields["size"])})


def _make_shard(
    pipe: Any, plan: Plan, folder: Path, number: int, batches: Batches, on_done: Callable[[int], None]
) -> Shard:
    """Draws or encodes a shard's pictures and writes it; ``on_done`` is told how many of them are made."""
    (size, items), made = plan.shards[number], 0

    def make(part: Sequence[Item]) -> Tensor:
        nonlocal made
        latents = _make(pipe, plan, size, part)
        made += len(part)
        on_done(made)
        return latents

    latents = torch.cat(batches.run(make, items)).float().cpu()
    if not is_finite(latents):
        raise SdHyenaError(f"{shard_name(number)}: latents are not finite: {why_not_finite(pipe)}")
    prompts = list(dict.fromkeys(["", *(item.prompt for item in items)]))
    rows = torch.tensor([prompts.index(item.prompt) for item in items])
    tensors = {"latents": latents, "prompt": rows} | prompt_states(pipe, prompts)
    held_out = [row for row, item in enumerate(items) if item.held_out]
    return write_shard(folder, number, size, tensors, prompts, held_out)


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
    place: Place = ALONE,
) -> Dataset:
    """The prepared folder that the settings name, or one prepared in the cache, opened.

    Raises UsageError for a folder made by another teacher, and what ``prepare`` and ``open_prepared`` raise.
    """
    if settings.data_dir:
        folder = Path(settings.data_dir)
        check_teacher(finished_manifest(folder), folder, teacher, str(pipe.unet.dtype))
        data = open_prepared(folder)
        check_fits(data, pipe, folder)
        return data
    choices = preparation(settings)
    prompts = read_prompts(settings.prompts) if settings.prompts else default_prompts(is_demo)
    plan = plan_drawings(choices, pipe, teacher, prompts)
    folder = cache_root() / "prepared" / identity_key(plan.identity)
    on_phase(f"the teacher draws {plan.n_items} pictures ({plan.draw_steps} steps each; kept for later runs)")
    prepare(plan, folder, pipe, choices.batch_size, on_progress=on_progress, wait=on_phase, place=place)
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
    make_folder(folder / SHARDS)
    if found is None and not overwrite:
        check_foreign(folder, len(plan.shards))
    try:
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


def check_foreign(folder: Path, n_shards: int) -> None:
    """Raises UsageError if a folder without a manifest has files of the names that shards get."""
    there = next((path for path in (folder / shard_name(n) for n in range(n_shards)) if path.exists()), None)
    if there is not None:
        raise UsageError(f"{there} exists, and no {MANIFEST} says what it is: choose another folder, or --overwrite")


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
