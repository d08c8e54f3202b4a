"""Draws scenes as pictures: stickers (Noto Color Emoji, OFL 1.1) on a plain ground.

Only teacher training needs this; the font is Debian's ``fonts-noto-color-emoji``.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .scenes import COLOURS, SUBJECTS, Scene

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 256


@cache
def sticker(subject: str) -> Image.Image:
    """The subject with a white rim, RGBA, about 150 px across. Raises FileNotFoundError without the font."""
    if not FONT.exists():
        raise FileNotFoundError(f"{FONT} not found: install Debian's fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), 109)
    canvas = Image.new("RGBA", (176, 176), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((88, 88), SUBJECTS[subject][1], font=font, embedded_color=True, anchor="mm")
    rim = canvas.getchannel("A").filter(ImageFilter.MaxFilter(11)).filter(ImageFilter.GaussianBlur(1))
    backed = Image.new("RGBA", canvas.size, (255, 255, 255, 0))
    backed.putalpha(rim)
    backed.alpha_composite(canvas)
    return backed.crop(backed.getbbox())


def _places(layout: str, rng: random.Random) -> list[tuple[float, float]]:
    """Centres of the stickers as fractions of the picture's width and height."""
    near, far, mid = 0.27, 0.73, 0.5
    centres = {
        "left": [(near, mid)],
        "right": [(far, mid)],
        "top": [(mid, near)],
        "bottom": [(mid, far)],
        "centre": [(mid, mid)],
        "two": [(near, mid), (far, mid)],
    }[layout]
    return [(x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03)) for x, y in centres]


def render(scene: Scene, rng: random.Random, size: int = SIZE) -> Image.Image:
    """An RGB picture of ``scene``, ``size`` px square; placement and scale vary with ``rng``."""
    ground = tuple(min(255, max(0, c + rng.randint(-6, 6))) for c in COLOURS[scene.colour])
    picture = Image.new("RGB", (size, size), ground)
    width = rng.uniform(0.43, 0.48) * size
    for x, y in _places(scene.layout, rng):
        art = sticker(scene.subject)
        scale = width / max(art.size)
        art = art.resize((round(art.width * scale), round(art.height * scale)), Image.Resampling.LANCZOS)
        picture.paste(art, (round(x * size - art.width / 2), round(y * size - art.height / 2)), art)
    return picture
