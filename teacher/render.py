"""Draws scenes as pictures: stickers (Noto Color Emoji, OFL 1.1) on a plain or textured ground.

The font is Debian's ``fonts-noto-color-emoji``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from grounds import draw_ground
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from sd_hyena.demo.scenes import Scene

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 256
CHARACTERS = {
    "penguin": "\N{PENGUIN}",
    "pig": "\N{PIG FACE}",
    "frog": "\N{FROG FACE}",
    "fox": "\N{FOX FACE}",
    "panda": "\N{PANDA FACE}",
    "chick": "\N{FRONT-FACING BABY CHICK}",
    "octopus": "\N{OCTOPUS}",
    "cactus": "\N{CACTUS}",
    "mushroom": "\N{MUSHROOM}",
    "apple": "\N{RED APPLE}",
    "sunflower": "\N{SUNFLOWER}",
    "strawberry": "\N{STRAWBERRY}",
}


@cache
def sticker(subject: str) -> Image.Image:
    """The subject with a white rim, RGBA, about 150 px across. Raises FileNotFoundError without the font."""
    if not FONT.exists():
        raise FileNotFoundError(f"{FONT} not found: install Debian's fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), 109)
    canvas = Image.new("RGBA", (176, 176), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((88, 88), CHARACTERS[subject], font=font, embedded_color=True, anchor="mm")
    rim = canvas.getchannel("A").filter(ImageFilter.MaxFilter(11)).filter(ImageFilter.GaussianBlur(1))
    backed = Image.new("RGBA", canvas.size, (255, 255, 255, 0))
    backed.putalpha(rim)
    backed.alpha_composite(canvas)
    return backed.crop(backed.getbbox())


CENTRES: dict[str, list[tuple[float, float]]] = {  # of the stickers, as fractions of width and height
    "left": [(0.27, 0.5)],
    "right": [(0.73, 0.5)],
    "top": [(0.5, 0.27)],
    "bottom": [(0.5, 0.73)],
    "centre": [(0.5, 0.5)],
    "two": [(0.27, 0.5), (0.73, 0.5)],
}


def render(scene: Scene, rng: random.Random, size: int = SIZE, scale: float | None = None) -> Image.Image:
    """An RGB picture of ``scene``, ``size`` px square; ground, placement and size of the subject vary with ``rng``.

    Textures are drawn at ``scale`` (1 at 256 px), by default as large as the picture.
    """
    scale = size / SIZE if scale is None else scale
    picture = draw_ground(scene.ground, size, scale, np.random.default_rng(rng.getrandbits(64)))
    width = rng.uniform(0.40, 0.45) * size
    for x, y in CENTRES[scene.place]:
        x, y = x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03)
        art = sticker(scene.subject)
        shrink = width / max(art.size)
        art = art.resize((round(art.width * shrink), round(art.height * shrink)), Image.Resampling.LANCZOS)
        picture.paste(art, (round(x * size - art.width / 2), round(y * size - art.height / 2)), art)
    return picture


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
