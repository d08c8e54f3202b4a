"""Opening pictures that come from anywhere. Light until one is opened."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .texts import reason

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # as Pillow calls them: others may start programs (EPS)
MAX_PIXELS = 1 << 26  # 8192 x 8192: at four bytes each, in up to four copies at once, 1 GiB
MAX_BYTES = 1 << 29  # as many pixels of four values of 16 bits, unpacked


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within the block nothing reaches the process's standard error: libtiff and libjpeg write there by themselves."""
    try:
        before = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@contextlib.contextmanager
def open_picture(path: Path, kind: type[Exception] = UsageError, what: str = "image") -> Iterator[Image.Image]:
    """A picture of a known format, and of a size by its header that memory can take, decoded. Raises ``kind``, one
    line, for whatever else it is, and whatever Pillow raises within."""
    from PIL import Image, UnidentifiedImageError

    limit = f"{what} {path}: has more pixels than the {MAX_PIXELS} (8192x8192) that are read: make it smaller"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, and of what is odd beside them
            if path.stat().st_size > MAX_BYTES:
                raise kind(f"{what} {path}: is larger than {MAX_BYTES >> 20} MiB: make it smaller")
            with contextlib.ExitStack() as stack:
                with _silent():
                    image = stack.enter_context(Image.open(path, formats=FORMATS))
                    if image.width * image.height > MAX_PIXELS:
                        raise kind(limit)
                    image.load()
                yield image
    except Image.DecompressionBombError:
        raise kind(limit) from None
    except UnidentifiedImageError:
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise kind(f"{what} {path}: cannot be read as an image ({kinds})") from None
    except kind:
        raise
    except Exception as error:  # Pillow's readers raise what the bytes lead to
        raise kind(f"{what} {path}: cannot be read: {reason(error)}") from None
