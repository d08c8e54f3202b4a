"""A sheet of samples: the same prompts and seeds with attention and with Hyena."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from .. import patch
from ..arguments import given_path, shown
from ..errors import UsageError
from ..generate.draw import contact_sheet
from ..generate.sampling import sample
from ..picture_files import open_picture


def read_sheet(picture: Path | str | Image.Image) -> Image.Image:
    """A picture as it is, or of a file. Raises UsageError if it cannot be read."""
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, str | PathLike):
        raise UsageError(f"sheet must be a picture (PIL.Image.Image) or its file, got {shown(picture)}")
    path = given_path(picture, "sheet")
    with open_picture(path, what="sheet") as opened:
        return opened.convert("RGB")


def draw_sheet(pipe: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> Image.Image:
    """Above attention, below all attached layers, a column a prompt, seeds from 0. What was on is on afterwards.

    ``options`` are the pipeline's, such as ``num_inference_steps``.
    """
    if not callable(pipe) or not hasattr(pipe, "unet"):
        raise UsageError("sample_prompts needs a pipeline to draw with, not a UNet alone")
    on = [name for name, layer in patch.attached(pipe.unet).items() if layer.enabled]
    rows = []
    try:
        for hyena in (False, True):
            patch.set_enabled(pipe.unet, hyena)
            rows.append(sample(pipe, prompts, range(len(prompts)), **options))
    finally:
        patch.set_enabled(pipe.unet, False)
        patch.set_enabled(pipe.unet, True, on)
    return contact_sheet(rows, ["attention", "Hyena"])
