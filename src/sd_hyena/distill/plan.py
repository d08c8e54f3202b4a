"""Which pictures a prepared folder is to hold, in which shards, and what determines them.

A drawn picture follows from its prompt, its seed and the teacher; an encoded one from its file and the VAE.
The batch size and the device are not part of the identity: they change rounding at most.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import SdHyenaError
from ..fingerprint import SAMPLE, exact
from .encode import nearest_size
from .prepare_settings import PrepareSettings, parse_sizes
from .prompts import CaptionedImage

SHARD = 16
PROMPT_STRIDE = 7919  # a prime: neighbouring pictures get prompts far apart in the list
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """A picture to be made: from a seed (drawn), or from an image file."""

    prompt: str
    held_out: bool
    seed: int = 0
    image: CaptionedImage | None = None


@dataclass
class Plan:
    """What a folder is to hold: its identity, each shard's size, (width, height) in px, and items; and a sample of its
    teacher's weights."""

    identity: dict[str, Any]
    shards: list[tuple[tuple[int, int], list[Item]]]
    draw_steps: int
    guidance: float
    teacher_sample: list[float] = field(default_factory=list)

    @property
    def n_items(self) -> int:
        return sum(len(items) for _, items in self.shards)


def plan_drawings(settings: PrepareSettings, pipe: Any, teacher: dict[str, Any], prompts: Sequence[str]) -> Plan:
    """Pictures drawn by the teacher: picture i has seed ``settings.seed + i`` and its prompt from the list."""
    sizes = parse_sizes(settings.sizes)
    groups: list[tuple[tuple[int, int], list[Item]]] = []
    start = settings.seed
    for number, size in enumerate(sizes):
        items: list[Item] = []
        for total, held_out in ((settings.n_images, False), (settings.n_held_out, True)):
            for i in range(total // len(sizes) + (number < total % len(sizes))):
                seed = start + len(items)
                prompt = prompts[((seed - settings.seed) * PROMPT_STRIDE) % len(prompts)]
                items.append(Item("" if _is_chosen(i, settings.unconditional) else prompt, held_out, seed))
        start += len(items)
        groups.append((size, items))
    config = {k: repr(v) for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    identity = _identity(settings, pipe, teacher, "drawn", ("unet", "text_encoder", "text_encoder_2"), groups) | {
        "n_images": settings.n_images,
        "n_held_out": settings.n_held_out,
        "draw_steps": settings.draw_steps,
        "guidance": settings.guidance,
        "unconditional": settings.unconditional,
        "seed": settings.seed,
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_sha256": _sha256(json.dumps(config, sort_keys=True)),
    }
    return Plan(identity, _cut(groups), settings.draw_steps, settings.guidance, teacher[SAMPLE])


def plan_images(
    settings: PrepareSettings, pipe: Any, teacher: dict[str, Any], images: Sequence[CaptionedImage]
) -> Plan:
    """Captioned images, each at the nearest of the sizes; ``settings.seed`` shuffles which are used, and held out."""
    folder = settings.images
    shuffled = sorted(images, key=lambda image: _sha256(f"{settings.seed}/{image.path.name}"))
    used = shuffled[: settings.n_held_out + settings.n_images]
    if len(used) - settings.n_held_out != settings.n_images:
        logger.info("%s: %d images to learn from, not %d", folder, len(used) - settings.n_held_out, settings.n_images)
    elif len(used) < len(images):
        logger.info("%s: %d of %d images are used: see --n_images", folder, len(used), len(images))
    groups: list[tuple[tuple[int, int], list[Item]]] = [(size, []) for size in parse_sizes(settings.sizes)]
    by_size = dict(groups)
    for number, image in enumerate(used):
        size = nearest_size(image, list(by_size))
        by_size[size].append(Item(image.caption, number < settings.n_held_out, image=image))
    enlarged = sum(
        i.image.width < width or i.image.height < height for (width, height), items in groups for i in items if i.image
    )
    if enlarged:
        logger.info("%s: %d images are smaller than what they are scaled to", folder, enlarged)
    identity = _identity(settings, pipe, teacher, "images", ("vae", "text_encoder", "text_encoder_2"), groups) | {
        "n_images": settings.n_images,
        "n_held_out": settings.n_held_out,
        "seed": settings.seed,
        "images_sha256": _sha256("".join(_file_digest(image.path) for image in used)),
    }
    return Plan(identity, _cut(groups), 0, 0.0, teacher[SAMPLE])


def _is_chosen(i: int, share: float) -> bool:
    """True for ``share`` of all i, evenly spread."""
    return int((i + 1) * share + 1e-9) > int(i * share + 1e-9)


def _cut(groups: Sequence[tuple[tuple[int, int], list[Item]]]) -> list[tuple[tuple[int, int], list[Item]]]:
    return [(size, items[i : i + SHARD]) for size, items in groups for i in range(0, len(items), SHARD)]


def _identity(
    settings: PrepareSettings,
    pipe: Any,
    teacher: dict[str, Any],
    kind: str,
    parts: Sequence[str],
    groups: Sequence[tuple[tuple[int, int], list[Item]]],
) -> dict[str, Any]:
    prompts = [item.prompt for _, items in groups for item in items]
    return {
        "kind": kind,
        "teacher": exact(teacher),
        "weights": _weights_digest(pipe, parts),
        "dtype": str(pipe.unet.dtype),
        "sizes": [list(size) for size, _ in groups],
        "prompts_sha256": _sha256(json.dumps(prompts)),
    }


def _weights_digest(pipe: Any, parts: Sequence[str]) -> str:
    """Tells models apart that share their attention: a sum over every tensor that shapes the data.

    The sums are of the bits as whole numbers: unlike sums of floats they are the same on every machine.
    """
    digest = hashlib.sha256()
    for part in parts:
        module = getattr(pipe, part, None)
        for name, tensor in module.state_dict().items() if module is not None else ():
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            total = tensor.view(bits).sum(dtype=torch.int64).item()
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {total}".encode())
    return digest.hexdigest()[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SdHyenaError(f"image {path}: {error.strerror}") from None
