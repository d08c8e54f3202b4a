"""What errors are measured on: latents the teacher drew, noised to timesteps spread evenly over bands."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..families import encode_prompt, unet_call
from ..machine import Batches

BATCH = 4  # samples a call; each counts twice, with its prompt and without
Result = TypeVar("Result")


@dataclass
class Inputs:
    """One UNet call: its keyword arguments, of which the first half of the batch has the prompts and the second
    half, the same samples, the empty prompt; and the timestep band they belong to."""

    band: int
    call: dict[str, Any]


class HeldOut:
    """Noised latents for each band, the same for every student: sample j of band b is noised with seed
    ``b * samples + j`` and takes the latents in turn.

    Args:
        latents: (N, C, h, w), drawn by the teacher for ``prompts``.
        bands: how many equal parts the training timesteps are cut into.
        samples: noised latents in each band, at timesteps spread evenly over it.
        states: for a pipeline without a text encoder, what stands for every prompt's states, in the order in which
            ``encode_prompt`` returns them, (1, tokens, D) each.
    """

    def __init__(
        self,
        pipe: Any,
        latents: Tensor,
        prompts: Sequence[str],
        bands: int,
        samples: int,
        states: tuple[Tensor, ...] | None = None,
    ) -> None:
        from diffusers import DDPMScheduler

        self.pipe, self.latents, self.prompts, self.samples = pipe, latents, list(prompts), samples
        self.noising = DDPMScheduler.from_config(pipe.scheduler.config)
        self.edges = band_edges(self.noising.config.num_train_timesteps, bands)
        self._batches = Batches(BATCH, "while measuring errors", "--width and --height, or give --layer_samples 0")
        self._texts = {} if states is None else dict.fromkeys(prompts, states)

    def __iter__(self) -> Iterator[Inputs]:
        """All calls, band by band."""
        for _, (batch,) in self.each(lambda batch: batch):
            yield batch

    def each(self, work: Callable[[Inputs], Result]) -> Iterator[tuple[int, list[Result]]]:
        """Bands, and what ``work`` returns for each call; for its parts, where memory does not suffice for all of
        it. Raises OutOfMemory if it does not for one sample."""
        for band in range(len(self.edges)):

            def part(positions: Sequence[int], band: int = band) -> Result:
                return work(Inputs(band, self._call(band, positions)))

            for start in range(0, self.samples, BATCH):
                yield band, self._batches.run(part, range(start, min(start + BATCH, self.samples)))

    def __len__(self) -> int:
        return len(self.edges) * -(-self.samples // BATCH)

    def _call(self, band: int, positions: Sequence[int]) -> dict[str, Any]:
        first, last = self.edges[band]
        numbers = [band * self.samples + j for j in positions]
        chosen = [n % len(self.prompts) for n in numbers]
        noise = [torch.randn(self.latents.shape[1:], generator=torch.Generator().manual_seed(n)) for n in numbers]
        t = torch.tensor([first + int((j + 0.5) / self.samples * (last + 1 - first)) for j in positions])
        noisy = self.noising.add_noise(self.latents[chosen], torch.stack(noise), t)
        texts = [self._text(self.prompts[i]) for i in chosen]
        # (states, empty states[, pooled, empty pooled]) of each prompt -> one batch of states [and one of pooled]
        columns = [torch.cat(column) for column in zip(*texts, strict=True)]
        both = [torch.cat(columns[k : k + 2]) for k in range(0, len(columns), 2)]
        return unet_call(self.pipe, torch.cat([noisy, noisy]), torch.cat([t, t]), *both)

    @torch.no_grad()
    def _text(self, prompt: str) -> tuple[Tensor, ...]:
        if prompt not in self._texts:
            self._texts[prompt] = encode_prompt(self.pipe, prompt)
        return self._texts[prompt]


def band_edges(timesteps: int, bands: int) -> list[tuple[int, int]]:
    """First and last timestep of each band: (1000, 5) -> [(0, 199), (200, 399), ...]."""
    cuts = [timesteps * i // bands for i in range(bands + 1)]
    return [(a, b - 1) for a, b in itertools.pairwise(cuts)]
