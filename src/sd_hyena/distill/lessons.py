"""What a batch teaches: each selected layer's input and the teacher's output for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from ..targets import Target
from .capture import Captured, capture
from .data import Dataset, TeacherInputs

# Of the held-out inputs, whatever a run trains with: figures of different runs are on the same inputs.
HELD_OUT_UNCONDITIONAL = 0.3


class Lessons:
    """Records of the teacher's layers by step and position; the same for every run with the same seed.

    Training may use each teacher pass several times (``reuse``). ``noise`` replaces the activations seen in
    training by normal noise, as the original did; what the teacher's start and the held-out figures rest on are
    activations in any case.
    """

    def __init__(
        self,
        pipe: Any,
        targets: Sequence[Target],
        data: Dataset,
        seed: int,
        noise: bool,
        unconditional: float,
        reuse: int = 1,
    ) -> None:
        self.pipe, self.targets, self.seed, self.noise, self.reuse = pipe, targets, seed, noise, reuse
        self.data = data
        self._kept: dict[tuple[int, tuple[int, ...]], dict[str, Captured]] = {}
        self._training = TeacherInputs(pipe, data, seed, unconditional)
        self._held_out = TeacherInputs(pipe, data, seed=0, unconditional=HELD_OUT_UNCONDITIONAL)

    def training(self, step: int, positions: Sequence[int]) -> dict[str, Captured]:
        """What a training step learns from.

        With ``reuse`` R the teacher runs at every R-th step only and its last R passes are kept: each is learned
        from R times, R + 1 steps apart (the first steps fill up with passes of negative numbers). After an
        interruption, passes that are no longer there are made again.
        """
        latest, age = divmod(step, self.reuse)
        key = latest - age, tuple(positions)
        if key not in self._kept:
            self._kept = {k: v for k, v in self._kept.items() if k[0] > latest - self.reuse}
            self._kept[key] = self.fresh(*key)
        return self._kept[key]

    def fresh(self, number: int, positions: Sequence[int]) -> dict[str, Captured]:
        """What pass ``number`` teaches, made now and not kept."""
        return self._noise_pass(number, positions) if self.noise else self.activations(number, positions)

    def forget(self) -> None:
        """Lets go of the passes that are kept."""
        self._kept = {}

    def activations(self, step: int, positions: Sequence[int]) -> dict[str, Captured]:
        """Real activations on training latents."""
        return self._teacher_pass(self._training.batch(step, positions))

    def held_out(self, positions: Sequence[int]) -> dict[str, Captured]:
        """Real activations on held-out latents, whatever the run's seed; positions from ``held_out_batches``."""
        return self._teacher_pass(self._held_out.batch(0, positions, validation=True))

    def held_out_batches(self, count: int, batch_size: int) -> list[range]:
        """The first ``count`` held-out positions, cut into batches of one size each."""
        return self._held_out.validation_batches(count, batch_size)

    @torch.no_grad()
    def _teacher_pass(self, inputs: dict[str, Any]) -> dict[str, Captured]:
        with capture(self.pipe.unet, self.targets) as records:
            self.pipe.unet(**inputs)
        return dict(records)

    @torch.no_grad()
    def _noise_pass(self, step: int, positions: Sequence[int]) -> dict[str, Captured]:
        records = {}
        latent = self._training.size(step)
        for number, target in enumerate(self.targets):
            h, w = target.grid(latent)
            samples = []
            for position in positions:
                key = hashlib.sha256(f"{self.seed}/noise/{step}/{number}/{position}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
                samples.append(torch.randn(h * w, target.dim, generator=generator))
            x = torch.stack(samples).to(self.pipe.unet.device, self.pipe.unet.dtype)
            records[target.name] = Captured(x, self.pipe.unet.get_submodule(target.path)(x), (h, w))
        return records
