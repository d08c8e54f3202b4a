"""Picture files as training data: which kinds are read, and how each becomes 8-bit RGB. Light until one is read."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SdHyenaError, UsageError
from ..picture_files import open_picture

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EXIF_ORIENTATION = 0x0112
WHITES = {"I": (255, 65535), "F": (1, 255, 65535)}  # modes whose range no file tells
logger = logging.getLogger(__name__)


def seen_size(path: Path) -> tuple[int, int]:
    """(width, height) in px of an image as it is meant to be seen. Raises UsageError for a file that is none, or a
    damaged one."""

    with open_picture(path, UsageError) as image:
        if _is_wide(image):
            _eight_bits(image, path)
        width, height = image.size
        turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    return (height, width) if turned else (width, height)


def read_rgb(path: Path) -> Image.Image:
    """An image as it is meant to be seen, in 8-bit RGB; of several frames the first. What is transparent becomes
    white. Raises SdHyenaError."""
    from PIL import Image, ImageOps

    with open_picture(path, SdHyenaError) as file:
        image = ImageOps.exif_transpose(file)
        if _is_wide(image):
            image = _eight_bits(image, path)
        image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _is_wide(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Greys of 16 bits, or of 32 bits or floats: there the smallest usual white that none exceeds is white. Raises
    ValueError."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float32)
    if image.mode in WHITES:
        whites = [white for white in WHITES[image.mode] if values.max() <= white]
        if not whites:
            raise ValueError(f"its greys go up to {values.max():g}, which says nothing of white")
        _say_white(path, values.max(), whites[0])
        white = whites[0]
    else:
        white = 65535
    clear = image.info.get("transparency")
    solid = np.where(values == clear, 0, 255).astype(np.uint8) if isinstance(clear, int) else None
    values.clip(0, white, out=values)  # in place: a large picture has a quarter of a gigabyte of them
    values *= 255 / white
    grey = Image.fromarray(values.round(out=values).astype(np.uint8))
    if solid is not None:
        grey.putalpha(Image.fromarray(solid))
    return grey


@functools.cache
def _say_white(path: Path, brightest: float, white: int) -> None:
    logger.info("%s: 32-bit greys up to %g: %d is taken for white", path, brightest, white)
