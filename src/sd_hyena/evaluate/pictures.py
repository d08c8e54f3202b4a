"""Pictures and latents for the same prompts and seeds, and how far apart two sets of them are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import likeness
from ..generate.sampling import sample_latents
from ..generate.sparing import Sparing

BATCH = 4


@dataclass
class Drawing:
    """Pictures, the latents (N, C, h, w) they were decoded from, on the CPU, and seconds per picture (the median of
    the batches)."""

    images: list[Image.Image]
    latents: Tensor
    seconds: float


@dataclass
class Distances:
    """How far each picture is from its counterpart: PSNR in dB, SSIM, |a - b|^2 / |a - mean a|^2 of the latents, and
    how much of its finest detail there is (below 1: smoother than its counterpart)."""

    psnr: list[float]
    ssim: list[float]
    latent: list[float]
    detail: list[float]

    def figures(self) -> dict[str, float]:
        """Means, and PSNR's median and worst: a picture that goes another way moves the mean alone."""
        return {
            "psnr_mean_db": statistics.mean(self.psnr),
            "psnr_median_db": statistics.median(self.psnr),
            "psnr_min_db": min(self.psnr),
            "ssim_mean": statistics.mean(self.ssim),
            "latent_distance_mean": statistics.mean(self.latent),
            "detail_mean": statistics.mean(self.detail),
        }


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
    sparing: Sparing | None = None,
    **options: Any,
) -> Drawing:
    """Draws every prompt with the UNet as it stands; picture i depends on prompt i and seed i alone.

    ``options`` go to the pipeline (size, steps, guidance). ``progress`` is told how many pictures of how many are
    done; ``sparing`` as in :func:`..generate.sampling.sample`.
    """
    images: list[Image.Image] = []
    latents: list[Tensor] = []
    times: list[float] = []
    for start in range(0, len(prompts), BATCH):
        chunk = slice(start, start + BATCH)
        began = time.perf_counter()
        drawn, final = sample_latents(pipe, prompts[chunk], seeds[chunk], sparing, **options)
        images += drawn
        latents.append(final.float().cpu())
        times.append((time.perf_counter() - began) / len(drawn))
        progress(len(images), len(prompts))
    return Drawing(images, torch.cat(latents), statistics.median(times))


def compare(reference: Drawing, other: Drawing) -> Distances:
    """Every picture of ``other`` against the same place's of ``reference``."""
    pairs = list(zip(reference.images, other.images, strict=True))
    return Distances(
        [psnr(a, b) for a, b in pairs],
        [ssim(a, b) for a, b in pairs],
        [latent_distance(a, b) for a, b in zip(reference.latents, other.latents, strict=True)],
        [detail(b) / max(detail(a), 1e-12) for a, b in pairs],
    )


def psnr(a: Image.Image, b: Image.Image) -> float:
    """:func:`..likeness.psnr` of two 8-bit RGB pictures of the same size."""
    return likeness.psnr(_tensor(a), _tensor(b))


def ssim(a: Image.Image, b: Image.Image) -> float:
    """:func:`..likeness.ssim` of two 8-bit RGB pictures of the same size."""
    return likeness.ssim(_tensor(a), _tensor(b))


def detail(picture: Image.Image) -> float:
    """Mean square of the finest band of its Laplacian pyramid (Burt and Adelson 1983): the picture less its blur by
    (1, 4, 6, 4, 1) / 16 along both axes."""
    pixels = np.pad(_pixels(picture), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    blurred = pixels
    for axis in (0, 1):
        taps = zip((1, 4, 6, 4, 1), range(5), strict=True)
        length = blurred.shape[axis] - 4
        blurred = np.sum([w / 16 * blurred.take(range(i, i + length), axis) for w, i in taps], axis=0)
    return float(np.square(pixels[2:-2, 2:-2] - blurred).mean())


def latent_distance(a: Tensor, b: Tensor) -> float:
    """``|a - b|^2 / |a - mean a|^2`` of two latents (C, h, w), the mean per channel: 1 is what a's means score."""
    spread = (a - a.mean((1, 2), keepdim=True)).double().square().sum().item()
    return (a - b).double().square().sum().item() / max(spread, 1e-12)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(_pixels(image)).permute(2, 0, 1) / 255


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64)
