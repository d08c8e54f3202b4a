"""From images and prompts to what the UNet takes: latents by the VAE, states by the text encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..families import encode_prompt
from .images import read_rgb
from .prompts import CaptionedImage


def nearest_size(image: CaptionedImage, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) of the nearest aspect ratio; of several, the largest that needs no enlarging."""

    def rank(size: tuple[int, int]) -> tuple[float, bool, int]:
        width, height = size
        distance = abs(math.log(image.width / image.height) - math.log(width / height))
        enlarged = width > image.width or height > image.height
        return round(distance, 6), enlarged, width * height if enlarged else -width * height

    return min(sizes, key=rank)


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An image scaled to cover ``size``, (width, height) in px, and cut to it about its centre.

    Returns (3, height, width) in [-1, 1]. Raises SdHyenaError.
    """
    image = ImageOps.fit(read_rgb(path), size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode(pipe: Any, paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Latents (B, C, h, w), float32: the mean of the VAE's posterior, scaled as the pipeline's own are."""
    vae, config = pipe.vae, pipe.vae.config
    dtype = vae.dtype
    if dtype == torch.float16 and getattr(config, "force_upcast", False):  # it overflows in half precision
        vae.to(torch.float32)
    pixels = torch.stack([read_image(path, size) for path in paths])
    try:
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    finally:
        vae.to(dtype)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shift, scale = (torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in (mean, std))
        return (latents - shift) * config.scaling_factor / scale
    return (latents - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor


@torch.no_grad()
def prompt_states(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """``states`` (p, tokens, D), and ``pooled`` (p, E) where the model has them, in the pipeline's type."""
    # What guidance takes for no prompt need not be the empty prompt's states: SDXL's are zero.
    texts = [encode_prompt(pipe, prompt)[int(prompt == "") :: 2] for prompt in prompts]
    return dict(zip(("states", "pooled"), map(torch.cat, zip(*texts, strict=True)), strict=False))
