"""What a batch teaches: each selected layer's input and the teacher's output for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from ..targets import Target
from .capture import Captured, capture
from .data import Latents, TeacherInputs


class Lessons:
    """Records of the teacher's layers by step and position; the same for every run with the same seed.

    ``noise`` replaces the activations seen in training by normal noise, as the original did; what the
    teacher's start and the held-out figures rest on are activations in any case.
    """

    def __init__(
        self, pipe: Any, targets: Sequence[Target], grid: tuple[int, int], data: Latents, seed: int, noise: bool
    ) -> None:
        self.pipe, self.targets, self.grid, self.seed, self.noise = pipe, targets, grid, seed, noise
        self._training = TeacherInputs(pipe, data, seed)
        self._held_out = TeacherInputs(pipe, data, seed=0)

    def training(self, step: int, positions: Sequence[int]) -> dict[str, Captured]:
        """What a training step learns from."""
        return self._noise_pass(step, positions) if self.noise else self.activations(step, positions)

    def activations(self, step: int, positions: Sequence[int]) -> dict[str, Captured]:
        """Real activations on training latents."""
        return self._teacher_pass(self._training.batch(step, positions))

    def held_out(self, positions: Sequence[int]) -> dict[str, Captured]:
        """Real activations on held-out latents, whatever the run's seed."""
        return self._teacher_pass(self._held_out.batch(0, positions, validation=True))

    @torch.no_grad()
    def _teacher_pass(self, inputs: dict[str, Any]) -> dict[str, Captured]:
        with capture(self.pipe.unet, self.targets) as records:
            self.pipe.unet(**inputs)
        return dict(records)

    @torch.no_grad()
    def _noise_pass(self, step: int, positions: Sequence[int]) -> dict[str, Captured]:
        records = {}
        for number, target in enumerate(self.targets):
            h, w = target.grid(self.grid)
            samples = []
            for position in positions:
                key = hashlib.sha256(f"{self.seed}/noise/{step}/{number}/{position}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
                samples.append(torch.randn(h * w, target.dim, generator=generator))
            x = torch.stack(samples).to(self.pipe.unet.device, self.pipe.unet.dtype)
            records[target.name] = Captured(x, self.pipe.unet.get_submodule(target.path)(x), (h, w))
        return records
