"""Picture files as training data: which kinds are read, and how each becomes 8-bit RGB. Light until one is read."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SdHyenaError, UsageError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # as Pillow calls them: what else a file holds is not run
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EXIF_ORIENTATION = 0x0112
WHITES = {"I": (255, 65535), "F": (1, 255, 65535)}  # modes whose range no file tells
logger = logging.getLogger(__name__)


def seen_size(path: Path) -> tuple[int, int]:
    """(width, height) in px of an image as it is meant to be seen. Raises UsageError for a file that is none, or a
    damaged one."""
    from PIL import Image

    with _reading(path, UsageError), Image.open(path, formats=FORMATS) as image:
        image.load()  # what is cut off shows only here
        if _is_wide(image):
            _eight_bits(image, path)
        width, height = image.size
        turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    return (height, width) if turned else (width, height)


def read_rgb(path: Path) -> Image.Image:
    """An image as it is meant to be seen, in 8-bit RGB; of several frames the first. What is transparent becomes
    white. Raises SdHyenaError."""
    from PIL import Image, ImageOps

    with _reading(path, SdHyenaError):
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)
        if _is_wide(image):
            image = _eight_bits(image, path)
        image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@contextlib.contextmanager
def _reading(path: Path, kind: type[Exception]) -> Iterator[None]:
    """Raises ``kind``, one line, for whatever Pillow raises within."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise kind(f"image {path}: has more pixels than the {limit} that are read: make it smaller") from None
    except UnidentifiedImageError:
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise kind(f"image {path}: cannot be read as an image ({kinds})") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise kind(f"image {path}: cannot be read: {error}") from None


def _is_wide(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Greys of 16 bits, or of 32 bits or floats: there the smallest usual white that none exceeds is white. Raises
    ValueError."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    if image.mode in WHITES:
        whites = [white for white in WHITES[image.mode] if values.max() <= white]
        if not whites:
            raise ValueError(f"its greys go up to {values.max():g}, which says nothing of white")
        _say_white(path, values.max(), whites[0])
        white = whites[0]
    else:
        white = 65535
    grey = Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


@functools.cache
def _say_white(path: Path, brightest: float, white: int) -> None:
    logger.info("%s: 32-bit greys up to %g: %d is taken for white", path, brightest, white)
