"""What a batch teaches: each selected layer's input and the teacher's output for it, on pictures or on noise."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..machine import Batches
from ..targets import Target
from .capture import Captured, capture
from .data import Dataset, TeacherInputs
from .losses import variance

# Of the held-out inputs, whatever a run trains with: figures of different runs are on the same inputs.
HELD_OUT_UNCONDITIONAL = 0.3
FIRST = (-(10**6), -(10**6) - 1)  # passes for starts and variances
Records = dict[str, Captured]


class Lessons(ABC):
    """Records of the teacher's layers by pass and position; the same for every run with the same seed."""

    @abstractmethod
    def training(self, number: int, positions: Sequence[int]) -> Records:
        """What training pass ``number`` teaches, made now."""

    def first(self, count: int, batches: Batches) -> list[Records]:
        """Two passes of ``count`` positions that are never trained on, and that every process and every resumption
        shares."""
        return [_joined(batches.run(partial(self.training, number), range(count))) for number in FIRST]

    def variances(self, count: int, batches: Batches) -> dict[str, float]:
        """What each layer's loss is divided by."""
        first = self.first(count, batches)
        return {name: sum(variance(records[name].y) for records in first) / len(first) for name in first[0]}

    @abstractmethod
    def held_out(self, positions: Sequence[int]) -> Records:
        """What is never trained on, whatever the run's seed; positions from ``held_out_batches``."""

    @abstractmethod
    def held_out_batches(self, count: int, batch_size: int) -> list[range]:
        """The first ``count`` held-out positions, cut into batches of one size each."""


class PictureLessons(Lessons):
    """Real activations: the teacher's UNet runs on prepared pictures, noised to random timesteps."""

    def __init__(self, pipe: Any, targets: Sequence[Target], data: Dataset, seed: int, unconditional: float) -> None:
        self.unet, self.targets, self.data = pipe.unet, targets, data
        self._training = TeacherInputs(pipe, data, seed, unconditional)
        self._held_out = TeacherInputs(pipe, data, seed=0, unconditional=HELD_OUT_UNCONDITIONAL)

    def training(self, number: int, positions: Sequence[int]) -> Records:
        return self._pass(self._training.batch(number, positions))

    def held_out(self, positions: Sequence[int]) -> Records:
        return self._pass(self._held_out.batch(0, positions, validation=True))

    def held_out_batches(self, count: int, batch_size: int) -> list[range]:
        return self._held_out.validation_batches(count, batch_size)

    @torch.no_grad()
    def _pass(self, inputs: dict[str, Any]) -> Records:
        with capture(self.unet, self.targets) as records:
            self.unet(**inputs)
        return dict(records)


class NoiseLessons(Lessons):
    """Normal noise, as the original trained on: nothing of the teacher is needed but the ``attentions`` of the targets.

    ``latents``: sizes (h, w) of latent images, each as often as any other.
    """

    def __init__(
        self,
        attentions: Mapping[str, nn.Module],
        targets: Sequence[Target],
        latents: Sequence[tuple[int, int]],
        seed: int,
    ) -> None:
        self.attentions, self.targets, self.latents, self.seed = attentions, targets, latents, seed

    def training(self, number: int, positions: Sequence[int]) -> Records:
        size = self.latents[_hash(f"{self.seed}/size/{number}") % len(self.latents)]
        return self._records(f"{self.seed}/noise/{number}", size, positions)

    def held_out(self, positions: Sequence[int]) -> Records:
        return self._records("held-out noise", self.latents[positions[0] % len(self.latents)], positions)

    def held_out_batches(self, count: int, batch_size: int) -> list[range]:
        stride = len(self.latents)
        by_size = [range(first, count, stride) for first in range(min(stride, count))]
        return [positions[i : i + batch_size] for positions in by_size for i in range(0, len(positions), batch_size)]

    @torch.no_grad()
    def _records(self, key: str, latent: tuple[int, int], positions: Sequence[int]) -> Records:
        records = {}
        for number, target in enumerate(self.targets):
            attention = self.attentions[target.name]
            like = next(attention.parameters())
            h, w = target.grid(latent)
            samples = []
            for position in positions:
                generator = torch.Generator().manual_seed(_hash(f"{key}/{number}/{position}"))
                samples.append(torch.randn(h * w, target.dim, generator=generator))
            x = torch.stack(samples).to(like.device, like.dtype)
            records[target.name] = Captured(x, attention(x), (h, w))
        return records


class Reuse:
    """Training by step, each pass used several times.

    With ``reuse`` R the teacher runs at every R-th step only and its last R passes are kept: each is learned from R
    times, R + 1 steps apart (the first steps fill up with passes of negative numbers). After an interruption, passes
    that are no longer there are made again.
    """

    def __init__(self, lessons: Lessons, reuse: int) -> None:
        self.lessons, self.reuse = lessons, reuse
        self._kept: dict[tuple[int, tuple[int, ...]], Records] = {}

    def training(self, step: int, positions: Sequence[int]) -> Records:
        """What a training step learns from."""
        latest, age = divmod(step, self.reuse)
        key = latest - age, tuple(positions)
        if key not in self._kept:
            self._kept = {k: v for k, v in self._kept.items() if k[0] > latest - self.reuse}
            self._kept[key] = self.lessons.training(*key)
        return self._kept[key]

    def forget(self) -> None:
        """Lets go of the passes that are kept."""
        self._kept = {}


def _joined(parts: Sequence[Records]) -> Records:
    """The records of several batches as those of one."""
    if len(parts) == 1:
        return parts[0]
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: Captured(torch.cat([r.x for r in each]), torch.cat([r.y for r in each]), each[0].size)
        for name, each in columns.items()
    }


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
