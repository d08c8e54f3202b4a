"""What ``-m`` names: the bundled model, a diffusers folder, a single file, a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..arguments import given_path
from ..errors import UsageError
from ..families import DEMO, DEMO_DIR, FAMILIES, Family
from ..sources import is_remote
from ..texts import shortened
from .folders import check_folder

_HUB_PAGE = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: ``kind`` is "folder", "file" or "hub"; ``name`` is what the user typed.

    ``variant``: which of a folder's weights; "" for those without a name. ``family``: what a single file is.
    """

    name: str
    kind: str
    location: str
    variant: str = ""
    family: Family | None = None

    @property
    def is_demo(self) -> bool:
        """Whether this is the bundled model, asked for by its name."""
        return self.name == DEMO


def locate(name: str, variant: str = "", whole: bool = True) -> ModelSource:
    """Looks at what there is under ``name`` without loading it. Unless ``whole``, a single file may have a UNet alone.

    Raises UsageError if it is neither the bundled model, something on disk, nor shaped like a hub id, or if what is
    there is something else than a model that can be used; CheckpointError for a file or folder that is damaged.
    """
    path = DEMO_DIR if name == DEMO else given_path(name, "the name of a model")
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        short = name if len(name) <= 60 else f"{name[:57]}..."
        raise UsageError(f"model {short!r}: {getattr(error, 'strerror', None) or error}") from None
    if path.is_dir():
        return ModelSource(name, "folder", str(path), check_folder(path, name, variant))
    if path.is_file():
        if variant:
            raise UsageError(f"model {name}: is a single file, and --variant chooses among the weights of a folder")
        if path.name == "model_index.json":
            raise UsageError(f"model {name}: give the folder, {path.parent}")
        from .single_file import open_checkpoint

        return ModelSource(name, "file", str(path), family=open_checkpoint(path, name, whole).family)
    page = _HUB_PAGE.match(name)
    if page:
        raise UsageError(f"model {name}: is a web address: give its hub id, {page[4]}, or a file that you downloaded")
    if "://" in name:
        raise UsageError(f"model {name}: is an address: download the file, and give its path")
    if not is_remote(name):
        raise UsageError(
            f"model {name} not found: give demo, a diffusers folder, a .safetensors or .ckpt file, or a hub id"
        )
    return ModelSource(name, "hub", name, variant)


def size_defaults(model: str) -> dict[str, int]:
    """Width and height, in px, of a run that names none, where they differ from 512: the bundled model's."""
    if model != DEMO:
        return {}
    return dict.fromkeys(("width", "height"), FAMILIES[DEMO].config("unet")["sample_size"] * 8)


def check_size(name: str, width: int, height: int, factor: int = 8) -> None:
    """Raises UsageError unless a model can draw a ``width`` x ``height`` px image.

    Any multiple of the VAE factor works: where a grid side is odd, diffusers passes the upsampling size.
    """
    for label, value in (("width", width), ("height", height)):
        if value > 16384:
            raise UsageError(f"{label} {shortened(str(value))} px: the largest supported size is 16384")
        if value <= 0 or value % factor:
            near = max(factor, round(value / factor) * factor)
            raise UsageError(f"{label} {value} px: model {name} needs a positive multiple of {factor}, such as {near}")
