"""What students learn from: prepared latents, noised to random timesteps, with their prompts' states.

Every random choice of a batch follows from (seed, step, position in the batch): batches are the same
whatever was interrupted, and however many processes share them. All samples of a step have one size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SdHyenaError
from ..families import MASK_CHANNELS, unet_call
from .manifest import Manifest
from .shards import finished_manifest, read_shard


@dataclass
class Bucket:
    """All items of one ``size``, (width, height) in px; an item is (shard, row)."""

    size: tuple[int, int]
    training: list[tuple[int, int]] = field(default_factory=list)
    validation: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Dataset:
    """A prepared folder, opened: items in buckets by size. Held-out items are never trained on.

    ``shards`` are the tensors of each shard (see :mod:`.shards`).
    """

    manifest: Manifest
    shards: list[dict[str, Tensor]]
    buckets: list[Bucket]

    @property
    def key(self) -> str:
        """A name for the contents: equal for two folders prepared with the same settings."""
        return self.manifest.key

    def latent(self, item: tuple[int, int]) -> Tensor:
        """(C, h, w), float32."""
        shard, row = item
        return self.shards[shard]["latents"][row].float()

    def text(self, item: tuple[int, int]) -> list[Tensor]:
        """States (tokens, D) and, if the model has any, pooled states (E,) of the item's prompt."""
        shard, row = item
        return self._text(shard, int(self.shards[shard]["prompt"][row]))

    def empty_text(self) -> list[Tensor]:
        """The same of the empty prompt."""
        return self._text(0, 0)

    def _text(self, shard: int, row: int) -> list[Tensor]:
        tensors = self.shards[shard]
        return [tensors[name][row] for name in ("states", "pooled") if name in tensors]


def open_prepared(folder: Path, check: bool = True) -> Dataset:
    """Opens a prepared folder; ``check`` compares every shard's checksum.

    Raises UsageError if there is no such folder, SdHyenaError if it is unfinished or damaged.
    """
    manifest = finished_manifest(folder)
    buckets = {size: Bucket(size) for size in manifest.sizes}
    shards = []
    for number, shard in enumerate(manifest.shards):
        shards.append(read_shard(folder, shard, check)[0])
        held_out = set(shard.held_out)
        for row in range(shard.items):
            part = buckets[shard.size].validation if row in held_out else buckets[shard.size].training
            part.append((number, row))
        if _kinds(shards[-1]) != _kinds(shards[0]):
            raise SdHyenaError(f"{folder / shard.file}: holds tensors of other shapes or types than the first shard")
    dataset = Dataset(manifest, shards, list(buckets.values()))
    if not (any(b.training for b in dataset.buckets) and any(b.validation for b in dataset.buckets)):
        raise SdHyenaError(f"data folder {folder}: needs pictures to learn from and held-out ones")
    return dataset


def check_fits(data: Dataset, pipe: Any, folder: Path) -> None:
    """Raises SdHyenaError if what a folder holds is not what a pipeline's UNet takes."""
    config, first, shard = pipe.unet.config, data.manifest.shards[0], data.shards[0]
    channels, cells = shard["latents"].shape[1], shard["latents"].shape[3]
    for what, found, allowed in (
        ("channels of latents", channels, (config.in_channels, config.in_channels - MASK_CHANNELS)),
        ("px to a cell of latents", first.size[0] // cells, (pipe.vae_scale_factor,)),
        ("width of states", shard["states"].shape[-1], (config.cross_attention_dim,)),
        ("pooled states", "pooled" in shard, (config.get("addition_embed_type") == "text_time",)),
    ):
        if found not in allowed:
            raise SdHyenaError(f"{folder / first.file}: {what}: {found}, where this model has {allowed[0]}")


def _kinds(shard: dict[str, Tensor]) -> dict[str, Any]:
    """What all shards have in common."""
    return {name: (t.dtype, t.shape[1 : 2 if name == "latents" else None]) for name, t in shard.items()}


class TeacherInputs:
    """Noised latents, timesteps and text states for the teacher's UNet, batch by batch.

    ``unconditional`` is the share of samples whose prompt is replaced by the empty one.
    """

    def __init__(self, pipe: Any, data: Dataset, seed: int, unconditional: float) -> None:
        from diffusers import DDPMScheduler

        self.pipe, self.data, self.seed, self.share = pipe, data, seed, unconditional
        self.noising = DDPMScheduler.from_config(pipe.scheduler.config)
        self._training = [b for b in data.buckets if b.training]
        self._validation = [b for b in data.buckets if b.validation]

    def size(self, step: int) -> tuple[int, int]:
        """(h, w) of the latents of a training step."""
        h, w = self.data.latent(self._bucket(step).training[0]).shape[-2:]
        return h, w

    def validation_batches(self, count: int, batch_size: int) -> list[range]:
        """Positions 0 to count - 1 cut into batches of one size each, for ``batch(..., validation=True)``."""
        stride = len(self._validation)
        batches = []
        for first in range(min(stride, count)):
            positions = range(first, count, stride)
            batches += [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
        return batches

    def batch(self, step: int, positions: Sequence[int], validation: bool = False) -> dict[str, Any]:
        """The keyword arguments of one UNet call; sample ``p`` of step ``step`` is the same whenever the seed is.

        Validation positions must be among one of ``validation_batches``; ValueError otherwise.
        """
        if validation:
            numbers = {position % len(self._validation) for position in positions}
            if len(numbers) != 1:
                raise ValueError("these validation positions have several sizes: use validation_batches")
            items = self._validation[numbers.pop()].validation
        else:
            items = self._bucket(step).training
        latents, noises, times, texts = [], [], [], []
        for position in positions:
            generator = torch.Generator().manual_seed(_mix(self.seed, step, position, validation))
            item = items[int(torch.randint(len(items), (1,), generator=generator))]
            latents.append(self.data.latent(item))
            noises.append(torch.randn(latents[-1].shape, generator=generator))
            times.append(torch.randint(self.noising.config.num_train_timesteps, (1,), generator=generator))
            drop = bool(torch.rand((), generator=generator) < self.share)
            texts.append(self.data.empty_text() if drop else self.data.text(item))
        t = torch.cat(times)
        noisy = self.noising.add_noise(torch.stack(latents), torch.stack(noises), t)
        return unet_call(self.pipe, noisy, t, *map(torch.stack, zip(*texts, strict=True)))

    def _bucket(self, step: int) -> Bucket:
        """The size of a step: each size as often as its share of the items."""
        number = _mix(self.seed, step, "size", False) % sum(len(b.training) for b in self._training)
        for bucket in self._training:
            number -= len(bucket.training)
            if number < 0:
                break
        return bucket


def _mix(seed: int, step: int, position: int | str, validation: bool) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{position}/{validation}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
