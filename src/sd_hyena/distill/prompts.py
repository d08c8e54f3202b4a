"""What the teacher is asked for: lists of prompts, and folders of captioned images. Light: imports no torch."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..texts import MAX_LIST, check_prompt, read_text, shortened, warn_of_syntax
from .images import SUFFIXES, seen_size

OTHER_TEXTS = (".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".toml", ".xml", ".html", ".parquet")
MANY_IMAGES = 5000  # that are looked at without a word
logger = logging.getLogger(__name__)
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
# Of none of those subjects or media.
GENERAL_HELD_OUT = (
    "a watercolour of a steam train crossing a stone bridge",
    "a close-up of a honeybee on lavender",
    "a pencil sketch of a violin beside sheet music",
    "a wide view of a desert canyon after rain",
    "a studio portrait of a young woman with red hair",
    "a tiled kitchen with copper pans on the wall",
    "an aerial view of a river delta",
    "a golden retriever running on a beach",
    "a child's drawing of a house with a garden",
    "a glass of iced tea with lemon, backlit",
    "an empty theatre seen from the stage",
    "a woodcut of a sailing ship among icebergs",
    "two cyclists in a narrow alley at noon",
    "a macro shot of frost on a window",
    "a pixel-art dungeon with torches",
    "a stack of old suitcases in an attic",
)


def read_prompts(path: str) -> list[str]:
    """One prompt a line; blank lines and lines starting with # are left out. Raises UsageError."""
    if Path(path).suffix.lower() in OTHER_TEXTS:
        raise UsageError(f"prompts file {shortened(path)}: must be plain text with one prompt a line")
    lines = [line.strip() for line in read_text(Path(path), "prompts file", MAX_LIST).split("\n")]
    prompts = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            check_prompt(f"prompts file {path}: line {number}", line)
            prompts.append(line)
    if not prompts:
        raise UsageError(f"prompts file {path}: holds no prompt")
    warn_of_syntax(f"prompts file {path}", prompts)
    return prompts


def default_prompts(is_demo: bool) -> list[str]:
    """The bundled model's training captions, or a short general list for real checkpoints."""
    if is_demo:
        from ..demo.scenes import training_prompts

        return training_prompts()
    return list(GENERAL_PROMPTS)


def held_out_prompts(is_demo: bool, count: int) -> list[str]:
    """At most ``count`` prompts that no recipe trains on."""
    if is_demo:
        from ..demo.scenes import held_out_scenes

        return [scene.caption for scene in held_out_scenes(count)]
    return list(GENERAL_HELD_OUT[:count])


@dataclass(frozen=True)
class CaptionedImage:
    """An image file, its caption, and its size in px as it is meant to be seen."""

    path: Path
    caption: str
    width: int
    height: int


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def list_images(folder: Path) -> list[CaptionedImage]:
    """The images of a folder by name, each with the caption in the ``.txt`` beside it (empty: no prompt).

    Logs what else is there; files whose names begin with a dot are nobody's. Raises UsageError for a folder without
    images, an image without a caption, and a file that is no image or a damaged one.
    """
    try:
        with os.scandir(folder) as entries:  # which says what is a file without asking for each
            is_file = {e.name: _is_file(e) for e in entries if not e.name.startswith(".")}
    except OSError as error:
        raise UsageError(f"images folder {folder}: {error.strerror}") from None
    there = [folder / name for name in sorted(is_file)]
    paths = [p for p in there if p.suffix.lower() in SUFFIXES and is_file[p.name]]
    texts = {p.name: p for p in there if p.suffix.lower() == ".txt" and is_file[p.name]}
    texts = {name.lower(): p for name, p in texts.items()} | texts  # as it is written goes before any case
    names = {p: p.with_suffix(".txt").name for p in paths}
    captions = {p: texts.get(name) or texts.get(name.lower()) for p, name in names.items()}
    known = {*paths, *texts.values()}
    ignored = _ignored([p for p in there if p not in known])
    if not paths:
        beside = f", but {ignored}" if ignored else ""
        raise UsageError(f"images folder {folder}: holds no {', '.join(s[1:] for s in SUFFIXES)} file{beside}")
    if ignored:
        logger.warning("images folder %s: ignored: %s", folder, ignored)
    bare = [p for p, caption in captions.items() if caption is None]
    if bare:
        more = f" (nor do {len(bare) - 1} more)" if len(bare) > 1 else ""
        caption = bare[0].with_suffix(".txt").name
        raise UsageError(f"images folder {folder}: {bare[0].name} has no caption in {caption} beside it{more}")
    images: list[CaptionedImage] = []
    for path, text in captions.items():
        if text is not None:
            images.append(CaptionedImage(path, _read_caption(text), *seen_size(path)))
        if len(images) % MANY_IMAGES == 0:
            logger.info("images folder %s: looked at %d of %d", folder, len(images), len(captions))
    return images


def _read_caption(path: Path) -> str:
    caption = " ".join(read_text(path, "caption").split())
    check_prompt(f"caption {path}", caption)
    return caption


def _ignored(paths: Sequence[Path]) -> str:
    """How many of each kind, with the name of one: ``2 .heic (a.heic), 1 folder (10_fox)``."""
    first: dict[str, str] = {}
    kinds = [("folder" if p.is_dir() else p.suffix.lower() or "file") for p in paths]
    for kind, path in zip(kinds, paths, strict=True):
        first.setdefault(kind, path.name)
    return ", ".join(f"{count} {kind} ({shortened(first[kind], 50)})" for kind, count in Counter(kinds).items())
