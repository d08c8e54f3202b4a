"""What the teacher is asked for: lists of prompts, and folders of captioned images. Light: imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..texts import read_text
from .images import SUFFIXES, seen_size

GENERAL_PROMPTS = tuple(
    f"{medium} of {subject}"
    for subject in (
        "a mountain lake at sunrise",
        "an old man with a grey beard, portrait",
        "a crowded street market at night",
        "a cat asleep on a wooden chair",
        "a bowl of fruit on a table",
        "a lighthouse in a storm",
        "a red sports car in a city",
        "a forest path in autumn",
        "an astronaut standing on the moon",
        "a plate of spaghetti",
        "a castle on a hill",
        "a girl reading a book by a window",
        "a fishing village seen from the sea",
        "a robot in a workshop",
        "a field of sunflowers",
        "a snowy owl in flight",
    )
    for medium in ("a photograph", "an oil painting", "a detailed illustration")
)


def read_prompts(path: str) -> list[str]:
    """One prompt a line; blank lines and lines starting with # are left out. Raises UsageError."""
    lines = read_text(Path(path), "prompts file").split("\n")
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"prompts file {path}: holds no prompt")
    return prompts


def default_prompts(is_demo: bool) -> list[str]:
    """The bundled model's training captions, or a short general list for real checkpoints."""
    if is_demo:
        from ..demo.scenes import training_prompts

        return training_prompts()
    return list(GENERAL_PROMPTS)


@dataclass(frozen=True)
class CaptionedImage:
    """An image file, its caption, and its size in px as it is meant to be seen."""

    path: Path
    caption: str
    width: int
    height: int


def list_images(folder: Path) -> list[CaptionedImage]:
    """The images of a folder by name, each with the caption in the ``.txt`` beside it (empty: no prompt).

    Raises UsageError for a folder without images, an image without a caption, and a
    file that is no image.
    """
    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    except OSError as error:
        raise UsageError(f"images folder {folder}: {error.strerror}") from None
    if not paths:
        raise UsageError(f"images folder {folder}: holds no {', '.join(s[1:] for s in SUFFIXES)} file")
    bare = [p for p in paths if not p.with_suffix(".txt").is_file()]
    if bare:
        more = f" (nor do {len(bare) - 1} more)" if len(bare) > 1 else ""
        caption = bare[0].with_suffix(".txt").name
        raise UsageError(f"images folder {folder}: {bare[0].name} has no caption in {caption} beside it{more}")
    return [
        CaptionedImage(path, " ".join(read_text(path.with_suffix(".txt"), "caption").split()), *seen_size(path))
        for path in paths
    ]
